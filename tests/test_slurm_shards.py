"""Shards on a real Slurm that run out of time, are preempted, requeued, or killed by a prompt; a run that the guard stops.

One shard each of generate, rank and reference is undone in a copy of a finished run, and done again amid misfortunes.
"""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import misfortunes
import pytest
from fakes import Driven, driven
from finished import recipe, unfinished
from sandbox import Sandbox

from aipo_hpc.clusters.slurm import SlurmCluster
from aipo_hpc.errors import RunFailed
from aipo_hpc.graph import Graph
from aipo_hpc.guard import GuardConfig
from aipo_hpc.launch import launch
from aipo_hpc.recipe import SlurmConfig
from aipo_hpc.record import read_graph
from aipo_hpc.report import print_report
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Ranked, Responses, TrainRow, read_rows
from aipo_hpc.sentinel import Sentinel
from aipo_hpc.store import Run
from aipo_hpc.suspects import IN_FLIGHT, Suspects

pytestmark = pytest.mark.timeout(600)

SHARDS = (("iter-00/generate", 0), ("iter-00/rank", 1), ("iter-00/reference", 1))
LARGEST_BATCH = 5
PATIENCE = 240.0
SETTLE = 1.0
"""Seconds that the driver gives files to show up, on a file system of one machine."""


def results(run: Run, sentinel: Sentinel) -> tuple[list[str], dict[str, str]]:
    """The prompts of a shard's rows, and the errors of those that have one."""
    files = {path.name: path for path in run.job(sentinel.job).files(sentinel)}
    kind: Any = {"generate": Responses, "rank": Ranked, "reference": TrainRow}[sentinel.job.partition("/")[2]]
    rows: list[Any] = list(read_rows([files["rows.parquet"]], kind))
    return [row.prompt_id for row in rows], {row.prompt_id: row.error for row in rows if row.error is not None}


class Site:
    """A copy of a finished run in which three shards are undone, and a driver that has them done again on Slurm."""

    def __init__(
        self, sandbox: Sandbox, folder: Path, finished: Run, run: Run, before: list[Sentinel], at_work: Driven
    ):
        self.sandbox, self.folder, self.run, self._at_work = sandbox, folder, run, at_work
        self.graph: Graph = read_graph(run)
        self.before = {sentinel.job: sentinel for sentinel in before}
        self.prompts = {sentinel.job: list(results(finished, sentinel)[0]) for sentinel in before}

    @property
    def lines(self) -> list[str]:
        """What the driver said."""
        return self._at_work.lines

    def ids(self) -> list[str]:
        """Slurm's ids of all that was sent."""
        return [str(each.id) for each in self._at_work.journal.submissions.values() if str(each.id).isdecimal()]

    def drive(self, what: str, holds: Callable[[], object]) -> None:
        """Drive until it holds. What waits for Slurm's pause after a requeue is begun at once."""
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE:g} s\n" + "\n".join(self.lines)
            self._at_work.driver.tick()
            for job in self.slurm("squeue", "--noheader", "--states=PENDING", "--format=%i|%r").split():
                if job.endswith("|BeginTime"):
                    self.slurm("scontrol", "update", f"JobId={job.partition('|')[0]}", "StartTime=now")
            time.sleep(0.2)

    def slurm(self, *command: str) -> str:
        """What a client command prints; it may fail, as it does for a job that has just ended."""
        env = {**os.environ, **self.sandbox.env}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60).stdout

    def done(self) -> bool:
        """Whether the three shards are done."""
        return all(shard in self.run.job(job).done(self.graph.fingerprints[job]) for job, shard in SHARDS)

    def hold(self) -> None:
        """Workers wait from now on after some rows."""
        for job, _ in SHARDS:
            (self.folder / f"hold-{job.partition('/')[2]}").touch()

    def release(self) -> None:
        """They go on."""
        for path in self.folder.glob("hold-*"):
            path.unlink()

    def wait_for_attempts(self, number: int) -> None:
        """Drive until each shard's attempt of this number waits, some rows further than the one before."""

        def there() -> bool:
            return len(list(self.folder.glob(f"at-work-*.r{number}"))) == len(SHARDS)

        self.drive(f"attempt {number} of all shards", there)

    def attempt(self, job: str, number: int) -> Path:
        """Folder of an attempt."""
        (found,) = (self.run.path / job / f"shards/{dict(SHARDS)[job]:05d}").glob(f"*.r{number}")
        return found

    def finished_in(self, job: str, number: int) -> list[str]:
        """Prompts whose rows an attempt had when it ended."""
        lines = (self.attempt(job, number) / "progress.jsonl").read_text().splitlines()
        return [json.loads(line)["prompt_id"] for line in lines]

    def begun_in(self, job: str, number: int) -> list[str]:
        """Prompts that an attempt asked its model for."""
        return [json.loads(line) for line in (self.attempt(job, number) / IN_FLIGHT).read_text().splitlines()]


