"""Blocks of a shard: whose they are, when they become somebody else's, and what several attempts make of them together."""

import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import write_run
from slow_stage import JOB, SlowConfig, answer, batches_of, prompts, slow_graph

from aipo_hpc import blocks
from aipo_hpc.blocks import Blocks
from aipo_hpc.claims import Claims, NothingLeft, is_shared, left, unclaimed
from aipo_hpc.job_folder import JobFolder
from aipo_hpc.progress import ROWS, Progress
from aipo_hpc.rows import Candidate, Responses, read_rows
from aipo_hpc.sentinel import BY_DRIVER, Failure, Sentinel
from aipo_hpc.store import Run
from aipo_hpc.suspects import Suspects
from aipo_hpc.task import Task

CONFIG = SlowConfig(num_prompts=24)
GRAPH = slow_graph(1, CONFIG)
FINGERPRINT = GRAPH.fingerprints[JOB]
OWN, OTHER, EXTRA = "aipo-cafe-1.0.r0", "aipo-cafe-9.0.r0", "aipo-cafe-2.3.r0"
ALL = list(range(5))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path / "run", GRAPH)


def claims(run: Run, attempt: str = OWN, extra: bool = False) -> Claims:
    """The claims as an attempt in a process of its own sees them."""
    folder = Run(run.path).job(JOB)
    folder.begin_attempt(0, attempt)
    made = Claims(folder, 0, attempt, FINGERPRINT, extra)
    made.open(len(ALL))
    return made


def fail(run: Run, attempt: str) -> None:
    run.job(JOB).record_failure(Failure(JOB, 0, attempt, 1, "killed", "it died", time=time.time()))


def test_own_attempts_claim_from_the_front_and_extra_ones_from_the_end(run: Run) -> None:
    own = claims(run)
    extra = claims(run, EXTRA, extra=True)
    assert [own.take(ALL), extra.take(ALL), own.take(ALL)] == [(0, False), (4, False), (1, False)]
    assert unclaimed(run.job(JOB), 0) == 2
    assert [extra.take([0, 1]), own.take([4])] == [None, None], "what a living attempt has claimed is its own"
    assert extra.any_free(ALL) and not extra.any_free([0, 1])


@pytest.mark.parametrize(
    ("over", "what"),
    [
        (lambda run: fail(run, OWN), "it said so itself"),
        (lambda run: fail(run, f"aipo-cafe-1.0{BY_DRIVER}"), "the scheduler said so"),
        (lambda run: run.job(JOB).begin_attempt(0, "aipo-cafe-1.0.r1"), "it was begun once more"),
    ],
)
def test_a_block_of_an_attempt_that_is_over_is_claimed_again_by_one_alone(
    run: Run, over: Callable[[Run], object], what: str
) -> None:
    claims(run).take(ALL)
    living, extra = claims(run, OTHER), claims(run, EXTRA, extra=True)
    fail(run, "aipo-cafe-1.1.driver")
    fail(run, "aipo-cafe-11.0.driver")
    run.job(JOB).begin_attempt(0, "aipo-cafe-1.1.r1")
    assert living.take([0]) is None, "other elements are over, not this one"
    over(run)
    assert extra.take([0]) is None, "it is for the shard's own attempt"
    assert living.take([0]) == (0, True), what
    assert claims(run, "aipo-cafe-10.0.r0").take([0]) is None


def test_what_an_attempt_claimed_before_it_was_begun_again_under_its_own_name_is_free(run: Run) -> None:
    """So it is where a cluster does not count restarts."""
    first = claims(run)
    first.take(ALL)
    again = claims(run)
    assert again.take([0]) == (0, True)
    assert again.take([0]) is None


def test_an_extra_attempt_that_left_has_nothing_that_is_its_own(run: Run) -> None:
    own = claims(run)
    extra = claims(run, EXTRA, extra=True)
    extra.take(ALL)
    assert own.take([4]) is None
    with pytest.raises(NothingLeft, match="nothing is left to do"):
        extra.leave()
    assert left(run.job(JOB), 0) == {EXTRA}
    assert own.take([4]) == (4, True)


def test_nothing_is_claimed_of_a_shard_that_is_done(run: Run) -> None:
    own, extra = claims(run), claims(run, EXTRA, extra=True)
    assert is_shared(run.job(JOB), 0) and not own.shard_is_done()
    run.job(JOB).publish(Sentinel(JOB, 0, FINGERPRINT, OWN, 1, 1, (), {}, {}, 1.0, 2.0, "here"))
    own.remove()
    assert own.shard_is_done()
    with pytest.raises(NothingLeft, match=f"{JOB} shard 0: nothing is left to do for {EXTRA}"):
        extra.take(ALL)
    with pytest.raises(NothingLeft):
        claims(run, "aipo-cafe-2.4.r0", extra=True)
    assert not is_shared(run.job(JOB), 0) and unclaimed(run.job(JOB), 0) == 0


def take_all(path: Path, number: int, done: "multiprocessing.Queue[tuple[int, list[int]]]") -> None:
    """Claim as much as there is, in a process of its own."""
    made = claims(Run(path), f"aipo-cafe-2.{number}.r0", extra=number > 0)
    taken = []
    while (each := made.take(list(range(5)))) is not None:
        taken.append(each[0])
    done.put((number, taken))


