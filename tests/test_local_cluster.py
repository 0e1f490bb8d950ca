"""This machine as a cluster, with real processes: they outlive the driver, are known again, and die when asked to."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import TouchConfig, chain, child_environment, driven, eventually, write_run

from aipo_hpc.clusters import Submission
from aipo_hpc.clusters.local import LocalCluster, visible_gpus
from aipo_hpc.errors import RecipeError
from aipo_hpc.graph import Graph
from aipo_hpc.processes import descendants, start_time
from aipo_hpc.resources import Resources

A = "iter-00/a"

DRIVE = """
import sys
from pathlib import Path
from fakes import driven
from aipo_hpc.clusters.local import LocalCluster
from aipo_hpc.record import read_graph
from aipo_hpc.store import Run
run = Run(Path(sys.argv[1]))
graph = read_graph(run)
with driven(run, graph, LocalCluster()) as at_work:
    at_work.driver.follow(0.05)
"""


class Bench:
    """A run whose shards wait while the file ``hold`` is there, and a cluster to send them to."""

    def __init__(self, folder: Path, resources: Resources, num_shards: int = 4) -> None:
        self.hold, self.log = folder / "hold", folder / "executions"
        self.hold.touch()
        config = TouchConfig(hold=str(self.hold), executions=str(self.log), resources=resources)
        self.graph: Graph = chain(num_shards, config)
        self.run = write_run(folder / "run", self.graph, payload_timeout=20.0)
        self.cluster = LocalCluster()
        self.sent: list[Submission] = []
        self.owners: list[LocalCluster] = []

    def send(self, shard: int, cluster: LocalCluster | None = None) -> Submission:
        made = Submission(f"s-{len(self.sent)}", A, (shard,), (), 1, time.time())
        self.owners.append(cluster or self.cluster)
        self.sent.append(replace(made, id=self.owners[-1].submit(self.run, self.graph.jobs[A], made, ())))
        return self.sent[-1]

    def end(self) -> None:
        """Nothing is left running, and nothing unwaited for."""
        for owner, submission in zip(self.owners, self.sent, strict=True):
            owner.cancel([submission])
            assert eventually(lambda owner=owner, submission=submission: ended(owner, submission))

    def executions(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def done(self) -> set[int]:
        return set(self.run.job(A).done(self.graph.fingerprints[A]))


def pid(submission: Submission) -> int:
    assert submission.id is not None
    return int(submission.id.split(":")[0])


def gpus(submission: Submission) -> str:
    assert submission.id is not None
    return submission.id.split(":")[2]


def ended(cluster: LocalCluster, *submissions: Submission) -> bool:
    return not any(state.alive for states in cluster.states(submissions).values() for state in states.values())


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two GPUs, numbers 4 and 6, whose processes know the stage."""
    for name, value in child_environment(tmp_path / "site").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    return tmp_path


@pytest.fixture
def bench(machine: Path) -> Iterator[Bench]:
    """A run of which each shard takes a GPU."""
    made = Bench(machine, Resources(cpus_per_task=1, gpus_per_node=1, time=5))
    yield made
    made.end()


def test_a_shard_is_a_process_of_its_own_with_its_log_in_the_job_folder(bench: Bench) -> None:
    sent = bench.send(2)
    (state,) = bench.cluster.states([sent])[sent.name].values()
    assert state.alive and state.running
    assert start_time(pid(sent)) == sent.id.split(":")[1]  # type: ignore[union-attr]
    bench.hold.unlink()
    assert eventually(lambda: bench.done() == {2}, 60)
    assert eventually(lambda: ended(bench.cluster, sent))
    (sentinel,) = bench.run.job(A).done(bench.graph.fingerprints[A]).values()
    assert len(sentinel.gpus) == 1, "the task saw its one GPU"
    (log,) = bench.run.job(A).logs_of(sentinel)
    assert "iter-00/a shard 2: done" in log.read_text()


def test_a_cluster_that_starts_later_knows_running_processes_by_pid_and_start_time(bench: Bench) -> None:
    sent = bench.send(0)
    later = LocalCluster()
    assert later.states([sent])[sent.name][0].alive
    number, started, held = sent.id.split(":")  # type: ignore[union-attr]
    recycled = Submission("s-x", A, (0,), (), 1, 0.0, f"{number}:{int(started) - 1}:{held}")
    assert not later.states([recycled])["s-x"][0].alive, "a later process that got the same pid"
    later.cancel([recycled])
    assert later.states([sent])[sent.name][0].alive, "and it is not the one that cancel means"
    bench.hold.unlink()
    assert eventually(lambda: ended(later, sent), 60)
    assert later.states([sent])[sent.name][0].kind == "killed", "over; the sentinel tells that it is done"
    assert bench.done() == {0}