@pytest.fixture
def minutes() -> int:
    """Time limit of the shards."""
    return 30


@pytest.fixture
def site(
    slurm_sandbox: Sandbox, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: int
) -> Iterator[Site]:
    folder = tmp_path / "misfortunes"
    for name, value in {**slurm_sandbox.env, **misfortunes.environment(folder)}.items():
        monkeypatch.setenv(name, value)
    run, before = unfinished(finished_run, tmp_path / "run", *SHARDS)
    graph = read_graph(run)
    limited = {
        name: replace(job, resources=Resources(time=minutes)) for name, job in graph.jobs.items() if job.resources
    }
    graph = replace(graph, jobs={**graph.jobs, **limited})
    cluster = SlurmCluster(SlurmConfig(query_seconds=0.5))
    cluster.limits = replace(cluster.limits, settle=SETTLE)
    with driven(run, graph, cluster) as at_work:
        made = Site(slurm_sandbox, folder, Run(finished_run), run, before, at_work)
        try:
            yield made
        finally:
            made.release()
            if made.ids():
                made.slurm("scancel", *made.ids())


# -- leaving, preemption, requeue ----------------------------------------------------------------------------------------


def near_the_time_limit(site: Site) -> None:
    """What Slurm does then, because of --signal=B:USR2."""
    for job in site.ids():
        site.sandbox.run("scancel", "--signal=USR2", "--batch", job)


def requeue(site: Site) -> None:
    site.sandbox.run("scontrol", "requeue", ",".join(site.ids()))


def preempt(site: Site) -> None:
    site.sandbox.run("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true")


def preempt_after_a_grace(site: Site) -> None:
    """The partition's GraceTime: they are to go, but may stay for some seconds."""
    site.sandbox.run("scontrol", "update", "PartitionName=main", "GraceTime=3")
    try:
        preempt(site)
        running = set(site.ids())
        site.drive("the end of the grace", lambda: not running & set(states(site, "RUNNING")))
    finally:
        site.sandbox.run("scontrol", "update", "PartitionName=main", "GraceTime=0")


def states(site: Site, state: str) -> list[str]:
    return site.slurm("squeue", "--noheader", f"--states={state}", "--format=%i").split()


@pytest.mark.parametrize(
    "disturbances",
    [(near_the_time_limit, requeue), (preempt, preempt_after_a_grace)],
    ids=["near the time limit, requeued", "preempted, preempted after a grace"],
)
def test_shards_that_must_make_room_are_continued_with_all_rows_and_end_with_the_same_bytes(
    site: Site, disturbances: tuple[Callable[[Site], None], ...]
) -> None:
    site.hold()
    for number, disturb in enumerate(disturbances):
        site.wait_for_attempts(number)
        disturb(site)
    site.wait_for_attempts(len(disturbances))
    site.release()
    site.drive("the end of all shards", site.done)
    assert_continued(site, len(disturbances), [disturb is near_the_time_limit for disturb in disturbances])
    assert len(site.ids()) == len(SHARDS), "Slurm has kept their ids; nothing was sent a second time"


