"""A straggling shard and extra tasks as real processes: on this machine, where they are killed, and on a real Slurm."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
from fakes import Driven, driven, eventually, write_run
from sandbox import Sandbox
from slow_stage import JOB, SlowConfig, batches_of, notes, prompts, slow_graph

from aipo_hpc import leftovers
from aipo_hpc.clusters import Cluster, TaskState
from aipo_hpc.clusters.inline import InlineCluster
from aipo_hpc.clusters.local import LocalCluster
from aipo_hpc.clusters.slurm import SlurmCluster
from aipo_hpc.graph import Graph
from aipo_hpc.journal import Journal
from aipo_hpc.launch import launch
from aipo_hpc.processes import descendants
from aipo_hpc.progress import ROWS
from aipo_hpc.recipe import Recipe, SlurmConfig
from aipo_hpc.record import read_graph
from aipo_hpc.rows import Responses, read_rows
from aipo_hpc.sentinel import Sentinel
from aipo_hpc.store import Run

SHARDS = 4
LAST = SHARDS - 1


@pytest.fixture(autouse=True)
def processes_know_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a shard is shared however short it has run."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import slow_stage\n")
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(here), str(here.parent)]))
    monkeypatch.setattr(leftovers, "LEAST", 0.0)


@dataclass
class Shared:
    """A run that is driven here, with what its tasks noted."""

    run: Run
    graph: Graph
    config: SlowConfig
    at_work: Driven
    cluster: Cluster
    drivers: ExitStack
    killed: dict[str, float] = field(default_factory=dict)
    """When an attempt was killed."""
    doomed: set[str] = field(default_factory=set)
    """Batches that were in flight then."""

    def next_driver(self) -> None:
        """The driver goes, another one comes."""
        self.drivers.close()
        self.at_work = self.drivers.enter_context(driven(self.run, self.graph, self.cluster))

    def sentinel(self) -> Sentinel:
        return self.run.job(JOB).done(self.graph.fingerprints[JOB])[LAST]

    def extra(self) -> set[str]:
        """Names of submissions of extra tasks."""
        return {each.name for each in self.at_work.journal.submissions.values() if each.extra}

    def living(self) -> dict[str, int]:
        """Pids of the attempts at the last shard that have begun to work, and live, by name."""
        pids = {note["attempt"]: note["pid"] for note in notes(self.config, LAST)}
        return {attempt: pid for attempt, pid in pids.items() if attempt not in self.killed and alive(pid)}

    def kill(self, attempt: str, pid: int) -> bool:
        """End an attempt and all that belongs to it, at once, unless it does what another one died with.

        Of a batch that is in flight at two deaths, one of the prompts is suspected, and the batch is divided.
        """
        os.kill(pid, signal.SIGSTOP)
        theirs = [note for note in notes(self.config, LAST) if note["attempt"] == attempt]
        doing = {theirs[-1]["batch"]} if theirs and theirs[-1]["what"] == "begin" else set()
        if doing & self.doomed:
            os.kill(pid, signal.SIGCONT)
            return False
        self.doomed |= doing
        for each in (*descendants(pid), pid):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        self.killed[attempt] = time.time()
        return True

    def drive(self, meanwhile: Callable[[], None] = lambda: None, seconds: float = 400) -> None:
        """Until the run is finished; ``meanwhile`` is called at each look."""
        deadline = time.monotonic() + seconds
        while not self.at_work.driver.tick().finished:
            assert time.monotonic() < deadline, "\n".join(self.at_work.lines)
            meanwhile()
            time.sleep(0.05)

    def check(self) -> dict[str, int]:
        """Every promise; returns how many batches of the last shard each attempt finished."""
        done: dict[str, int] = {}
        spans: dict[str, list[tuple[float, float, str]]] = {}
        for note in notes(self.config, LAST):
            attempt, batch = note["attempt"], note["batch"]
            if note["what"] == "begin":
                spans.setdefault(batch, []).append((note["time"], self.killed.get(attempt, float("inf")), attempt))
            else:
                begin, _, _ = spans[batch].pop()
                spans[batch].append((begin, note["time"], attempt))
                done[attempt] = done.get(attempt, 0) + 1
        assert spans.keys() == {batch[0] for batch in batches_of(self.config, LAST)}
        again = 0
        for batch, each in spans.items():
            each.sort()
            again += len(each) - 1
            for (_, end, who), (begin, _, other) in pairwise(each):
                assert end <= begin, f"{batch} was done by {who} and {other} at once"
                assert who in self.killed, f"{batch} was done again by {other} although {who} was not killed"
        assert again <= len(self.killed), "more was done again than was in flight at a kill"
        rows = self.run.job(JOB).files(self.sentinel())[0]
        assert [row.prompt_id for row in read_rows([rows], Responses)] == prompts(self.config, LAST)
        assert rows.read_bytes() == undisturbed(self.run.path.parent / "undisturbed", self.config)
        assert not (self.run.path / JOB / "claims" / f"{LAST:05d}").exists()
        return done

    def times(self) -> tuple[float, float]:
        """What the last shard's batches took, one after the other; and from the first one's begin to the last one's end."""
        found = notes(self.config, LAST)
        begun = {(note["attempt"], note["batch"]): note["time"] for note in found if note["what"] == "begin"}
        ended = {(note["attempt"], note["batch"]): note["time"] for note in found if note["what"] == "end"}
        return sum(when - begun[what] for what, when in ended.items()), max(ended.values()) - min(begun.values())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def undisturbed(folder: Path, config: SlowConfig) -> bytes:
    """The last shard's rows of a run that does each shard by one task."""
    graph = slow_graph(SHARDS, replace(config, seconds=0.0, joined=False, log="", share_after=None))
    run = write_run(folder, graph)
    with driven(run, graph, InlineCluster()) as at_work:
        at_work.driver.follow(0.0)
    (sentinel,) = [each for shard, each in run.job(JOB).done(graph.fingerprints[JOB]).items() if shard == LAST]
    return (run.job(JOB).attempt_folder(LAST, sentinel.attempt) / ROWS).read_bytes()