def test_processes_that_claim_at_once_never_get_the_same_block(run: Run) -> None:
    claims(run)
    context = multiprocessing.get_context("fork")
    for trial in range(10):
        for name in os.listdir(run.path / JOB / "claims" / "00000"):
            if name != "blocks":
                (run.path / JOB / "claims" / "00000" / name).unlink()
        queue: multiprocessing.Queue[tuple[int, list[int]]] = context.Queue()
        workers = [context.Process(target=take_all, args=(run.path, number, queue)) for number in range(4)]
        for worker in workers:
            worker.start()
        taken = [block for _ in workers for block in queue.get(timeout=60)[1]]
        for worker in workers:
            worker.join()
        assert sorted(taken) == ALL, trial


# -- what attempts make together --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of an attempt."""


class Attempt:
    """One attempt at the shard, as a generator that stops before each batch, before its rows and after them."""

    def __init__(self, folder: JobFolder, name: str, extra: bool) -> None:
        self.name = name
        self.extra = extra
        self.batches: list[str] = []
        """First prompts of the batches that it began."""
        out, earlier = folder.begin_attempt(0, name)
        self._task = Task(JOB, 0, 0, 1, 7, {}, out, earlier, claims=Claims(folder, 0, name, FINGERPRINT, extra))
        self.out = out
        self.finished = False
        self.work = self._run()

    def _run(self):  # type: ignore[no-untyped-def]
        suspects = Suspects(self._task)
        with Progress(self._task, Responses) as progress:
            made = Blocks(self._task, batches_of(CONFIG, 0), progress, suspects)
            for batch in (batch for batches in made.rounds() for batch in batches):
                yield "claimed"
                self.batches.append(batch[0])
                for prompt_id in batch:
                    if prompt_id not in progress:
                        progress.append(Responses(prompt_id, "", [], [Candidate(answer(prompt_id, batch), "stop", 1)]))
                    yield "row"
            progress.finish(prompts(CONFIG, 0))
        self.finished = True


def step(attempt: Attempt) -> bool:
    """Go on for a little; False when it is over."""
    try:
        next(attempt.work)
    except (StopIteration, NothingLeft):
        return False
    except Waits:
        return True
    return True


class Waits(Exception):
    """It waits for others."""


@pytest.mark.parametrize("seed", range(40))
def test_whatever_dies_when_all_is_done_once_and_the_bytes_are_those_of_one_attempt(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts take turns in a random order and die at random; each death is known some time later."""
    run = write_run(tmp_path / "run", GRAPH)
    draw = random.Random(seed)
    monkeypatch.setattr(blocks, "MOST", draw.choice([3, 5, 64]))
    alone = Attempt(Run(run.path).job(JOB), "alone.0.r0", extra=False)
    while step(alone):
        pass
    expected = (alone.out / ROWS).read_bytes()
    run = write_run(tmp_path / "again", GRAPH)
    waiting: list[bool] = []
    # A generator cannot be left in the middle of a call, so who waits is asked once more after what others do meanwhile.
    monkeypatch.setattr(blocks.time, "sleep", lambda seconds: waiting.append(True) or advance())
    numbers = iter(range(1, 100))
    own = Attempt(Run(run.path).job(JOB), f"aipo-cafe-{next(numbers)}.0.r0", extra=False)
    others: list[Attempt] = []
    everybody = [own]
    dead: list[Attempt] = []
    deaths = 0

    def advance() -> None:
        """Something happens beside the shard's own attempt."""
        for each in dead:
            fail(run, each.name)
        dead.clear()
        for each in list(others):
            if not step(each):
                others.remove(each)

    while True:
        what = draw.random()
        if what < 0.06 and len(others) < 3 and is_shared(run.job(JOB), 0):
            others.append(Attempt(Run(run.path).job(JOB), f"aipo-cafe-{next(numbers)}.0.r0", extra=True))
            everybody.append(others[-1])
        elif what < 0.1 and others:
            victim = others.pop(draw.randrange(len(others)))
            victim.work.close()
            dead.append(victim)
            deaths += 1
        elif what < 0.12 and deaths < 6:
            own.work.close()
            fail(run, own.name)  # the next one is sent when this is known
            own = Attempt(Run(run.path).job(JOB), f"aipo-cafe-{next(numbers)}.0.r0", extra=False)
            everybody.append(own)
            deaths += 1
        elif what < 0.5 and others:
            each = draw.choice(others)
            if not step(each):
                others.remove(each)
        elif not step(own):
            break
    assert own.finished
    assert (own.out / ROWS).read_bytes() == expected
    assert [row.prompt_id for row in read_rows([own.out / ROWS], Responses)] == prompts(CONFIG, 0)
    begun = Counter(batch for attempt in everybody for batch in attempt.batches)
    assert set(begun) == {batch[0] for batch in batches_of(CONFIG, 0)}
    again = sum(begun.values()) - len(begun)
    print(f"{len(everybody)} attempts, {deaths} died, {again} batches begun again, waited {len(waiting)} times")
    assert again <= deaths, "more was begun again than was in flight at a death"
    assert len(own.batches) < len(begun), "others did nothing"


def test_a_late_extra_attempt_finds_the_shard_done_and_leaves(run: Run) -> None:
    folder = Run(run.path).job(JOB)
    own = Attempt(folder, OWN, extra=False)
    assert step(own)
    late = Attempt(Run(run.path).job(JOB), EXTRA, extra=True)
    while step(own):
        pass
    assert not step(late) and late.batches == [] and not late.finished