def assert_continued(site: Site, last: int, left: list[bool]) -> None:
    """Rows were kept, none was made again that need not, no attempt ran beside another, and nothing counts as failed.

    ``left``: whether an attempt left between two batches, so that not even the other prompts of a batch were redone.
    """
    for job, shard in SHARDS:
        after = site.run.job(job).done(site.graph.fingerprints[job])[shard]
        assert after.outputs == site.before[job].outputs, "byte for byte what an undisturbed run made"
        assert after.attempt.endswith(f".r{last}")
        kept = [site.finished_in(job, number) for number in range(last + 1)]
        for number in range(last):
            assert kept[number] == kept[number + 1][: len(kept[number])], "rows from before come first"
            again = set(kept[number]) & set(site.begun_in(job, number + 1))
            assert len(again) < (1 if left[number] else LARGEST_BATCH), "of an unfinished batch at most"
        assert [len(each) for each in kept] == sorted({len(each) for each in kept}), "each attempt got further"
        print(f"{job} shard {shard}: rows after each attempt {[len(each) for each in kept]} of {len(kept[-1])}")
        assert site.run.job(job).failures() == [], "no failure is held against the shard"
    assert list(site.folder.glob("overlap-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("minutes", [1])
def test_shards_that_take_longer_than_their_minute_leave_at_slurms_own_signal_and_are_continued(site: Site) -> None:
    site.hold()
    site.wait_for_attempts(0)
    (limit,) = set(site.sandbox.run("squeue", "--noheader", "--format=%l").split())
    assert limit == "1:00"
    site.wait_for_attempts(1)
    site.release()
    site.drive("the end of all shards", site.done)
    assert_continued(site, 1, [True])
    assert len(site.ids()) == len(SHARDS)


# -- prompts that kill their worker ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_without_room(link: Path) -> Iterator[bool]:
    """A memory cgroup, linked to; False where none may be made."""
    group = Path(f"/sys/fs/cgroup/memory/aipo-test-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("33554432")
    except OSError:
        yield False
        return
    try:
        link.symlink_to(group)
        yield True
    finally:
        group.rmdir()


def poison(site: Site, job: str, how: str) -> str:
    """Have the last prompt of the job's shard kill its worker; returns which."""
    prompt_id = site.prompts[job][-1]
    (site.folder / f"poison-{job.partition('/')[2]}").write_text(json.dumps({"prompt_id": prompt_id, "how": how}))
    return prompt_id


@pytest.mark.parametrize("number", [1, pytest.param(3, marks=pytest.mark.slow)], ids=["generate", "all three"])
def test_prompts_that_kill_their_worker_are_found_set_aside_and_told_and_the_shards_completed(
    site: Site, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    shards = SHARDS[:number]
    with memory_without_room(site.folder / "memory") as may_be_made:
        hows = (misfortunes.SEGFAULT, misfortunes.OOM_KILL if may_be_made else misfortunes.KILL, misfortunes.NO_MEMORY)
        poisons = [poison(site, job, how) for (job, _), how in zip(shards, hows, strict=False)]
        site.drive("the end of all shards", site.done)
    for (job, shard), how, prompt_id in zip(shards, hows, poisons, strict=False):
        sentinel = site.run.job(job).done(site.graph.fingerprints[job])[shard]
        kinds = [failure.kind for failure in site.run.job(job).failures()]
        print(f"{job}: {how}, told as {set(kinds)}, {len(kinds)} deaths to find it among {len(site.prompts[job])}")
        assert set(kinds) == {"out_of_memory" if how == misfortunes.NO_MEMORY else "killed"}
        assert len(kinds) <= 5
        assert sentinel.counts["set_aside"] == sentinel.counts["errors"] == 1
        rows, errors = results(site.run, sentinel)
        assert errors == {prompt_id: Suspects.reason}
        assert [each for each in rows if each != prompt_id] == site.prompts[job][:-1], "all others are there, in order"
    print_report(site.run, site.graph)
    said = capsys.readouterr().out
    print(said)
    for job, _ in shards:
        assert f"{job}: 1 prompts set aside because they killed their workers" in said


# -- the guard -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_the_end", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_guard_stops_a_run_in_one_process_and_in_a_gang_and_it_goes_on_once_the_threshold_is_changed(
    slurm_sandbox: Sandbox, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to_the_end: bool
) -> None:
    for name, value in {**slurm_sandbox.env, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    undone = [("iter-00/pairs", 0), ("iter-00/reference", 0), ("iter-00/reference", 1), ("iter-00/train", 0)]
    run, _ = unfinished(finished_run, tmp_path / "run", *undone)
    asked = recipe(run.path)
    asked = replace(
        asked,
        cluster="slurm",
        slurm=SlurmConfig(query_seconds=0.5),
        train=replace(asked.train, resources=Resources(nodes=2, time=30)),
    )

    def stopped(**thresholds: float | None) -> str:
        with pytest.raises(RunFailed) as raised:
            launch(replace(asked, guard=GuardConfig(warn_length_gap=None, warn_reference_agreement=None, **thresholds)))
        return str(raised.value)

    said = stopped(stop_length_gap=-5.0)
    print(said)
    assert "iter-00/pairs shard 0: user_error: GuardStop: iter-00/pairs: the guard stopped the run: length_gap" in said
    assert "change the threshold (guard.stop_length_gap=...) and type the same command again" in said
    graph = read_graph(run)
    assert not run.job("iter-00/pairs").done(graph.fingerprints["iter-00/pairs"])

    said = stopped(stop_length_gap=5.0, stop_reference_agreement=1.0)
    print(said)
    assert run.job("iter-00/pairs").done(graph.fingerprints["iter-00/pairs"]), (
        "it went on after the threshold was changed"
    )
    assert (
        "iter-00/train shard 0: user_error: GuardStop: iter-00/train: the guard stopped the run: reference_agr" in said
    )
    failures = run.job("iter-00/train").failures()
    nodes = {failure.node for failure in failures}
    print(f"{len(failures)} of two processes told it, on {nodes}: {[failure.kind for failure in failures]}")
    assert {failure.kind for failure in failures} == {"user_error"}, "no process blames another that went before it"
    assert len({failure.attempt for failure in failures}) == 1, "it was not tried again"
    if to_the_end:
        launch(replace(asked, guard=GuardConfig(stop_length_gap=5.0, stop_reference_agreement=0.0)))
        (sentinel,) = run.job("iter-00/train").done(graph.fingerprints["iter-00/train"]).values()
        assert sentinel.num_processes == 2
