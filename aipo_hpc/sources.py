"""Sources: datasets from outside, as rows. What a recipe names as its prompts, conversations or preferences.

    HuggingFaceH4/ultrafeedback_binarized                      a Hugging Face dataset id, from the hub or the local cache
    my.jsonl   my.json   my.parquet   folder                   local: a folder of such files, or what ``save_to_disk`` wrote
    some/dataset@v1.0[train_prefs]:0.5                         revision, split, and the part of its rows that is used
    some/dataset[train_prefs] + my.jsonl:0.25                  several, one after the other

Which rows are used of a source with a part is told by a hash of run seed and row, not by the source's order.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.identity import looks_local

_SPELLED = re.compile(r"(?P<name>.+?)(?:@(?P<revision>[\w./-]+))?(?:\[(?P<split>[^\[\]]+)\])?(?::(?P<part>\d*\.?\d+))?")

KIND = "source"
"""How the inputs of a job are called that are sources: the first one this, the others with a number behind it."""


@dataclass(frozen=True)
class Source:
    """One dataset; ``part`` of its rows is used."""

    name: str
    split: str | None = None
    revision: str | None = None
    part: float = 1.0

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        split = f"[{self.split}]" if self.split else ""
        return f"{self.name}{revision}{split}" + (f":{self.part:g}" if self.part != 1 else "")

    def __post_init__(self) -> None:
        if not 0 < self.part <= 1:
            raise RecipeError(
                f"source {self.name!r}: a part of {self.part:g} of its rows; it must be above 0, up to 1."
            )

    def absolute(self) -> "Source":
        """The source with a local path as seen from anywhere."""
        path = Path(self.name).expanduser()
        return replace(self, name=str(path.resolve())) if path.exists() else self


def parse(text: str) -> Source:
    """One source as a recipe spells it. A path that is there as it stands is taken as it stands."""
    found = None if Path(text).expanduser().exists() else _SPELLED.fullmatch(text)
    if found is None:
        return Source(text)
    return Source(found["name"], found["split"], found["revision"], float(found["part"] or 1))


def parse_all(text: str) -> list[Source]:
    """The sources that a recipe names, joined by ' + '. Raises RecipeError for one that is empty or has no good part."""
    texts = [text] if Path(text).expanduser().exists() else [each.strip() for each in re.split(r"\s\+(?:\s|$)", text)]
    if not all(texts):
        raise RecipeError(
            f"source {text!r}: nothing stands on one side of a '+'. Name a dataset there, or leave it out."
        )
    return [parse(each) for each in texts]


def rows_of(source: Source, split: str, num_proc: int = 1) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a dataset, each with where it is, for messages; ``split`` is for a source that names none."""
    path = Path(source.name)
    if path.suffix == ".jsonl" and path.is_file():
        yield from _jsonl(path)
    elif path.suffix == ".json" and path.is_file():
        yield from _json(path)
    elif path.suffix == ".parquet" and path.is_file():
        yield from _parquet(path)
    else:
        yield from _dataset(source, source.split or split, num_proc)


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.rstrip("\n"))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: not JSON ({error.msg}, column {error.colno}). Each line must be one JSON object."
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: a JSON {type(row).__name__}, not an object with a 'prompt'.")
            yield where, row


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A file that is one list of objects, as FastChat's; one object per line is read as well."""
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        is_list = file.read(4096).lstrip().startswith("[")
        file.seek(0)
        if not is_list:
            yield from _jsonl(path)
            return
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno}). The file must be one list."
            ) from error
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON {type(row).__name__}, not an object with a 'prompt'.")
        yield where, row


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}). Write it again.") from error


def _dataset(source: Source, split: str, num_proc: int) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    name, path = source.name, Path(source.name)
    if path.is_file():
        raise DataError(
            f"{name}: not a .jsonl, .json or .parquet file. Give one of these, or a Hugging Face dataset id."
        )
    if not path.exists() and (path.suffix in (".jsonl", ".json", ".parquet") or looks_local(name)):
        raise DataError(
            f"{name}: no such file. Give the path of a .jsonl, .json or .parquet file, or a Hugging Face dataset id."
        )
    try:
        if (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)[split]
        elif (path / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, split=split, revision=source.revision, num_proc=num_proc)
    except (OSError, ValueError, KeyError) as error:  # datasets raises these for a missing id, split or network
        raise DataError(
            f"dataset {name!r}, split {split!r} cannot be loaded: {error}\n"
            "Give a Hugging Face dataset id that is reachable from here (or in the local cache), or a local file."
        ) from error
    for number, row in enumerate(loaded, 1):
        yield f"{name}[{split}], row {number}", row
