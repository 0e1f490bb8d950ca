"""Rows between stages: what is written is read, same rows same bytes, odd text survives."""

import math
from pathlib import Path
from typing import Any

import pytest

from aipo_hpc.rows import (
    Candidate,
    Message,
    Pair,
    Prompt,
    Ranked,
    Responses,
    TrainRow,
    Verdict,
    from_plain,
    read_rows,
    schema,
    to_plain,
    write_rows,
)

TALK = [Message("system", "be kind"), Message("user", "a: data: None\n\t\0")]
GOOD, BAD = Candidate("yes", "stop", 2), Candidate("", "length", 0)
ROWS = [
    Prompt("p", "None", TALK),
    Responses("p", "prompt", TALK, [GOOD, BAD]),
    Responses("p", "prompt", [], [], "too long"),
    Ranked("p", "prompt", TALK, [GOOD, BAD], [0.1 + 0.2, -1e300], [1, 2], [False, True]),
    Ranked("p", "prompt", TALK, [], [], [], [], "no candidates"),
    Pair("p", "prompt", TALK, GOOD, BAD, 1.5, -0.5),
    TrainRow("p", [1, 2], [3], [2**40], -1.25, -2.5, -1.25, -2.0),
    Verdict("p", "prompt", "new", "old", 0.25, 0.5, 3, 3),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_what_is_written_is_read(tmp_path: Path, row: Any) -> None:
    write_rows(tmp_path / "rows.parquet", [row, row], type(row))
    assert list(read_rows([tmp_path / "rows.parquet"], type(row))) == [row, row]
    assert from_plain(to_plain(row), type(row)) == row


@pytest.mark.parametrize("kind", sorted({type(row) for row in ROWS}, key=lambda kind: kind.__name__))
def test_no_rows_give_a_valid_empty_file(tmp_path: Path, kind: type[Any]) -> None:
    write_rows(tmp_path / "rows.parquet", [], kind)
    assert list(read_rows([tmp_path / "rows.parquet"], kind)) == []


def test_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_rows(tmp_path / name, [ROWS[1]] * 50, Responses)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_only_the_error_may_be_missing() -> None:
    assert [field.name for field in schema(Responses) if field.nullable] == ["error"]


def test_files_are_read_in_the_given_order_a_batch_at_a_time(tmp_path: Path) -> None:
    for name, start in (("one", 0), ("two", 3000)):
        rows = [Prompt(str(number), "", []) for number in range(start, start + 3000)]
        write_rows(tmp_path / name, rows, Prompt)
    read = [row.prompt_id for row in read_rows([tmp_path / "two", tmp_path / "one"], Prompt)]
    assert read == [str(number) for number in (*range(3000, 6000), *range(3000))]


def test_lone_surrogates_are_replaced_one_by_one_and_all_else_is_kept() -> None:
    plain = to_plain(Prompt("p", "\ud800\udfff\N{GRINNING FACE}é", []))
    assert plain["prompt"] == "\N{REPLACEMENT CHARACTER}" * 2 + "\N{GRINNING FACE}é"


def test_scores_that_are_no_numbers_survive(tmp_path: Path) -> None:
    row = Ranked("p", "", [], [GOOD], [math.nan], [1], [False])
    write_rows(tmp_path / "rows.parquet", [row], Ranked)
    (read,) = read_rows([tmp_path / "rows.parquet"], Ranked)
    assert math.isnan(read.scores[0])


def test_a_plain_row_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="colour"):
        from_plain({**to_plain(ROWS[0]), "colour": "blue"}, Prompt)