@contextmanager
def shared(folder: Path, cluster: Cluster, config: SlowConfig) -> Iterator[Shared]:
    config = replace(config, log=str(folder / "log"))
    graph = slow_graph(SHARDS, config)
    run = write_run(folder / "run", graph, payload_timeout=20.0)
    with ExitStack() as drivers:
        made = Shared(run, graph, config, drivers.enter_context(driven(run, graph, cluster)), cluster, drivers)
        try:
            yield made
        finally:
            made.at_work.driver.cancel()
            wait_for_all(cluster, run)


def wait_for_all(cluster: Cluster, run: Run) -> None:
    """Nothing is left running, and nothing unwaited for."""
    sent = list(Journal(run).submissions.values())

    def states() -> Iterator[TaskState]:
        return (state for told in cluster.states(sent).values() for state in told.values())

    assert eventually(lambda: not any(state.alive for state in states()), 60)


def machine() -> LocalCluster:
    """This machine, with as many cores as there are shards."""
    made = LocalCluster()
    made.limits = replace(made.limits, cpus=SHARDS)
    return made


def test_extra_tasks_do_part_of_a_straggling_shard_and_it_takes_less_time_than_its_batches(tmp_path: Path) -> None:
    config = SlowConfig(num_prompts=80, seconds=0.2, joined=True)
    with shared(tmp_path, machine(), config) as made:
        made.drive()
        done = made.check()
        sentinel = made.sentinel()
        by_extra = {attempt: number for attempt, number in done.items() if attempt.split(".")[0] in made.extra()}
        work, span = made.times()
        print(f"batches by attempt {done}; {work:.1f} s of work in {span:.1f} s")
        assert by_extra and sentinel.attempt not in by_extra
        assert sentinel.counts["shared"] == 2 * sum(by_extra.values())
        assert span < work
        assert not made.run.job(JOB).failures()
        assert len(made.extra()) == SHARDS - 1
        assert any("sent 1 more for shard 3" in line for line in made.at_work.lines)


def test_extra_tasks_that_wait_or_are_at_work_end_when_the_shard_is_done(tmp_path: Path) -> None:
    """Here they are stopped in the middle of what another attempt has finished meanwhile."""
    with shared(tmp_path, machine(), SlowConfig(num_prompts=40, seconds=0.2, joined=True)) as made:
        made.drive()
        assert eventually(lambda: not made.living(), 60)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_tasks_killed_at_random_lose_and_repeat_nothing(tmp_path: Path, seed: int) -> None:
    """The shard's own task and extra ones, with kill -9, up to six in all."""
    draw = random.Random(seed)
    with shared(tmp_path, machine(), SlowConfig(num_prompts=100, seconds=0.2, joined=True)) as made:
        whom = {"own": 0, "extra": 0}
        due = [0.0]

        def kill_somebody() -> None:
            living = made.living()
            if sum(whom.values()) >= 6 or not made.extra() or time.monotonic() < due[0] or len(living) < 2:
                return
            kinds = {attempt: "extra" if attempt.split(".")[0] in made.extra() else "own" for attempt in living}
            wanted = draw.choice(["own", "extra"])
            found = sorted(attempt for attempt, kind in kinds.items() if kind == wanted)
            if found and whom[wanted] < 3:
                victim = draw.choice(found)
                whom[wanted] += made.kill(victim, living[victim])
                due[0] = time.monotonic() + draw.uniform(0.3, 1.5)

        made.drive(kill_somebody)
        done = made.check()
        print(f"killed {whom}; batches by attempt {done}")
        assert whom["own"] and whom["extra"]
        failures = made.run.job(JOB).failures()
        assert {failure.extra for failure in failures} == {True, False}


