"""Driver, journal, worker and cluster together after failures: what is sent again, when, and with what changed."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import Clock, ScriptedCluster, TouchConfig, chain, driven, execute, touch, write_run

from aipo_hpc.adjustment import AS_ASKED, Adjustment
from aipo_hpc.clusters import Dependency, TaskState
from aipo_hpc.clusters.inline import InlineCluster
from aipo_hpc.errors import SubmitRefused
from aipo_hpc.graph import Graph, make_graph
from aipo_hpc.journal import Journal
from aipo_hpc.plan import plan_table
from aipo_hpc.store import Run
from aipo_hpc.terminal import job_table

A = "iter-00/a"


@pytest.fixture
def graph() -> Graph:
    return make_graph([touch(A, 4)])


def over(kind: str, node: str = "n1", seconds: float = 5.0) -> TaskState:
    return TaskState(alive=False, kind=kind, detail=f"Slurm: {kind}", node=node, seconds=seconds)


def test_an_element_out_of_memory_is_sent_again_after_a_while_with_more_of_it(
    run: Run, graph: Graph, clock: Clock
) -> None:
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
        cluster.told[cluster.taken[0].name] = {2: over("out_of_memory")}
        waited = []
        for _ in range(30):
            clock.sleep(1)
            waited.append(bool(at_work.driver.tick().waiting))
        assert any(waited), "it was sent again at once"
        again = cluster.taken[1]
        assert (again.shards, again.adjustment) == ((2,), Adjustment(memory=1.5, batch=2))
        assert any("with 1.5 x the memory, 1/2 of the batch" in line for line in at_work.lines)
    assert Journal(Run(run.path)).submissions[again.name].adjustment == again.adjustment


def test_what_the_site_does_not_give_is_asked_for_as_the_recipe_says(run: Run, graph: Graph, clock: Clock) -> None:
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
        cluster.told[cluster.taken[0].name] = {1: over("timeout")}
        cluster.answers = [SubmitRefused("Requested time limit is invalid")]
        for _ in range(30):
            clock.sleep(1)
            at_work.driver.tick()
        again = cluster.taken[1]
        assert (again.shards, again.adjustment) == ((1,), AS_ASKED)
        assert any("refused with 2 x the time, sent without: Requested time limit" in line for line in at_work.lines)


def test_a_death_after_some_progress_is_recorded_as_such(run: Run, graph: Graph, clock: Clock) -> None:
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
        name = cluster.taken[0].name
        out, _ = run.job(A).begin_attempt(1, f"{name}.1.r1")
        (out / "advanced").touch()
        run.job(A).begin_attempt(2, f"{name}.2.r0")
        cluster.told[name] = {1: over("timeout", "n2"), 2: over("timeout", "n3")}
        for _ in range(20):
            clock.sleep(1)
            at_work.driver.tick()
    told = {failure.shard: (failure.progressed, failure.node, failure.seconds) for failure in run.job(A).failures()}
    assert told == {1: (True, "n2", 5.0), 2: (False, "n3", 5.0)}
    assert [send.adjustment.time for send in cluster.taken[1:] if 1 in send.shards] == [1.0]
    assert [send.adjustment.time for send in cluster.taken[1:] if 2 in send.shards] == [2.0]


def test_a_black_hole_is_told_once_written_down_and_kept_off(run: Run, graph: Graph, clock: Clock) -> None:
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
        runs = TaskState(alive=True, running=True, node="n2", seconds=500)
        cluster.told[cluster.taken[0].name] = {0: over("killed"), 1: over("killed"), 2: over("killed"), 3: runs}
        for _ in range(30):
            clock.sleep(1)
            at_work.driver.tick()
        told = [line for line in at_work.lines if "nothing is sent there any more" in line]
    assert len(told) == 1 and "node n1" in told[0] and "3 shards of iter-00/a" in told[0]
    assert [event["node"] for event in run.read_journal() if event["event"] == "exclude"] == ["n1"]
    assert cluster.taken[1].adjustment.exclude == ("n1",) and cluster.taken[1].shards == (0, 1, 2)


def test_a_requeued_task_that_failed_before_has_at_most_one_other_and_that_behind_it(
    run: Run, graph: Graph, clock: Clock
) -> None:
    """Slurm requeues a job whose node or priority it took; what its processes said while dying is no news."""
    reason = run.path / "reason"
    reason.write_text("RuntimeError Connection closed by peer")
    failing = make_graph([touch(A, 4, TouchConfig(fail=str(reason)))])
    for job in failing.jobs.values():
        run.job(A).create({**(run.job(A).read_job() or {}), "settings": {"fail": str(reason)}})
        assert job.name == A
    cluster = ScriptedCluster()
    clock.now = time.time()  # what the worker goes by
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
        with pytest.raises(RuntimeError):
            execute(run, cluster.taken[0], 1)
        assert [failure.kind for failure in run.job(A).failures()] == ["killed"]
        for _ in range(60):
            clock.sleep(1)
            at_work.driver.tick()
        first, again = cluster.taken
        assert (again.shards, again.after) == ((1,), (Dependency(first.name, "afterany", (1,)),))
        reason.unlink()
        execute(run, first, 1)
        (done,) = run.job(A).done(graph.fingerprints[A], only={1}).values()
        execute(run, again, 0)
        at_work.driver.tick()
    assert run.job(A).done(graph.fingerprints[A])[1] == done, "the other one found it done and left it"
    assert len(cluster.taken) == 2


def test_a_shard_out_of_memory_runs_with_smaller_batches_and_its_result_is_the_same(tmp_path: Path) -> None:
    reason = tmp_path / "reason"
    reason.write_text("MemoryError no more")
    graph = chain(1, TouchConfig(fail=str(reason)))
    run = write_run(tmp_path / "run", graph)
    with driven(run, graph, InlineCluster()) as at_work:
        assert at_work.driver.tick().submit[0].adjustment == AS_ASKED
        reason.unlink()
        at_work.driver.follow(0.05)
    widths = [path.read_text() for path in sorted((run.path / A / "shards/00000").glob("*/width"))]
    assert widths == ["8", "4"]
    assert run.job(A).done(graph.fingerprints[A])[0].rows == 1


def test_the_wait_is_told_by_plan_and_status(tmp_path: Path, graph: Graph) -> None:
    reason = tmp_path / "reason"
    reason.write_text("RuntimeError not today")
    failing = make_graph([touch(A, 1, replace(TouchConfig(), fail=str(reason)))])
    run = write_run(tmp_path / "failing", failing)
    with driven(run, failing, InlineCluster()) as at_work:
        at_work.driver.tick()
    (cell,) = plan_table(failing, run).columns[5].cells
    assert "failed before: error 1" in str(cell) and "retry in " in str(cell)
    cells = job_table(failing, run, {}).columns[4].cells
    assert "retry in " in str(next(iter(cells)))
