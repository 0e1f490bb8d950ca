"""Stages whose shard two attempts do together: generate with both engines, rank and reference; the same bytes as by one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_generate_stage
import test_rank_stage
from fakes import chain, write_run
from pairrm_checkpoint import Checkpoint
from test_generate_stage import CONFIG, prompts
from test_rank_stage import responses
from training_tasks import pair, reference_task

from aipo_hpc import engines
from aipo_hpc.claims import Claims, NothingLeft, left
from aipo_hpc.engines import Completion, Request
from aipo_hpc.progress import ROWS
from aipo_hpc.rankers.pairrm import PairRM
from aipo_hpc.rows import Candidate, TrainRow, read_rows
from aipo_hpc.sentinel import Failure
from aipo_hpc.stages import generate, rank, reference
from aipo_hpc.stages.rank import RankConfig
from aipo_hpc.stages.reference import ReferenceConfig
from aipo_hpc.store import JobFolder
from aipo_hpc.task import Task

OWN, EXTRA = "aipo-cafe-1.0.r0", "aipo-cafe-2.0.r0"


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return write_run(tmp_path / "run", chain(1)).job("iter-00/a")


def attempt(folder: JobFolder, made: Task, name: str, extra: bool) -> Task:
    """The task as an attempt that shares its shard."""
    out, earlier = folder.begin_attempt(0, name)
    return replace(made, out=out, earlier=earlier, claims=Claims(folder, 0, name, "none", extra))


def join_after(number: int, other: Callable[[], object]) -> Callable[[], None]:
    """What to call at each thing done: after so many of them, another attempt comes and does what it can."""
    counted = iter(range(number))
    come = iter([other])

    def done() -> None:
        if next(counted, None) is None and (comes := next(come, None)) is not None:
            with pytest.raises(NothingLeft):
                comes()

    return done


class Watched:
    """An engine that notes what it is asked for, and tells when it has answered."""

    def __init__(self, engine: Any, asked: list[str], done: Callable[[], None]) -> None:
        self._engine, self._asked, self._done = engine, asked, done

    def generate(self, requests: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        def taken() -> Iterator[Sequence[Request]]:
            for each in requests:
                self._asked.append(each[0].prompt_id)
                yield each

        yield from self._engine.generate(taken())
        self._done()


def test_a_shard_of_generate_that_is_shared_has_the_bytes_of_one_that_is_not(
    folder: JobFolder, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real engine, whose numbers depend on the batch: eleven prompts and one that is refused, two at a time."""
    source = prompts(11)
    source[3] = replace(source[3], messages=[replace(source[3].messages[0], content="why " * 100)])
    whole = test_generate_stage.task(tmp_path / "whole", source, tiny_model)
    outcome = generate.run(CONFIG, whole)
    own = attempt(folder, whole, OWN, extra=False)
    original = engines.load_engine
    asked: dict[str, list[str]] = {OWN: [], EXTRA: []}

    def other() -> None:
        monkeypatch.setattr(
            engines, "load_engine", lambda config, model: Watched(original(config, model), asked[EXTRA], lambda: None)
        )
        generate.run(CONFIG, attempt(folder, whole, EXTRA, extra=True))

    joined = join_after(1, other)
    monkeypatch.setattr(
        engines, "load_engine", lambda config, model: Watched(original(config, model), asked[OWN], joined)
    )
    shared = generate.run(CONFIG, own)
    assert asked == {OWN: ["p0", "p1", "p2", "p4"], EXTRA: ["p9", "p10", "p7", "p8", "p5", "p6"]}
    assert (own.out / ROWS).read_bytes() == (whole.out / ROWS).read_bytes()
    assert shared.counts == {**outcome.counts, "shared": 6}
    assert {each.rpartition(".r")[0] for each in left(folder, 0)} == {"aipo-cafe-2.0"}