def test_a_driver_that_comes_later_knows_extra_tasks_and_goes_on_with_them(tmp_path: Path) -> None:
    with shared(tmp_path, machine(), SlowConfig(num_prompts=120, seconds=0.2, joined=True)) as made:
        while not made.extra():
            made.at_work.driver.tick()
            time.sleep(0.05)
        sent = made.extra()
        made.next_driver()
        made.drive()
        made.check()
        assert made.extra() == sent, "there was no room for more"


def test_extra_tasks_on_slurm(slurm_sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm_sandbox.env.items():
        monkeypatch.setenv(name, value)
    cluster = SlurmCluster(SlurmConfig(query_seconds=1.0))
    config = SlowConfig(num_prompts=120, seconds=0.2, joined=True)
    with shared(tmp_path, cluster, config) as made:

        def kill_an_extra_task() -> None:
            living = {attempt: pid for attempt, pid in made.living().items() if attempt.split(".")[0] in made.extra()}
            if living and not made.killed:
                made.kill(*sorted(living.items())[0])

        made.drive(kill_an_extra_task)
        done = made.check()
        (extra,) = made.extra()
        by_extra = {attempt: number for attempt, number in done.items() if attempt.split(".")[0] == extra}
        work, span = made.times()
        print(f"batches by attempt {done}; one killed; {work:.1f} s of work in {span:.1f} s")
        assert len(by_extra) > 1 and len(made.killed) == 1
        assert [failure.extra for failure in made.run.job(JOB).failures()] == [True]


@pytest.mark.slow
def test_a_task_that_stands_still_is_helped_out_and_the_trained_model_is_the_same(
    tmp_path: Path, small_recipe: Recipe
) -> None:
    """A whole iteration with real models; the last task of generate is stopped until extra ones have begun four blocks."""
    recipe = replace(
        small_recipe,
        iterations=1,
        data=replace(small_recipe.data, limit=60),
        generate=replace(small_recipe.generate, batch_size=1, num_shards=3, share_after=0.0),
    )
    job, shard = "iter-00/generate", 2
    run = Run(tmp_path / "shared")

    def hold() -> None:
        claims = run.path / job / "claims" / f"{shard:05d}"
        assert eventually(lambda: (claims / "00001.0").is_symlink(), 300)
        sent = Journal(run).submissions.values()
        (own,) = [each for each in sent if (each.job, each.shards) == (job, (shard,)) and not each.extra]
        assert own.id is not None
        pid = int(own.id.split(":")[0])
        group = (*descendants(pid), pid)
        for each in group:
            os.kill(each, signal.SIGSTOP)

        def by_extra() -> int:
            return sum(not os.readlink(each).startswith(f"{own.name}.") for each in claims.glob("000??.0"))

        try:
            assert eventually(lambda: by_extra() >= 4, 300)
        finally:
            for each in group:
                os.kill(each, signal.SIGCONT)

    with ThreadPoolExecutor(1) as thread:
        held = thread.submit(hold)
        cluster = machine()
        launch(replace(recipe, cluster="local", run_dir=str(run.path)), cluster)
        held.result()
    wait_for_all(cluster, run)
    alone = replace(recipe, generate=replace(recipe.generate, share_after=None))
    undisturbed = launch(replace(alone, run_dir=str(tmp_path / "alone")))
    graph = read_graph(run)
    for name in (job, "iter-00/rank", "iter-00/pairs", "iter-00/reference", "iter-00/train", "iter-00/answers"):
        one, other = (
            {
                (number, output.path): output.sha256
                for number, sentinel in each.job(name).done(graph.fingerprints[name]).items()
                for output in sentinel.outputs
                if output.path.endswith((".parquet", ".safetensors"))
            }
            for each in (run, undisturbed)
        )
        assert one == other and one, name
    sentinel = run.job(job).done(graph.fingerprints[job])[shard]
    print(f"{sentinel.counts['shared']} of {sentinel.rows} prompts by extra tasks; all files of six jobs are the same")
    assert not run.job(job).failures()
