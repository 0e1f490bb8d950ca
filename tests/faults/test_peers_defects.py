"""Defects that other tools of this kind have shown, each as a whole story; their parts are tested beside the modules."""

from pathlib import Path

import pytest
from fakes import Clock, ScriptedCluster, chain, driven, execute, finish, write_run

from aipo_hpc.clusters import Limits, TaskState
from aipo_hpc.errors import ClusterError
from aipo_hpc.graph import Graph
from aipo_hpc.store import Run

A, B, C = "iter-00/a", "iter-00/b", "iter-00/c"


@pytest.fixture
def graph() -> Graph:
    return chain(num_shards=4)


@pytest.fixture
def run(tmp_path: Path, graph: Graph) -> Run:
    return write_run(tmp_path / "run", graph)


def sent(run: Run, job: str) -> list[list[int]]:
    """Shards of a job's submissions."""
    return [event["shards"] for event in run.read_journal() if event["event"] == "submit" and event["job"] == job]


def test_a_relaunch_while_the_array_is_queued_changes_neither_what_its_elements_compute_nor_sends_them_twice(
    run: Run, graph: Graph
) -> None:
    """Elsewhere: a relaunch rewrote the map from array index to shard, so shards ran twice and others not at all."""
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as first:
        first.driver.tick()
    array = cluster.taken[0]
    execute(run, array, 1)
    with driven(run, graph, cluster) as second:
        second.driver.tick()
        second.driver.tick()
    assert sent(run, A) == [[0, 1, 2, 3]]
    for index in (0, 2, 3):
        execute(run, array, index)
    done = run.job(A).done(graph.fingerprints[A])
    assert {shard: sentinel.attempt for shard, sentinel in done.items()} == {
        shard: f"{array.name}.{shard}.r0" for shard in range(4)
    }


def test_two_inputs_that_finish_in_the_same_moment_start_what_needs_both_once(run: Run, graph: Graph) -> None:
    """Elsewhere: each of the two that finished last took itself for the last, and both merged."""
    cluster = ScriptedCluster(limits=Limits(dependencies=False, max_array_size=1000, settle=0.0, query_interval=0.0))
    for job in (A, B):
        for shard in range(4):
            finish(run, graph, job, shard)
    with driven(run, graph, cluster) as at_work:
        for _ in range(3):
            at_work.driver.tick()
    assert sent(run, C) == [[0]]


def test_a_scheduler_that_fails_fifty_times_in_a_row_makes_the_driver_cancel_and_conclude_nothing(
    run: Run, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere: after thirty failed calls of sacct the driver cancelled what ran."""
    clock = Clock().install(monkeypatch)
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
        at_work.driver.tick()
        before = len(cluster.taken)
        cluster.outage = ClusterError("Unable to contact slurm controller")
        for _ in range(50):
            clock.sleep(60)
            at_work.driver.tick()
        assert cluster.cancelled == []
        assert len(cluster.taken) == before
        assert all(run.job(name).failures() == [] for name in graph.jobs)
        cluster.outage = None
        at_work.driver.tick()
        assert len(cluster.taken) == before


@pytest.mark.parametrize("told", [None, TaskState(alive=False), TaskState(alive=True)])
def test_neither_absence_nor_success_nor_an_unknown_state_makes_a_shard_done(
    run: Run, graph: Graph, monkeypatch: pytest.MonkeyPatch, told: TaskState | None
) -> None:
    """Elsewhere: a job that squeue did not list, or whose state was UNKNOWN, counted as completed."""
    clock = Clock().install(monkeypatch)
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
        for name in [each.name for each in cluster.taken]:
            if told is None:
                cluster.forgets.add(name)
            else:
                cluster.told[name] = dict.fromkeys(range(4), told)
        for _ in range(5):
            clock.sleep(30)
            decision = at_work.driver.tick()
            assert not decision.finished
    assert run.job(A).done(graph.fingerprints[A]) == {}


def test_leftovers_of_a_killed_attempt_disturb_the_next_one_nowhere(run: Run, graph: Graph) -> None:
    """Elsewhere: a temporary file that a killed attempt had left made every further attempt fail."""
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
    array = cluster.taken[0]
    for path in (run.path / A).rglob("*"):
        if path.is_dir():
            for name in (f".00000.json.{array.name}.0.r0.tmp", "00000.json.tmp", ".job.json.here.1.tmp"):
                (path / name).write_text("half")
    out, _ = run.job(A).begin_attempt(0, f"{array.name}.0.r0")
    (out / "out.txt").write_text("half")
    execute(run, array, 0)
    assert list(run.job(A).done(graph.fingerprints[A])) == [0]
    assert run.job(A).reports == []
