"""Prompt sources: what is read from them, in what order it comes out, and what is refused."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aipo_hpc.errors import DataError
from aipo_hpc.rows import Message, Prompt, read_rows
from aipo_hpc.stages.prompts import HELD_OUT, TRAIN, PromptsConfig, run
from aipo_hpc.task import Input, Task

ROWS = [{"prompt_id": f"p{number}", "prompt": f"Question {number}?"} for number in range(12)]


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(source: Path | str, out: Path, seed: int = 0, **config: Any) -> tuple[list[Prompt], list[Prompt]]:
    """The stage's two files: prompts to train on, prompts held out."""
    out.mkdir()
    settings = PromptsConfig(**{"num_held_out": 3, **config})
    outcome = run(settings, Task("iter-00/prompts", 0, 0, 1, seed, {"source": Input(value=str(source))}, out))
    train, held_out = (list(read_rows([out / name], Prompt)) for name in (TRAIN, HELD_OUT))
    assert outcome.outputs == (TRAIN, HELD_OUT)
    assert outcome.rows == len(train) + len(held_out)
    assert outcome.counts == {"train": len(train), "held_out": len(held_out)}
    return train, held_out


def refusal(source: Path | str, out: Path, **config: Any) -> str:
    with pytest.raises(DataError) as raised:
        prepared(source, out, **config)
    return str(raised.value)


def only(row: dict[str, Any], folder: Path) -> Prompt:
    """The prompt made of one row."""
    train, held_out = prepared(jsonl(folder / "p.jsonl", [row, *ROWS]), folder / "out", num_held_out=1)
    [found] = [prompt for prompt in train + held_out if not prompt.prompt.startswith("Question")]
    return found


def test_every_prompt_is_either_trained_on_or_held_out(tmp_path: Path) -> None:
    train, held_out = prepared(jsonl(tmp_path / "p.jsonl", ROWS), tmp_path / "out")
    assert (len(train), len(held_out)) == (9, 3)
    assert {prompt.prompt_id for prompt in train} | {prompt.prompt_id for prompt in held_out} == {
        row["prompt_id"] for row in ROWS
    }
    assert train[0].messages == [Message("user", train[0].prompt)]


def test_the_order_does_not_depend_on_the_sources_order_but_on_the_seed(tmp_path: Path) -> None:
    one = prepared(jsonl(tmp_path / "a.jsonl", ROWS), tmp_path / "a")
    two = prepared(jsonl(tmp_path / "b.jsonl", ROWS[::-1]), tmp_path / "b")
    other = prepared(jsonl(tmp_path / "c.jsonl", ROWS), tmp_path / "c", seed=1)
    assert one == two
    assert one != other
    assert (tmp_path / "a" / TRAIN).read_bytes() == (tmp_path / "b" / TRAIN).read_bytes()


def test_parquet_and_dataset_folders_give_what_jsonl_gives(tmp_path: Path) -> None:
    import datasets

    expected = prepared(jsonl(tmp_path / "p.jsonl", ROWS), tmp_path / "jsonl")
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "p.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"prefs": saved}).save_to_disk(str(tmp_path / "splits"))
    assert prepared(tmp_path / "p.parquet", tmp_path / "parquet") == expected
    assert prepared(folder, tmp_path / "dataset") == expected
    assert prepared(tmp_path / "saved", tmp_path / "from saved") == expected
    assert prepared(tmp_path / "splits", tmp_path / "from splits", split="prefs") == expected
    message = refusal(tmp_path / "splits", tmp_path / "wrong split", split="train")
    assert message.startswith(f"dataset '{tmp_path / 'splits'}', split 'train' cannot be loaded: ")


def test_a_prompt_without_an_id_is_known_by_its_text(tmp_path: Path) -> None:
    found = only({"prompt": "Why?"}, tmp_path)
    assert found.prompt_id == hashlib.sha256(b"Why?").hexdigest()[:16]


