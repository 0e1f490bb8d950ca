"""How a recipe names datasets: several, with split, revision and part."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.sources import Source, parse, parse_all, rows_of


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("some/data", Source("some/data")),
        ("some/data-v0.1", Source("some/data-v0.1")),
        ("some/data[train_prefs]", Source("some/data", "train_prefs")),
        ("some/data@v1.0[train[:10%]]", Source("some/data@v1.0[train[:10%]]")),
        ("some/data@refs/convert/parquet[test]:0.25", Source("some/data", "test", "refs/convert/parquet", 0.25)),
        ("my.jsonl:.5", Source("my.jsonl", part=0.5)),
        ("./my data.jsonl", Source("./my data.jsonl")),
    ],
)
def test_a_source_is_spelled_with_revision_split_and_part(text: str, source: Source) -> None:
    assert parse(text) == source
    assert parse(str(source)) == source


def test_several_sources_are_joined_by_a_plus() -> None:
    assert parse_all("some/data[train]:0.5 + my.jsonl") == [Source("some/data", "train", part=0.5), Source("my.jsonl")]
    assert parse_all("c++.jsonl") == [Source("c++.jsonl")]


def test_a_path_that_is_there_is_taken_as_it_stands(tmp_path: Path) -> None:
    for name in ("a:0.5", "a + b", "a[x]"):
        (tmp_path / name).touch()
        assert parse_all(str(tmp_path / name)) == [Source(str(tmp_path / name))]


def test_a_part_that_is_none_and_a_missing_name_are_refused() -> None:
    for text in ("a:0", "a:1.5"):
        with pytest.raises(
            RecipeError, match=r"source 'a': a part of (0|1\.5) of its rows; it must be above 0, up to 1"
        ):
            parse(text)
    with pytest.raises(RecipeError, match="nothing stands on one side of a '\\+'"):
        parse_all("a + ")


def test_a_local_source_is_known_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert parse("my.jsonl:0.5").absolute() == Source(str(tmp_path / "my.jsonl"), part=0.5)
    assert parse("some/data").absolute() == Source("some/data")


def rows(path: Path, content: str) -> list[tuple[str, dict[str, Any]]]:
    path.write_text(content)
    return list(rows_of(Source(str(path)), "train"))


def test_a_json_file_may_be_one_list_or_one_object_per_line(tmp_path: Path) -> None:
    objects: Sequence[dict[str, Any]] = [{"prompt": "a"}, {"prompt": "b"}]
    path = tmp_path / "p.json"
    assert rows(path, json.dumps(objects, indent=1)) == [(f"{path}, row {n}", row) for n, row in enumerate(objects, 1)]
    assert [row for _, row in rows(path, "\n".join(map(json.dumps, objects)))] == objects


def test_a_json_file_that_is_cut_off_or_holds_no_objects_is_refused_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p\.json, line 2: not JSON \(.*column \d+\)\. The file must be one list"):
        rows(tmp_path / "p.json", '[{"prompt": "a"},\n{"prompt"')
    with pytest.raises(DataError, match=r"p\.json, row 2: a JSON str, not an object"):
        rows(tmp_path / "p.json", '[{"prompt": "a"}, "b"]')
