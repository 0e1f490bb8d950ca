"""Work kept inside a shard: what a killed attempt leaves, the next one takes over, and the result is the same."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from aipo_hpc.progress import PROGRESS, Progress
from aipo_hpc.rows import Candidate, Message, Responses, read_rows
from aipo_hpc.task import Task

IDS = [f"p{number}" for number in range(12)]


def row(prompt_id: str, text: str = "") -> Responses:
    prompt = f"What is {prompt_id}?\u2028 \N{GRINNING FACE}"
    candidates = [Candidate(text or f"It is {prompt_id} \r\n", "stop", 3), Candidate("", "length", 0)]
    return Responses(prompt_id, prompt, [Message("user", prompt)], candidates)


def task(folder: Path, attempt: str, earlier: Sequence[str] = ()) -> Task:
    (folder / attempt).mkdir(exist_ok=True)
    return Task("iter-00/generate", 0, 0, 1, 7, {}, folder / attempt, tuple(folder / name for name in earlier))


def work(job: Task, ids: Sequence[str]) -> int:
    """Finish these prompts; returns how many had been finished before."""
    with Progress(job, Responses) as progress:
        for prompt_id in ids:
            if prompt_id not in progress:
                progress.append(row(prompt_id))
        return progress.num_taken_over


def final(job: Task) -> bytes:
    with Progress(job, Responses) as progress:
        for prompt_id in IDS:
            if prompt_id not in progress:
                progress.append(row(prompt_id))
        (name,) = progress.finish(IDS)
    return (job.out / name).read_bytes()


def test_rows_come_out_in_the_shards_order_whatever_the_order_of_finishing(tmp_path: Path) -> None:
    with Progress(task(tmp_path, "one"), Responses) as progress:
        for prompt_id in reversed(IDS):
            progress.append(row(prompt_id))
        (name,) = progress.finish(IDS)
        assert list(progress.rows(IDS[:3])) == [row(prompt_id) for prompt_id in IDS[:3]]
    assert list(read_rows([tmp_path / "one" / name], Responses)) == [row(prompt_id) for prompt_id in IDS]


def test_the_next_attempt_takes_over_what_was_finished(tmp_path: Path) -> None:
    work(task(tmp_path, "one"), IDS[:5])
    assert work(task(tmp_path, "two", ["one"]), IDS) == 5


def test_a_torn_last_line_costs_one_row(tmp_path: Path) -> None:
    work(task(tmp_path, "one"), IDS[:5])
    path = tmp_path / "one" / PROGRESS
    path.write_bytes(path.read_bytes()[:-30])
    assert work(task(tmp_path, "two", ["one"]), IDS) == 4


def test_a_line_torn_inside_a_character_costs_one_row(tmp_path: Path) -> None:
    work(task(tmp_path, "one"), IDS[:5])
    path = tmp_path / "one" / PROGRESS
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex("\N{GRINNING FACE}".encode()) + 2])
    assert work(task(tmp_path, "two", ["one"]), IDS) == 4


def test_a_whole_last_line_without_its_newline_is_not_believed(tmp_path: Path) -> None:
    work(task(tmp_path, "one"), IDS[:5])
    path = tmp_path / "one" / PROGRESS
    path.write_bytes(path.read_bytes()[:-1])
    assert work(task(tmp_path, "two", ["one"]), IDS) == 4


@pytest.mark.parametrize("line", ["{", "7", "null", '"text"', "[]", "{}", '{"prompt_id": "p1"}', '{"messages": 3}'])
def test_a_line_that_is_no_row_is_skipped(tmp_path: Path, line: str) -> None:
    work(task(tmp_path, "one"), IDS[:2])
    path = tmp_path / "one" / PROGRESS
    path.write_text(line + "\n" + path.read_text())
    assert work(task(tmp_path, "two", ["one"]), IDS) == 2


def test_two_earlier_attempts_add_up_and_the_first_finished_row_wins(tmp_path: Path) -> None:
    with Progress(task(tmp_path, "one"), Responses) as progress:
        progress.append(row("p0", "from one"))
    with Progress(task(tmp_path, "two"), Responses) as progress:
        progress.append(row("p0", "from two"))
        progress.append(row("p1", "from two"))
    with Progress(task(tmp_path, "three", ["one", "two"]), Responses) as progress:
        assert progress.num_taken_over == 2
        texts = [found.candidates[0].response for found in progress.rows(["p0", "p1"])]
    assert texts == ["from one", "from two"]


def test_an_attempt_begun_again_under_its_own_name_keeps_its_rows_and_glues_nothing(tmp_path: Path) -> None:
    work(task(tmp_path, "one"), IDS[:5])
    path = tmp_path / "one" / PROGRESS
    path.write_bytes(path.read_bytes()[:-30])
    assert work(task(tmp_path, "one"), IDS[:8]) == 4
    assert work(task(tmp_path, "two", ["one"]), IDS) == 8


def test_an_earlier_attempt_without_progress_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    assert work(task(tmp_path, "two", ["one", "never-made"]), IDS) == 0


def test_the_final_bytes_are_the_same_however_often_the_work_was_interrupted(tmp_path: Path) -> None:
    undisturbed = final(task(tmp_path, "undisturbed"))
    draw = random.Random(5)
    for trial in range(10):
        folder = tmp_path / str(trial)
        folder.mkdir()
        names: list[str] = []
        for number in range(draw.randrange(1, 5)):
            work(task(folder, f"a{number}", names), draw.sample(IDS, draw.randrange(len(IDS))))
            path = folder / f"a{number}" / PROGRESS
            path.write_bytes(path.read_bytes()[: -draw.randrange(1, 60)])
            names.append(f"a{number}")
        assert final(task(folder, "last", names)) == undisturbed


def test_a_lone_surrogate_becomes_a_replacement_character_interrupted_or_not(tmp_path: Path) -> None:
    odd = row("p0", "half \ud83d of a pair")
    with Progress(task(tmp_path, "one"), Responses) as progress:
        progress.append(odd)
        progress.finish(["p0"])
    with Progress(task(tmp_path, "two", ["one"]), Responses) as progress:
        progress.finish(["p0"])
    (found,) = read_rows([tmp_path / "two" / "rows.parquet"], Responses)
    assert found.candidates[0].response == "half \N{REPLACEMENT CHARACTER} of a pair"
    assert (tmp_path / "one" / "rows.parquet").read_bytes() == (tmp_path / "two" / "rows.parquet").read_bytes()


def test_a_finished_row_is_readable_by_others_while_the_attempt_runs(tmp_path: Path) -> None:
    with Progress(task(tmp_path, "one"), Responses) as progress:
        progress._synced -= 10
        progress.append(row("p0"))
        (line,) = (tmp_path / "one" / PROGRESS).read_text(encoding="utf-8").splitlines(keepends=True)[:1]
    assert json.loads((tmp_path / "one" / PROGRESS).read_bytes().split(b"\n")[0])["prompt_id"] == "p0"
    assert line


def test_a_prompt_that_was_never_finished_is_a_loud_error(tmp_path: Path) -> None:
    with Progress(task(tmp_path, "one"), Responses) as progress, pytest.raises(KeyError, match="p3"):
        progress.finish(["p3"])