@pytest.mark.parametrize("identifier", [None, "4711", "4711_3", "nonsense:x"])
def test_what_another_cluster_was_given_is_unknown_here(bench: Bench, identifier: str | None) -> None:
    """A run that was begun on Slurm goes on here: the ids in its journal are Slurm's."""
    other = Submission("s-x", A, (0,), (), 1, 0.0, identifier)
    assert bench.cluster.states([other]) == {}
    bench.cluster.cancel([other])


def test_tasks_outlive_a_killed_driver_and_are_adopted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = subprocess.Popen([sys.executable, "-c", DRIVE, str(bench.run.path)])
    try:
        assert eventually(lambda: len(bench.executions()) == 2, 60), "one per GPU"
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with driven(bench.run, bench.graph, bench.cluster) as at_work:
        decision = at_work.driver.tick()
        assert decision.submit == () and decision.alive == {A: {0: True, 1: True}}, "both GPUs are taken by the adopted"
        bench.hold.unlink()
        at_work.driver.follow(0.05)
        for submission in at_work.journal.submissions.values():
            assert eventually(lambda submission=submission: ended(bench.cluster, submission))
    assert sorted(bench.executions()) == sorted(
        f"{name} {shard}" for name, job in bench.graph.jobs.items() for shard in range(job.num_shards)
    )
    assert all(bench.run.job(name).failures() == [] for name in bench.graph.jobs)


def test_cancel_ends_a_task_with_everything_below_it(bench: Bench) -> None:
    sent = bench.send(0)
    assert eventually(lambda: bench.executions() == ["iter-00/a 0"], 60)
    below = descendants(pid(sent))
    assert below, "submitit's runner has the worker below it"
    LocalCluster().cancel([sent])
    for process in (pid(sent), *below):
        assert eventually(lambda process=process: start_time(process) is None), process
    assert bench.done() == set()


# -- GPUs ------------------------------------------------------------------------------------------------------------


def test_each_shard_gets_gpus_that_nobody_holds(bench: Bench) -> None:
    assert bench.cluster.limits.gpus == 2
    assert [gpus(bench.send(0)), gpus(bench.send(1))] == ["4", "6"]


def test_the_gpus_of_adopted_tasks_are_taken(bench: Bench) -> None:
    first = bench.send(0)
    later = LocalCluster()
    later.states([first])
    assert gpus(bench.send(1, later)) == "6"


def test_the_gpu_of_a_finished_shard_is_free_again(bench: Bench) -> None:
    """The driver asks for the states of unfinished shards alone, so the cluster must see by itself who has gone."""
    bench.hold.unlink()
    for shard in range(4):
        sent = bench.send(shard)
        assert gpus(sent) == "4"
        assert eventually(lambda sent=sent: start_time(pid(sent)) is None, 60)
    assert bench.done() == {0, 1, 2, 3}


def test_a_task_that_is_done_but_still_leaving_keeps_its_gpu_until_it_has_left(bench: Bench) -> None:
    first, second = bench.send(0), bench.send(1)
    release = threading.Timer(0.5, bench.hold.unlink)
    release.start()
    third = bench.send(2)
    release.join()
    assert gpus(third) in (gpus(first), gpus(second))
    assert not all(start_time(pid(each)) for each in (first, second))


def test_a_shard_without_gpus_sees_none(machine: Path) -> None:
    bench = Bench(machine, Resources(cpus_per_task=1, time=5))
    bench.hold.unlink()
    assert gpus(bench.send(0)) == ""
    assert eventually(lambda: bench.done() == {0}, 60)
    assert bench.run.job(A).done(bench.graph.fingerprints[A])[0].gpus == ()
    bench.end()


@pytest.mark.parametrize(("listed", "expected"), [("", ()), ("0", (0,)), ("2,5, 7", (2, 5, 7)), ("-1", ())])
def test_only_the_gpus_that_are_left_to_us_are_used(
    monkeypatch: pytest.MonkeyPatch, listed: str, expected: tuple[int, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert visible_gpus() == expected


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (Resources(nodes=2), r"iter-00/a: resources\.nodes=2, but cluster=local is one machine\. Set it to 1"),
        (Resources(gpus_per_node=3), r"iter-00/a: resources\.gpus_per_node=3, but this machine has 2 GPUs"),
    ],
)
def test_what_the_machine_can_never_run_is_refused_by_field(
    monkeypatch: pytest.MonkeyPatch, resources: Resources, message: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(RecipeError, match=message):
        LocalCluster().check(chain(config=TouchConfig(resources=resources)))
    LocalCluster().check(chain(config=TouchConfig(resources=Resources(gpus_per_node=2))))


def test_the_cores_are_those_that_this_process_may_use() -> None:
    assert LocalCluster().limits.cpus == len(os.sched_getaffinity(0))