class Window:
    """Takes prompts as it has room for two, as vLLM does, and finishes the newer one first."""

    def __init__(self, asked: list[str], done: Callable[[], None]) -> None:
        self._asked, self._done = asked, done

    def generate(self, requests: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        waiting = iter(requests)
        flying: deque[Sequence[Request]] = deque()
        while True:
            while len(flying) < 2 and (prompt := next(waiting, None)) is not None:
                self._asked.append(prompt[0].prompt_id)
                flying.append(prompt)
            if not flying:
                return
            for request in flying.pop():
                yield Completion(request, f"seed {request.seed}", "stop", 1)
            self._done()


def test_an_engine_that_takes_prompts_one_by_one_claims_what_it_has_room_for(
    folder: JobFolder, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, engine="vllm")
    asked: dict[str, list[str]] = {"whole": [], OWN: [], EXTRA: []}
    monkeypatch.setattr(engines, "load_engine", lambda config, model: Window(asked["whole"], lambda: None))
    whole = test_generate_stage.task(tmp_path / "whole", prompts(9), tiny_model)
    generate.run(config, whole)

    def other() -> None:
        monkeypatch.setattr(engines, "load_engine", lambda config, model: Window(asked[EXTRA], lambda: None))
        generate.run(config, attempt(folder, whole, EXTRA, extra=True))

    joined = join_after(2, other)
    monkeypatch.setattr(engines, "load_engine", lambda config, model: Window(asked[OWN], joined))
    own = attempt(folder, whole, OWN, extra=False)
    generate.run(config, own)
    assert asked[OWN] == ["p0", "p1", "p2", "p3"], "two were done, two in flight"
    assert asked[EXTRA] == ["p8", "p7", "p6", "p5", "p4"]
    assert (own.out / ROWS).read_bytes() == (whole.out / ROWS).read_bytes()


def test_a_shard_of_rank_that_is_shared_has_the_bytes_of_one_that_is_not(
    folder: JobFolder, tmp_path: Path, ranker_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PairRM, "prompts_per_call", 2)
    rows = [responses(number, ["It is hot.", "no " * (number + 1), "Low pressure."]) for number in range(7)]
    rows.append(responses(7, [], error="refused"))
    whole = test_rank_stage.task(tmp_path, rows, ranker_checkpoint.pairrm)
    outcome = rank.run(RankConfig(), whole)
    own = attempt(folder, whole, OWN, extra=False)
    original = PairRM.rank
    begun: list[str] = []
    joined = join_after(1, lambda: rank.run(RankConfig(), attempt(folder, whole, EXTRA, extra=True)))

    def ranking(self: PairRM, asked: Sequence[Any]) -> Any:
        begun.append(asked[0].prompt_id)
        found = original(self, asked)
        joined()
        return found

    monkeypatch.setattr(PairRM, "rank", ranking)
    shared = rank.run(RankConfig(), own)
    assert sorted(begun) == ["p0", "p2", "p4", "p6"], "none twice"
    assert (own.out / ROWS).read_bytes() == (whole.out / ROWS).read_bytes()
    assert {**outcome.counts, "shared": shared.counts["shared"]} == shared.counts


def test_a_shard_of_reference_that_is_shared_has_the_bytes_of_one_that_is_not(
    folder: JobFolder, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is wrong with a pair is told by whoever finds it: p3 before there are batches, p0 in the extra attempt."""
    pairs = [pair(number) for number in range(9)]
    pairs[3] = pair(3, chosen=Candidate("", "length", 0))
    config = ReferenceConfig(dtype="float32", tokens_per_batch=64)
    forward = reference._forward
    begun: dict[str, list[str]] = {"whole": [], OWN: [], EXTRA: []}

    def watch(name: str, done: Callable[[], None]) -> None:
        def noted(model: Any, rows: Sequence[TrainRow]) -> Iterator[TrainRow]:
            begun[name] += [row.prompt_id for row in rows]
            for row in forward(model, rows):
                yield replace(row, ref_chosen_logps=float("nan")) if row.prompt_id == "p0" else row
            done()

        monkeypatch.setattr(reference, "_forward", noted)

    watch("whole", lambda: None)
    whole = reference_task(tmp_path / "whole", pairs, tiny_model)
    outcome = reference.run(config, whole)

    def other() -> None:
        watch(EXTRA, lambda: None)
        reference.run(config, attempt(folder, whole, EXTRA, extra=True))

    watch(OWN, join_after(2, other))
    own = attempt(folder, whole, OWN, extra=False)
    shared = reference.run(config, own)
    print(f"batches: {begun}")
    assert begun[OWN] and begun[EXTRA] and sorted(begun[OWN] + begun[EXTRA]) == sorted(begun["whole"]), "none twice"
    assert "p3" not in begun["whole"] and "p0" in begun[EXTRA]
    assert (own.out / ROWS).read_bytes() == (whole.out / ROWS).read_bytes()
    assert shared.counts == {**outcome.counts, "shared": len(begun[EXTRA])} and shared.counts["errors"] == 2


def test_an_attempt_with_smaller_batches_than_its_shard_was_divided_by_does_all_the_rest_itself(
    folder: JobFolder, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a death for want of memory; an extra attempt has nothing to join then."""
    config = ReferenceConfig(dtype="float32", tokens_per_batch=64)
    smaller = replace(config, tokens_per_batch=32)
    whole = reference_task(tmp_path / "whole", [pair(number) for number in range(9)], tiny_model)
    reference.run(smaller, whole)
    forward = reference._forward
    begun: list[list[str]] = []

    def watched(model: Any, rows: Sequence[TrainRow]) -> Iterator[TrainRow]:
        begun.append([row.prompt_id for row in rows])
        if len(begun) == 2:
            raise Killed
        yield from forward(model, rows)

    monkeypatch.setattr(reference, "_forward", watched)
    first = attempt(folder, whole, OWN, extra=False)
    with pytest.raises(Killed):
        reference.run(config, first)
    done = begun[0]
    own = attempt(folder, whole, "aipo-cafe-3.0.r0", extra=False)
    with pytest.raises(NothingLeft):
        reference.run(smaller, attempt(folder, whole, EXTRA, extra=True))
    outcome = reference.run(smaller, own)
    print(f"batches of {[len(each) for each in begun]}, the second one died")
    again = [each for batch in begun[2:] for each in batch]
    assert not set(done) & set(again) and len(done) + len(again) == 9 and outcome.counts["pairs"] == 9
    rows = [list(read_rows([made.out / ROWS], TrainRow)) for made in (own, whole)]
    assert [row.prompt_id for row in rows[0]] == [row.prompt_id for row in rows[1]]


class Killed(BaseException):
    """A worker's death, as far as a stage can tell."""


class Poisoned:
    """An engine that answers whole batches and dies of one prompt; tells when it has answered."""

    def __init__(self, poison: str, done: Callable[[], None] = lambda: None) -> None:
        self._poison, self._done = poison, done

    def generate(self, requests: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        batch = list(requests)
        if any(each[0].prompt_id == self._poison for each in batch):
            raise Killed
        for request in (request for prompt in batch for request in prompt):
            yield Completion(request, f"seed {request.seed}", "stop", 1)
        self._done()


def test_a_prompt_that_kills_whoever_does_it_costs_one_extra_attempt_and_is_set_aside(
    folder: JobFolder, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = test_generate_stage.task(tmp_path / "whole", prompts(9), tiny_model)
    dead: list[Path] = []
    extra: list[str] = []

    def die(made: Task, is_extra: bool) -> None:
        with pytest.raises(Killed):
            generate.run(CONFIG, replace(made, deaths=tuple(dead)))
        dead.append(made.out)
        folder.record_failure(Failure(folder.name, 0, made.out.name, 1, "killed", "", extra=is_extra))

    def others() -> None:
        """Two of them: one dies of p8, the other leaves that to the shard's own attempt."""
        for number in (2, 3):
            extra.append(f"aipo-cafe-{number}.0.r0")
            made = attempt(folder, whole, extra[-1], extra=True)
            monkeypatch.setattr(engines, "load_engine", lambda config, model: Poisoned("p8"))
            if number == 2:
                die(made, is_extra=True)
            else:
                generate.run(CONFIG, made)

    monkeypatch.setattr(engines, "load_engine", lambda config, model: Poisoned("p8", join_after(1, others)))
    die(attempt(folder, whole, OWN, extra=False), is_extra=False)
    monkeypatch.setattr(engines, "load_engine", lambda config, model: Poisoned("p8"))
    for number in range(4, 9):
        made = attempt(folder, whole, f"aipo-cafe-{number}.0.r0", extra=False)
        try:
            outcome = generate.run(CONFIG, replace(made, deaths=tuple(dead)))
            break
        except Killed:
            dead.append(made.out)
            folder.record_failure(Failure(folder.name, 0, made.out.name, 1, "killed", ""))
    assert sum(path.name in extra for path in dead) == 1
    assert outcome.counts["set_aside"] == 1
    found = test_generate_stage.rows(made)
    assert [row.prompt_id for row in found] == [f"p{number}" for number in range(9)]
    assert [row.prompt_id for row in found if row.error] == ["p8"]
    print(f"{len(dead)} attempts died before p8 was set aside, one of them an extra one")
