"""Benchmarks: their questions as published, and answer files exactly as their own tools read them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from aipo_hpc.benchmarks import (
    BENCHMARKS,
    Answer,
    BenchmarkConfig,
    check_benchmarks,
    load_benchmark,
    mt_bench,
    read_questions,
)
from aipo_hpc.errors import DataError, RecipeError

ALPACA = {"instruction": "Why is the sky blue?", "output": "theirs", "generator": "davinci", "dataset": "helpful_base"}
MT = {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Shorter."], "reference": ["a", "b"]}
ARENA_2024 = {"question_id": "a1", "category": "arena-hard-v0.1", "cluster": "c", "turns": [{"content": "Prove it."}]}
ARENA_2025 = {"uid": "a1", "category": "arena-hard-v0.1", "cluster": "c", "prompt": "Prove it."}


def written(name: str, row: Mapping[str, Any], *turns: str) -> Any:
    """What the tool finds for one question."""
    benchmark = load_benchmark(name)
    answer = Answer(benchmark.question(row), turns, tuple(7 for _ in turns))
    return json.loads(benchmark.render([answer], "mine", 12.5))


def test_alpaca_eval_reads_a_list_of_instruction_output_generator_and_dataset():
    (row,) = written("alpaca_eval", ALPACA, "Because.")
    assert row == {
        "instruction": "Why is the sky blue?", "output": "Because.", "generator": "mine", "dataset": "helpful_base",
    }  # fmt: skip
    assert load_benchmark("alpaca_eval").answer_file("mine") == "alpaca_eval/results/mine/model_outputs.json"


def test_fastchat_reads_a_line_with_choices_and_turns():
    row = written("mt_bench", MT, "A poem", "Po")
    assert len(row.pop("answer_id")) == 22
    assert row == {
        "question_id": 81, "model_id": "mine", "choices": [{"index": 0, "turns": ["A poem", "Po"]}], "tstamp": 12.5,
    }  # fmt: skip
    assert load_benchmark("mt_bench").answer_file("mine") == "mt_bench/model_answer/mine.jsonl"


def test_arena_hard_reads_choices_with_contents_where_its_questions_have_turns():
    row = written("arena_hard", ARENA_2024, "QED")
    assert len(row.pop("answer_id")) == 22
    turn = {"content": "QED", "token_len": 7}
    assert row == {
        "question_id": "a1", "model_id": "mine", "choices": [{"index": 0, "turns": [turn]}], "tstamp": 12.5,
    }  # fmt: skip
    assert load_benchmark("arena_hard").answer_file("mine") == "arena-hard-v0.1/model_answer/mine.jsonl"


def test_arena_hard_reads_messages_where_its_questions_have_a_uid():
    row = written("arena_hard", ARENA_2025, "QED")
    assert len(row.pop("ans_id")) == 22
    assert row["messages"][-1]["content"]["answer"] == "QED"  # what its gen_judgment.py takes
    assert row == {
        "uid": "a1", "model": "mine", "tstamp": 12.5, "metadata": {"token_len": 7},
        "messages": [{"role": "user", "content": "Prove it."}, {"role": "assistant", "content": {"answer": "QED"}}],
    }  # fmt: skip


def test_files_are_in_the_order_in_which_the_tools_sort_them():
    rows = [{**MT, "question_id": number} for number in (100, 9, 81)]
    answers = [Answer(mt_bench.question(row), ("a", "b"), (1, 1)) for row in rows]
    lines = [json.loads(line) for line in mt_bench.render(answers, "mine", 0.0).splitlines()]
    assert [line["question_id"] for line in lines] == [9, 81, 100]
    assert len({line["answer_id"] for line in lines}) == 3


def test_mt_bench_is_sampled_at_the_temperature_of_the_category_as_fastchat_does():
    asked = {
        name: mt_bench.question({**MT, "category": name}).temperature for name in (*mt_bench.TEMPERATURES, "other")
    }
    assert asked == {
        "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
        "humanities": 0.1, "other": 0.7,
    }  # fmt: skip


def test_questions_are_read_from_a_list_and_from_lines(tmp_path: Path):
    rows = [ALPACA, {**ALPACA, "instruction": "Line\u2028separators are text"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows))
    one, other = (read_questions("alpaca_eval", tmp_path / name) for name in ("list.json", "lines.jsonl"))
    assert one == other and [question.turns[0] for question in one] == [row["instruction"] for row in rows]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is none in it"),
        (json.dumps(MT) + "\n" + json.dumps(MT), "'81' is asked twice"),
        (json.dumps(MT) + '\n{"uid": 1}', "number 2: not in the form that mt_bench publishes .KeyError: 'turns'"),
        (json.dumps({**MT, "turns": []}), "number 1: .*'turns' is not a list of texts"),
        ("{", "number 1: not in the form"),
        ("[1]", "number 1: not in the form"),
    ],
)
def test_a_file_that_is_not_the_benchmarks_is_refused_with_the_number_of_the_row(tmp_path: Path, text: str, said: str):
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=f"questions of mt_bench, {path}.*{said}"):
        read_questions("mt_bench", path)


def test_missing_questions_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot be read .*Give the path"):
        read_questions("mt_bench", tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BenchmarkConfig("mtbench", "q"), "Did you mean 'mt_bench'"),
        (BenchmarkConfig("mt_bench", ""), "questions is not set"),
        (BenchmarkConfig("mt_bench", "q", num_shards=0), "num_shards=0 must be at least 1"),
        (BenchmarkConfig("mt_bench", "q", max_tokens=0), "max_tokens=0 must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: BenchmarkConfig, said: str):
    with pytest.raises(RecipeError, match=said):
        check_benchmarks([config])


def test_a_benchmark_named_twice_is_refused():
    with pytest.raises(RecipeError, match="named twice"):
        check_benchmarks([BenchmarkConfig("mt_bench", "q")] * 2)


def test_every_benchmark_has_what_is_asked_of_it():
    for name in BENCHMARKS:
        benchmark = load_benchmark(name)
        assert benchmark.SAMPLING.max_tokens in (1024, 2048, 4096) and "m" in benchmark.answer_file("m")
