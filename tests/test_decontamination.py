"""Benchmark prompts kept out of training, against overlaps counted by hand."""

import json
from pathlib import Path

import pytest

from aipo_hpc.decontamination import Benchmarks, Match, benchmark_texts
from aipo_hpc.errors import DataError
from aipo_hpc.rows import KeptOut, read_rows
from aipo_hpc.stages import kept_out
from aipo_hpc.task import Input, Task

TEN = "one two three four five six seven eight nine ten"


def test_the_overlap_is_the_share_of_the_benchmark_prompts_words_that_shared_ngrams_cover() -> None:
    known = Benchmarks({"row 1": TEN}, ngram=3, overlap=0.3)
    assert known.match(f"please: {TEN}!") == Match("row 1", 1.0)
    # Words 1 to 3 and 6 to 8 of ten, in rows of three; "ten" alone is no row of three.
    assert known.match("one two three, then six seven eight, then ten") == Match("row 1", 0.6)
    assert known.match("Two THREE, four") == Match("row 1", 0.3), "case and punctuation do not count"
    assert known.match("one two four five seven eight") is None, "no three of them are in a row"


def test_overlapping_ngrams_count_each_word_once() -> None:
    # Rows 1-3, 2-4 and 3-5 cover five words.
    assert Benchmarks({"row 1": TEN}, 3, 0.5).match("one two three four five") == Match("row 1", 0.5)
    assert Benchmarks({"row 1": TEN}, 3, 0.51).match("one two three four five") is None


def test_a_benchmark_prompt_shorter_than_an_ngram_counts_as_the_whole_text_only() -> None:
    known = Benchmarks({"row 1": "Who are you?"}, ngram=8)
    assert known.match("who are you") == Match("row 1", 1.0)
    assert known.match("who are you and what do you want") is None


def test_the_benchmark_prompt_that_is_there_most_is_named_of_equals_the_first() -> None:
    known = Benchmarks({"a": "x y z u v w", "b": "x y z", "c": "x y z"}, ngram=3, overlap=0.5)
    assert known.match("x y z") == Match("b", 1.0)


def test_a_text_or_benchmark_without_words_matches_nothing() -> None:
    assert Benchmarks({"row 1": "..."}, 3).match("...") is None
    assert Benchmarks({}, 3).match("anything") is None


def test_every_turn_of_a_benchmark_is_a_prompt_and_known_columns_are_read() -> None:
    rows = [
        {"turns": ["first", "second"]},
        {"messages": [{"role": "user", "content": "asked"}]},
        {"instruction": "told", "text": "ignored"},
    ]
    found = list(benchmark_texts([(f"line {number}", row) for number, row in enumerate(rows)], "b.jsonl"))
    assert found == [
        ("b.jsonl row 1 turn 1", "first"),
        ("b.jsonl row 1 turn 2", "second"),
        ("b.jsonl row 2", "asked"),
        ("b.jsonl row 3", "told"),
    ]


def task(folder: Path, *sources: Path) -> Task:
    folder.mkdir(exist_ok=True)
    inputs = {f"source.{number:02d}": Input(value=str(path)) for number, path in enumerate(sources)}
    return Task("iter-00/kept_out", 0, 0, 1, 7, inputs, folder)


def test_files_of_benchmarks_become_one_list(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "b"}) + "\n")
    (tmp_path / "two.jsonl").write_text(json.dumps({"turns": ["c", "d"]}) + "\n")
    work = task(tmp_path / "out", tmp_path / "one.jsonl", tmp_path / "two.jsonl")
    outcome = kept_out.run(kept_out.KeptOutConfig(), work)
    assert outcome.counts == {"prompts": 4, "lists": 2}
    assert list(read_rows([work.out / kept_out.KEPT_OUT], KeptOut)) == [
        KeptOut("one.jsonl row 1", "a"),
        KeptOut("one.jsonl row 2", "b"),
        KeptOut("two.jsonl row 1 turn 1", "c"),
        KeptOut("two.jsonl row 1 turn 2", "d"),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no prompts in it"),
        ('{"answer": "a"}\n', "line 1: no prompt in it; a row of a benchmark has one of prompt, instruction"),
        ('{"turns": ["a", null]}\n', "line 1: no prompt in it"),
        ("{\n", "line 1: not JSON"),
        (None, "no such file"),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_refused_with_its_line(
    content: str | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "benchmark.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=words) as raised:
        kept_out.run(kept_out.KeptOutConfig(), task(tmp_path / "out", path))
    assert str(path) in str(raised.value)
