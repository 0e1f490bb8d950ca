"""prompts: a prompt source -> Prompt rows, checked and split. Runs where the run is launched, before anything is submitted.

Source: a Hugging Face dataset id, a dataset folder (of files, or as ``save_to_disk`` wrote it), or a local ``.jsonl`` or
``.parquet`` file with ``prompt`` and, optionally, ``prompt_id`` and ``messages``. Order is by a hash of run seed and prompt
id, so it does not depend on the source's order; the first ``num_held_out`` prompts of that order are kept for evaluation and
never trained on.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aipo_hpc.errors import DataError
from aipo_hpc.identity import looks_local
from aipo_hpc.rows import Message, Prompt, write_rows
from aipo_hpc.settings import tuning
from aipo_hpc.task import Outcome, Task

TRAIN = "train.parquet"
HELD_OUT = "held_out.parquet"


@dataclass(frozen=True)
class PromptsConfig:
    """How the prompt source is read."""

    split: str = "train"
    """Split of a Hugging Face dataset."""
    revision: str | None = None
    """Revision of a Hugging Face dataset (None: the newest)."""
    prompt_column: str = "prompt"
    """Column that holds the prompt's text."""
    id_column: str = "prompt_id"
    """Column that holds the prompt's id; where it is absent, the id is a hash of the text."""
    limit: int | None = None
    """Use only the first so many prompts of the source."""
    num_held_out: int = 256
    """Prompts kept for evaluation, never trained on."""
    num_proc: int = tuning(1)
    """Processes that read a Hugging Face dataset."""


def run(config: PromptsConfig, task: Task) -> Outcome:
    """Read, check and split the source named by the input ``source``.

    Raises DataError when it is missing, empty, malformed (with the line number), lacks the column, or repeats an id.
    """
    source = task.inputs["source"].model
    prompts = check(read(source, config), source, config)
    prompts.sort(key=lambda prompt: order(task.seed, prompt.prompt_id))
    if len(prompts) <= config.num_held_out:
        raise DataError(
            f"{source}: {len(prompts)} prompts, of which data.num_held_out={config.num_held_out} are kept for evaluation: "
            "none is left to train on. Lower data.num_held_out or give more prompts."
        )
    held_out, train = prompts[: config.num_held_out], prompts[config.num_held_out :]
    write_rows(task.out / TRAIN, train, Prompt)
    write_rows(task.out / HELD_OUT, held_out, Prompt)
    return Outcome(len(prompts), (TRAIN, HELD_OUT), {"train": len(train), "held_out": len(held_out)})


def order(seed: int, prompt_id: str) -> bytes:
    """The sort key that shuffles prompts by content."""
    return hashlib.sha256(f"{seed}\0{prompt_id}".encode("utf-8", "surrogatepass")).digest()


def check(prompts: Iterable[Prompt], source: str, config: PromptsConfig) -> list[Prompt]:
    """Collect prompts up to the limit; raises DataError on a repeated id or when there is none."""
    checked: dict[str, Prompt] = {}
    for number, prompt in enumerate(prompts, 1):
        if prompt.prompt_id in checked:
            raise DataError(
                f"{source}: row {number} repeats prompt_id {prompt.prompt_id!r} "
                f"(prompt {prompt.prompt[:60]!r}). Ids must be unique: mend the file, or remove the id column "
                "and identical prompts."
            )
        checked[prompt.prompt_id] = prompt
        if config.limit is not None and number >= config.limit:
            break
    if not checked:
        raise DataError(f"{source}: no prompts in it. Give a source with at least one row.")
    return list(checked.values())


def read(source: str, config: PromptsConfig) -> Iterator[Prompt]:
    """Yield the prompts of a file or dataset in its own order."""
    for where, row in rows_of(source, config.split, config.revision, config.num_proc):
        yield _prompt(where, row, config)


def rows_of(source: str, split: str, revision: str | None, num_proc: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a file or dataset, each with where it is, for messages."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json") and path.is_file():
        yield from _jsonl(path)
    elif path.suffix == ".parquet" and path.is_file():
        yield from _parquet(path)
    else:
        yield from _dataset(source, split, revision, num_proc)


def _prompt(where: str, row: dict[str, Any], config: PromptsConfig) -> Prompt:
    messages = row.get("messages")
    if config.prompt_column not in row and not messages:
        raise DataError(
            f"{where}: no column {config.prompt_column!r}; there are {sorted(row)}. "
            "Set data.prompt_column to the one that holds the prompt."
        )
    if messages and config.prompt_column not in row:
        conversation, answer = _conversation(where, messages)
        text = "\n\n".join(message.content for message in conversation)
    else:
        text = row[config.prompt_column]
        if not isinstance(text, str):
            raise DataError(f"{where}: column {config.prompt_column!r} holds {type(text).__name__}, not text.")
        conversation, answer = _conversation(where, messages) if messages else ([Message("user", text)], None)
    if not text.strip():
        raise DataError(f"{where}: column {config.prompt_column!r} is empty. Remove the row.")
    given = row.get(config.id_column)
    prompt_id = str(given) if given is not None else hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    return Prompt(prompt_id, text, conversation, answer)


def _conversation(where: str, messages: Any) -> tuple[list[Message], str | None]:
    """The turns up to and including the user's last one, and the dataset's own answer to it if there is one."""
    turns = turns_of(where, messages)
    asked = max((position for position, turn in enumerate(turns, 1) if turn.role == "user"), default=0)
    if not asked:
        raise DataError(f"{where}: 'messages' has no user turn. Remove the row or add the user's message.")
    answers = [turn.content for turn in turns[asked:] if turn.role == "assistant"]
    return turns[:asked], answers[0] if answers else None


def turns_of(where: str, messages: Any) -> list[Message]:
    """The turns of a conversation. Raises DataError for what is none."""
    try:
        turns = [Message(turn["role"], turn["content"]) for turn in messages]
    except (TypeError, KeyError) as error:
        raise DataError(
            f"{where}: 'messages' must be a list of {{role, content}}; got {str(messages)[:80]}."
        ) from error
    for turn in turns:
        if not isinstance(turn.role, str) or not isinstance(turn.content, str):
            raise DataError(
                f"{where}: a turn's role and content must be text; got {turn.role!r:.40} and {turn.content!r:.40}."
            )
    return turns


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


def _dataset(source: str, split: str, revision: str | None, num_proc: int) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    path = Path(source)
    if path.is_file():
        raise DataError(f"{source}: not a .jsonl or .parquet file. Give one of these, or a Hugging Face dataset id.")
    if not path.exists() and (path.suffix in (".jsonl", ".json", ".parquet") or looks_local(source)):
        raise DataError(
            f"{source}: no such file. Give the path of a .jsonl or .parquet file, or a Hugging Face dataset id."
        )
    try:
        if (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(source)[split]
        elif (path / "state.json").is_file():
            loaded = datasets.load_from_disk(source)
        else:
            loaded = datasets.load_dataset(source, split=split, revision=revision, num_proc=num_proc)
    except (OSError, ValueError, KeyError) as error:  # datasets raises these for a missing id, split or network
        raise DataError(
            f"dataset {source!r}, split {split!r} cannot be loaded: {error}\n"
            "Give a Hugging Face dataset id that is reachable from here (or in the local cache), or a local file."
        ) from error
    for number, row in enumerate(loaded, 1):
        yield f"{source}[{split}], row {number}", row
