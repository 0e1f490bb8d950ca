"""Stages whose worker a prompt kills, or that are asked to leave: what they ask for, attempt by attempt."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import test_benchmark_stage
import test_evaluate_stage
import test_instruct_stage
from pairrm_checkpoint import Checkpoint
from test_benchmark_stage import questions  # noqa: F401
from training_tasks import pair, reference_task

from aipo_hpc import engines, leaving
from aipo_hpc.engines import Completion, Request
from aipo_hpc.progress import PROGRESS, ROWS
from aipo_hpc.rankers.pairrm import PairRM
from aipo_hpc.rows import Call, TrainRow, read_rows
from aipo_hpc.sampling import in_batches, sample
from aipo_hpc.stages import benchmark, evaluate, instruct, reference
from aipo_hpc.suspects import ALONE, Suspects
from aipo_hpc.task import Outcome, Task

REASON = Suspects.reason


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "_asked", leaving.NOT_ASKED)


class Killed(BaseException):
    """A worker's death, as far as a stage can tell."""


class Poisoned:
    """An engine that takes ``size`` prompts at once and dies of one of them before any of those is finished."""

    def __init__(self, poison: str, size: int, say: Callable[[Request], str]) -> None:
        self.batches: list[list[str]] = []
        self._poison, self._size, self._say = poison, size, say

    def generate(self, requests: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        waiting = iter(requests)
        while prompts := list(islice(waiting, self._size)):
            self.batches.append([each.prompt_id for [each] in prompts])
            if self._poison in self.batches[-1]:
                raise Killed
            for [request] in prompts:
                yield Completion(request, self._say(request), "stop", 3)


def until_done(run: Callable[[Task], Outcome], make: Callable[[str], Task]) -> tuple[Outcome, Task, int]:
    """Attempts, each after the deaths of those before it, until one comes to its end; and the number of deaths."""
    dead: tuple[Path, ...] = ()
    while True:
        assert len(dead) <= 8, "the shard would have been given up"
        made = replace(make(f"attempt-{len(dead)}"), earlier=dead, deaths=dead)
        try:
            return run(made), made, len(dead)
        except Killed:
            dead = (*dead, made.out)


# -- the batches ---------------------------------------------------------------------------------------------------------


def asked(folder: Path, size: int, engine: Any, finished: set[str] | None = None) -> list[str]:
    """What ``sample`` gives of nine prompts."""
    names = [f"p{number}" for number in range(9)]
    requests = {name: [Request(name, 0, (1,), 0)] for name in names}
    made = Task("iter-00/generate", 0, 0, 1, 0, {}, folder)
    done = set() if finished is None else finished
    found = []
    suspects = Suspects(made)
    rounds = suspects.rounds(in_batches(names, size), done)
    for completion in sample(rounds, size, requests, done, suspects, lambda: engine, "here"):
        found.append(completion.request.prompt_id)
        done.add(found[-1])
    return found


def test_a_batch_with_an_unfinished_prompt_is_asked_for_as_a_whole(tmp_path: Path) -> None:
    engine = Poisoned("", 3, str)
    asked(tmp_path, 3, engine, {"p0", "p1", "p2", "p4"})
    assert engine.batches == [["p3", "p4", "p5"], ["p6", "p7", "p8"]]


def test_an_engine_that_batches_by_itself_is_asked_for_what_is_not_finished(tmp_path: Path) -> None:
    engine = Poisoned("", 4, str)
    asked(tmp_path, 1, engine, {"p0", "p1", "p2", "p4"})
    assert engine.batches == [["p3", "p5", "p6", "p7"], ["p8"]]


def test_the_engine_is_not_loaded_for_nothing(tmp_path: Path) -> None:
    assert asked(tmp_path, 3, None, {f"p{number}" for number in range(9)}) == []


class Asking(Poisoned):
    """Is asked to leave just as it takes a prompt."""

    def generate(self, requests: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        def taken() -> Iterator[Sequence[Request]]:
            for prompt in requests:
                if prompt[0].prompt_id == "p3":
                    leaving.ask(leaving.STOP)
                yield prompt

        return super().generate(taken())


@pytest.mark.parametrize(("size", "last"), [(3, "p5"), (1, "p3")])
def test_a_wish_to_leave_cuts_no_batch_in_two(tmp_path: Path, size: int, last: str) -> None:
    """What is sampled together decides how floating-point numbers are rounded, so a part of a batch would differ."""
    done: set[str] = set()
    with pytest.raises(leaving.Left, match="here"):
        asked(tmp_path, size, Asking("", size, str), done)
    assert sorted(done) == [f"p{number}" for number in range(int(last[1]) + 1)]


def test_a_wish_that_comes_with_the_last_prompt_does_not_undo_a_finished_shard(tmp_path: Path) -> None:
    class Late(Poisoned):
        def generate(self, requests: Iterable[Sequence[Request]]) -> Iterator[Completion]:
            yield from super().generate(requests)
            if self.batches[-1][-1] == "p8":
                leaving.ask(leaving.STOP)

    assert len(asked(tmp_path, 3, Late("", 3, str))) == 9


# -- the stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("transformers", 3), ("vllm", 4)])
def test_a_call_of_self_instruct_that_kills_its_worker_is_set_aside_and_the_shard_makes_its_share(
    name: str, size: int, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = "00-00000-000004"
    config = replace(test_instruct_stage.CONFIG, engine=name)

    def with_engine(engine: Any) -> Callable[[Task], Outcome]:
        monkeypatch.setattr(instruct, "load_engine", lambda config, model: engine)
        return lambda made: instruct.run(config, made)

    killing = Poisoned(poison, size, test_instruct_stage.tasks_by_seed)
    outcome, made, deaths = until_done(
        with_engine(killing), lambda attempt: test_instruct_stage.task(tmp_path / attempt, tiny_model)
    )
    errors = {row.call_id: row.error for row in read_rows([made.out / ROWS], Call) if row.error is not None}
    assert errors == {poison: REASON}
    assert (outcome.rows, outcome.counts["errors"], outcome.counts["set_aside"]) == (20, 1, 1)

    def refuse(request: Request) -> str:
        return " - nothing" if request.prompt_id == poison else test_instruct_stage.tasks_by_seed(request)

    other = test_instruct_stage.task(tmp_path / "other", tiny_model)
    with_engine(Poisoned("", size, refuse))(other)
    assert test_instruct_stage.new(made) == test_instruct_stage.new(other), "the prompts of all other calls"
    print(f"{name}: {deaths} deaths until the call was found among those in flight")


@pytest.mark.parametrize(("name", "size"), [("transformers", 2), ("vllm", 4)])
def test_a_question_that_kills_its_worker_is_set_aside_and_the_others_are_answered_in_all_turns(
    name: str,
    size: int,
    questions: Path,  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_engine(poison: str) -> Callable[[Task], Outcome]:
        engine = Poisoned(poison, size, lambda request: f" {request.prompt_id} ")
        monkeypatch.setattr(engines, "load_engine", lambda config, model: engine)
        return lambda made: benchmark.run(replace(test_benchmark_stage.CONFIG, engine=name), made)

    def task(attempt: str) -> Task:
        return test_benchmark_stage.task(tmp_path / attempt, questions, tiny_model)

    whole = task("whole")
    with_engine("")(whole)
    for poison, lost in (("81/0", ["81/0", "81/1"]), ("83/1", ["83/1"])):
        outcome, made, deaths = until_done(with_engine(poison), lambda attempt, of=poison[:2]: task(f"{of}-{attempt}"))
        found, expected = test_benchmark_stage.rows(made), test_benchmark_stage.rows(whole)
        assert [found[each].error for each in lost] == [REASON, f"turn 1 has no answer: {REASON}"][: len(lost)]
        assert {each: row for each, row in found.items() if each not in lost} == {
            each: row for each, row in expected.items() if each not in lost
        }
        assert (outcome.counts["set_aside"], outcome.counts["errors"]) == (1, len(lost))
        print(f"{name}: {deaths} deaths until {poison} was found")


ANSWERS = (["yes", "no", "so", "why", "one red fish"], ["no", "the moon", "yes", "so", "rain"])


def judged(folder: Path, ranker_checkpoint: Checkpoint) -> Task:
    return test_evaluate_stage.task(folder, *ANSWERS, ranker_checkpoint.pairrm)


def test_a_held_out_prompt_that_kills_the_judge_is_not_judged_and_counted(
    ranker_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PairRM, "prompts_per_call", 2)
    rank = PairRM.rank

    def die(self: PairRM, rows: Any) -> Any:
        if any(row.prompt_id == "p2" for row in rows):
            raise Killed
        return rank(self, rows)

    whole = judged(tmp_path / "whole", ranker_checkpoint)
    evaluate.run(test_evaluate_stage.CONFIG, whole)
    monkeypatch.setattr(PairRM, "rank", die)
    outcome, made, deaths = until_done(
        lambda made: evaluate.run(test_evaluate_stage.CONFIG, made),
        lambda attempt: judged(tmp_path / attempt, ranker_checkpoint),
    )
    found, expected = (test_evaluate_stage.verdicts(each) for each in (made, whole))
    assert [(row.prompt_id, row.win) for row in found] == [
        (row.prompt_id, row.win) for row in expected if row.prompt_id != "p2"
    ]
    assert (outcome.rows, outcome.counts["not_judged"], outcome.counts["set_aside"]) == (4, 1, 1)
    print(f"evaluate: {deaths} deaths until the prompt was found")


def test_judging_that_is_asked_to_leave_keeps_its_verdicts_and_is_continued_to_the_same_bytes(
    ranker_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PairRM, "prompts_per_call", 2)
    seen: list[str] = []
    rank = PairRM.rank

    def noting(self: PairRM, rows: Any) -> Any:
        seen.extend(row.prompt_id for row in rows)
        if len(seen) == 4:
            leaving.ask(leaving.STOP)
        return rank(self, rows)

    whole = judged(tmp_path / "whole", ranker_checkpoint)
    expected = evaluate.run(test_evaluate_stage.CONFIG, whole)
    monkeypatch.setattr(PairRM, "rank", noting)
    first = judged(tmp_path / "first", ranker_checkpoint)
    with pytest.raises(leaving.Left, match="iter-00/evaluate shard 0"):
        evaluate.run(test_evaluate_stage.CONFIG, first)
    assert len((first.out / PROGRESS).read_text().splitlines()) == 4
    monkeypatch.setattr(leaving, "_asked", leaving.NOT_ASKED)
    second = replace(judged(tmp_path / "second", ranker_checkpoint), earlier=(first.out,))
    outcome = evaluate.run(test_evaluate_stage.CONFIG, second)
    assert seen == ["p0", "p1", "p2", "p3", "p4"], "nothing was judged twice"
    assert outcome == expected
    assert all((second.out / each).read_bytes() == (whole.out / each).read_bytes() for each in outcome.outputs)


def test_a_pair_that_kills_its_worker_is_found_beside_one_that_cannot_be_scored(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [pair(number) for number in range(8)]
    config = reference.ReferenceConfig(dtype="float32", tokens_per_batch=10_000)
    forward = reference._forward

    def die(model: Any, rows: Sequence[TrainRow]) -> Iterator[TrainRow]:
        if any(row.prompt_id == pairs[3].prompt_id for row in rows):
            raise Killed
        for row in forward(model, rows):
            yield replace(row, ref_chosen_logps=math.nan) if row.prompt_id == pairs[5].prompt_id else row

    monkeypatch.setattr(reference, "_forward", die)
    outcome, made, deaths = until_done(
        lambda made: reference.run(config, made), lambda attempt: reference_task(tmp_path / attempt, pairs, tiny_model)
    )
    print(f"reference: {deaths} deaths until the pair was found among {len(pairs)}")
    assert (outcome.counts["pairs"], outcome.counts["errors"], outcome.counts["set_aside"]) == (6, 2, 1)
    errors = {row.prompt_id: row.error for row in read_rows([made.out / "rows.parquet"], TrainRow)}
    assert errors[pairs[3].prompt_id] == REASON and "log-probabilities nan" in str(errors[pairs[5].prompt_id])
    assert deaths >= ALONE