def test_other_columns_can_hold_prompt_and_id(tmp_path: Path) -> None:
    rows = [{"key": number, "instruction": f"Do {number}"} for number in range(6)]
    train, held_out = prepared(
        jsonl(tmp_path / "p.jsonl", rows), tmp_path / "out", prompt_column="instruction", id_column="key"
    )
    assert sorted(prompt.prompt_id for prompt in train + held_out) == ["0", "1", "2", "3", "4", "5"]


def test_the_limit_takes_the_first_prompts_of_the_source(tmp_path: Path) -> None:
    train, held_out = prepared(jsonl(tmp_path / "p.jsonl", ROWS), tmp_path / "out", limit=5)
    assert sorted(prompt.prompt_id for prompt in train + held_out) == ["p0", "p1", "p2", "p3", "p4"]


def test_a_conversation_keeps_its_system_turn_and_ends_with_the_user(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"), ("assistant", "So.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    found = only({"messages": messages}, tmp_path)
    assert found.messages == [Message(role, content) for role, content in turns[:-1]]
    assert found.prompt == "Be brief.\n\nHi\n\nHello\n\nWhy?"


def test_messages_beside_a_prompt_are_the_conversation(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    found = only({"prompt": "Why?", "messages": messages}, tmp_path)
    assert (found.prompt, found.messages) == ("Why?", [Message("user", "Why?")])


def test_lone_surrogates_and_bytes_that_are_no_utf8_become_replacement_characters(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    path.write_bytes(rows + b'{"prompt_id": "s", "prompt": "a \\ud83d b"}\n{"prompt_id": "b", "prompt": "caf\xe9"}\n')
    train, held_out = prepared(path, tmp_path / "out")
    found = {prompt.prompt_id: prompt for prompt in train + held_out}
    assert found["s"].prompt == "a � b"
    assert found["b"].prompt == "caf�"
    assert found["b"].messages == [Message("user", "caf�")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "{path}: no prompts in it. Give a source with at least one row."),
        ("\n\n", "{path}: no prompts in it. Give a source with at least one row."),
        (
            '{"prompt": "a"}\n\n{"prompt": \n',
            "{path}, line 3: not JSON (Expecting value, column 12). Each line must be one JSON object.",
        ),
        ('{"prompt": "a"}\n["b"]\n', "{path}, line 2: a JSON list, not an object with a 'prompt'."),
        (
            '{"text": "a", "id": 1}\n',
            "{path}, line 1: no column 'prompt'; there are ['id', 'text']. "
            "Set data.prompt_column to the one that holds the prompt.",
        ),
        ('{"prompt": 3}\n', "{path}, line 1: column 'prompt' holds int, not text."),
        ('{"prompt": "  "}\n', "{path}, line 1: column 'prompt' is empty. Remove the row."),
        (
            '{"messages": [{"role": "user"}]}\n',
            "{path}, line 1: 'messages' must be a list of {{role, content}}; got [{{'role': 'user'}}].",
        ),
        (
            '{"messages": [{"role": "user", "content": null}]}\n',
            "{path}, line 1: a turn's role and content must be text; got 'user' and None.",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}\n',
            "{path}, line 1: 'messages' has no user turn. Remove the row or add the user's message.",
        ),
        (
            '{"prompt_id": "x", "prompt": "a"}\n{"prompt_id": "x", "prompt": "b"}\n',
            "{path}: row 2 repeats prompt_id 'x' (prompt 'b'). Ids must be unique: mend the file, or remove the id "
            "column and identical prompts.",
        ),
        (
            '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n',
            "{path}: 3 prompts, of which data.num_held_out=3 are kept for evaluation: none is left to train on. "
            "Lower data.num_held_out or give more prompts.",
        ),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_with_the_place_and_what_to_do(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    assert refusal(path, tmp_path / "out") == message.format(path=path)


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    path.write_text("not at all")
    message = refusal(path, tmp_path / "out")
    assert message.startswith(f"{path}: not a readable Parquet file (")
    assert message.endswith("). Write it again.")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Why?\n")
    assert refusal(path, tmp_path / "out") == (
        f"{path}: not a .jsonl, .json or .parquet file. Give one of these, or a Hugging Face dataset id."
    )


@pytest.mark.parametrize("name", ["missing.jsonl", "folder/missing", "./missing"])
def test_a_path_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    source = name if name.startswith(".") else str(tmp_path / name)
    assert refusal(source, tmp_path / "out") == (
        f"{source}: no such file. Give the path of a .jsonl, .json or .parquet file, or a Hugging Face dataset id."
    )


def test_a_dataset_id_with_a_dot_is_looked_up_and_not_taken_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def load(source: str, split: str, revision: str | None, num_proc: int) -> list[dict[str, Any]]:
        assert (source, split, revision, num_proc) == ("somebody/prompts-v0.1", "train", None, 1)
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(prepared("somebody/prompts-v0.1", tmp_path / "out")[0]) == 9


def test_several_sources_are_mixed_by_their_parts_and_the_same_prompt_is_kept_once(tmp_path: Path) -> None:
    one = [{"prompt": f"One {number}?"} for number in range(10)]
    two = [{"conversations": [{"from": "human", "value": f"Two {number}?"}]} for number in range(10)] + one[:2]
    (tmp_path / "two.json").write_text(json.dumps(two))
    jsonl(tmp_path / "one.jsonl", one)

    def mixed(out: str, part: str) -> tuple[list[str], dict[str, float]]:
        (tmp_path / out).mkdir()
        inputs = {
            "source": Input(value=f"{tmp_path / 'one.jsonl'}{part}"),
            "source.01": Input(value=str(tmp_path / "two.json")),
        }
        outcome = run(PromptsConfig(num_held_out=1), Task("iter-00/prompts", 0, 0, 1, 0, inputs, tmp_path / out))
        found = read_rows([tmp_path / out / TRAIN, tmp_path / out / HELD_OUT], Prompt)
        return sorted(prompt.prompt for prompt in found), dict(outcome.counts)

    everything, counts = mixed("all", "")
    assert len(everything) == 20 and counts == {"train": 19, "held_out": 1, "repeated": 2}
    half, _ = mixed("half", ":0.5")
    ones = {text for text in half if text.startswith("One")}
    assert 5 <= len(ones) <= 7 and {"One 0?", "One 1?"} <= ones
    assert mixed("again", ":0.5")[0] == half


def test_two_sources_that_give_one_id_to_two_prompts_are_refused(tmp_path: Path) -> None:
    inputs = {}
    for number, name in enumerate(("source", "source.01")):
        path = jsonl(tmp_path / f"{number}.jsonl", [{"prompt_id": "x", "prompt": f"Question {number}?"}])
        inputs[name] = Input(value=str(path))
    with pytest.raises(DataError, match=r"1\.jsonl: has another prompt with the id 'x' than a source before it"):
        run(PromptsConfig(num_held_out=0), Task("iter-00/prompts", 0, 0, 1, 0, inputs, tmp_path))


def test_rows_that_cannot_be_used_are_left_out_and_counted_if_the_recipe_says_so(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": " "}, {"conversations": [{"from": "gpt", "value": "Hello."}]}]
    assert "is empty" in refusal(jsonl(tmp_path / "p.jsonl", rows), tmp_path / "strict")
    (tmp_path / "out").mkdir()
    inputs = {"source": Input(value=str(tmp_path / "p.jsonl"))}
    outcome = run(PromptsConfig(num_held_out=2, skip_unusable=True), Task("p", 0, 0, 1, 0, inputs, tmp_path / "out"))
    assert dict(outcome.counts) == {"train": 10, "held_out": 2, "unusable": 2}
