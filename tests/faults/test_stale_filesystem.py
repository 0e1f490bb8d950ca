"""The run directory on a file system whose nodes see each other's changes late: nothing is missed, believed or lost by it.

The driver and all readers live on node A, the workers on node B; each may see the other's changes up to a minute late.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import OUT, TouchConfig, chain, driven, finish, sentinel, write_run
from two_nodes import two_nodes

from aipo_hpc import lease, worker
from aipo_hpc.clusters import Submission
from aipo_hpc.clusters.inline import InlineCluster
from aipo_hpc.errors import InputNotVisible, RunError
from aipo_hpc.graph import Graph, Job
from aipo_hpc.launch import launch
from aipo_hpc.recipe import Recipe
from aipo_hpc.record import read_graph
from aipo_hpc.sentinel import Sentinel
from aipo_hpc.store import Run

JOB = "iter-00/a"
STALE = 60.0
"""Seconds for which the slow file system may answer from memory: far longer than any test waits."""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    with two_nodes(tmp_path, STALE) as views:
        yield views


@pytest.fixture
def graph() -> Graph:
    return chain(num_shards=2)


@pytest.fixture
def runs(nodes: tuple[Path, Path], graph: Graph) -> tuple[Run, Run]:
    """One run, as node A and as node B see it."""
    here = write_run(nodes[0] / "run", graph)
    return here, Run(nodes[1] / "run")


def seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def test_the_file_system_of_these_tests_is_stale(nodes: tuple[Path, Path]) -> None:
    a, b = nodes
    assert not (b / "file").exists()
    (a / "file").write_text("x")
    assert not (b / "file").exists(), "absent names are not remembered: these tests would prove nothing"
    assert os.listdir(b) == ["file"]
    (a / "grows").write_text("x")
    assert (b / "grows").stat().st_size == 1
    (a / "grows").write_text("xyz")
    assert (b / "grows").read_text() == "x", "sizes are not remembered: these tests would prove nothing"


# -- primitives ------------------------------------------------------------------------------------------------------


def test_a_sentinel_is_found_by_the_first_look_after_it_is_there(runs: tuple[Run, Run], graph: Graph) -> None:
    here, there = runs
    for shard in range(2):
        assert shard not in here.job(JOB).done(graph.fingerprints[JOB])
        made = finish(there, graph, JOB, shard)
        took = seconds(lambda: here.job(JOB).done(graph.fingerprints[JOB]))
        assert here.job(JOB).done(graph.fingerprints[JOB])[shard] == made
        print(f"found by one listing, {took * 1000:.1f} ms, where a look by name may be {STALE:g} s behind")
    assert here.job(JOB).reports == []


def test_what_is_done_is_never_called_missing_and_the_other_way_round(runs: tuple[Run, Run], graph: Graph) -> None:
    here, there = runs
    finish(there, graph, JOB, 0)
    assert list(here.job(JOB).done(graph.fingerprints[JOB])) == [0]
    there.job(JOB).retract(0)
    assert list(here.job(JOB).done(graph.fingerprints[JOB])) == []
    assert list(Run(here.path).job(JOB).done(graph.fingerprints[JOB])) == []


def test_a_payload_is_read_as_soon_as_it_can_be(runs: tuple[Run, Run], graph: Graph) -> None:
    here, there = runs
    made = finish(there, graph, JOB, 0, "what node B wrote\n")
    (path,) = here.job(JOB).wait_for_payload(made, OUT, 5.0)
    assert path.read_text() == "what node B wrote\n"


def test_a_payload_that_stays_invisible_is_a_named_error_after_the_bounded_wait(
    runs: tuple[Run, Run], graph: Graph
) -> None:
    here, there = runs
    folder = here.job(JOB).attempt_folder(0, "one")
    folder.mkdir(parents=True)
    assert not (folder / OUT).exists()  # node A remembers for a minute that there is no such file
    made = finish(there, graph, JOB, 0)

    def wait() -> None:
        with pytest.raises(InputNotVisible, match=rf"{OUT}: the sentinel of {JOB} shard 0 states 2 bytes.* after 1 s"):
            here.job(JOB).wait_for_payload(made, OUT, 1.0)

    assert 1.0 <= seconds(wait) < 4.0


@pytest.mark.parametrize("before", ["x", "old and longer than what comes after it\n", "z\n"])
def test_a_payload_seen_before_it_was_whole_is_waited_for_and_not_taken_for_altered(
    tmp_path: Path, graph: Graph, before: str
) -> None:
    with two_nodes(tmp_path / "quicker", 3.0) as (a, b):
        here, there = write_run(a / "run", graph), Run(b / "run")
        path, _ = there.job(JOB).begin_attempt(0, "one")
        (path / OUT).write_text(before)
        assert (here.job(JOB).attempt_folder(0, "one") / OUT).read_text() == before
        made = finish(there, graph, JOB, 0, "y\n")
        (found,) = here.job(JOB).wait_for_payload(made, OUT, 30.0)
        assert found.read_text() == "y\n"


def test_an_altered_payload_is_a_named_error_after_the_bounded_wait(runs: tuple[Run, Run], graph: Graph) -> None:
    here, there = runs
    made = finish(there, graph, JOB, 0, "right\n")
    there.job(JOB).files(made)[0].write_text("wrong\n")

    def wait() -> None:
        with pytest.raises(
            InputNotVisible, match=rf"{OUT}: the sentinel of {JOB} shard 0 .* of other content after 1 s"
        ):
            here.job(JOB).wait_for_payload(made, OUT, 1.0)

    assert 1.0 <= seconds(wait) < 4.0


def test_of_two_nodes_that_publish_one_shard_the_first_wins_and_both_see_the_same(
    runs: tuple[Run, Run], graph: Graph
) -> None:
    folders = [run.job(JOB) for run in runs]
    trials = 20
    wins = [0, 0]
    for trial in range(trials):
        won = [False, False]
        start = threading.Barrier(2)

        def publish(number: int, trial: int, won: list[bool], start: threading.Barrier) -> None:
            folders[number].begin_attempt(trial, f"node-{number}")
            start.wait()
            won[number] = folders[number].publish(sentinel(graph, JOB, trial, f"node-{number}"))

        threads = [threading.Thread(target=publish, args=(number, trial, won, start)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == [False, True], f"{sum(won)} winners"
        winner = f"node-{won.index(True)}"
        for run in runs:
            assert Run(run.path).job(JOB).done(graph.fingerprints[JOB])[trial].attempt == winner
            assert sorted(path.name for path in (run.path / JOB / "shards" / f"{trial:05d}").iterdir()) == [winner]
        wins[won.index(True)] += 1
    assert not list((runs[0].path / "set-aside").glob("*"))
    print(f"{trials} shards published by both nodes at once: one winner each, {wins[0]} by A and {wins[1]} by B")


def test_a_node_that_remembers_an_older_job_record_waits_for_the_new_one(tmp_path: Path, graph: Graph) -> None:
    """A relaunch with other tuning rewrites job.json; a node that knows the old size reads only a part of the new one."""
    with two_nodes(tmp_path / "quicker", 3.0) as (a, b):
        here = write_run(a / "run", graph)
        assert Run(b / "run").job(JOB).read_job() is not None
        record = here.job(JOB).read_job()
        assert record is not None
        here.job(JOB).create({**record, "note": "longer than before " * 10})
        worker.Envelope(str(b / "run"), JOB, 0, "aipo-cafe-1", 0, 1).run()
        assert list(here.job(JOB).done(graph.fingerprints[JOB])) == [0]


def test_a_relaunch_with_the_same_settings_leaves_job_records_alone(runs: tuple[Run, Run], graph: Graph) -> None:
    here, _ = runs
    before = (here.path / JOB / "job.json").stat().st_ino
    write_run(here.path, graph)
    assert (here.path / JOB / "job.json").stat().st_ino == before


# -- lease -----------------------------------------------------------------------------------------------------------


def test_of_two_nodes_that_want_to_drive_one_does(runs: tuple[Run, Run]) -> None:
    here, there = runs
    assert not (there.path / "driver.lease").exists()  # node B remembers that nobody drives
    with lease.Lease(here) as held:
        with pytest.raises(RunError, match="is being driven by process"), lease.Lease(there):
            pytest.fail("two drivers at once")
        assert held.holds()
    with lease.Lease(there) as other:
        assert other.holds()


def test_a_driver_that_is_replaced_from_another_node_sends_nothing_more(
    runs: tuple[Run, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not renew for so long that another took over; what its node remembers says that it still drives."""
    here, there = runs
    with lease.Lease(here) as stalled:
        assert stalled.holds()
        now = time.time()
        with monkeypatch.context() as later:
            later.setattr(platform, "node", lambda: "node-b")
            later.setattr(lease.time, "time", lambda: now + 200)
            with lease.Lease(there) as successor:
                assert successor.holds()
                assert not stalled.holds(), "two drivers at once"


# -- a whole run -----------------------------------------------------------------------------------------------------


class OtherNode(InlineCluster):
    """Runs shards in this process, on the other node's view of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: list[float] = []

    def submit(self, run: Run, job: Job, submission: Submission, after: object) -> str:
        super().submit(Run(self.path), job, submission, ())
        self.finished.append(time.monotonic())
        return submission.name


def test_a_driver_learns_within_one_look_what_workers_on_another_node_finished(
    nodes: tuple[Path, Path],
) -> None:
    a, b = nodes
    graph = chain(num_shards=4, config=TouchConfig(), iterations=2)
    run = write_run(a / "run", graph)
    cluster = OtherNode(b / "run")
    began = time.monotonic()
    with driven(run, graph, cluster) as at_work:
        looks = 0
        while not at_work.driver.tick().finished:
            looks += 1
            assert looks < 60, at_work.lines
    assert sum(len(run.job(name).failures()) for name in graph.jobs) == 0
    assert len(cluster.finished) == sum(job.num_shards for job in graph.jobs.values())
    took = time.monotonic() - began
    assert took < STALE
    print(f"{len(cluster.finished)} shards in {looks} looks and {took:.1f} s, with caches of {STALE:g} s")


def test_the_whole_small_run_with_its_driver_on_one_node_and_its_workers_on_the_other(
    nodes: tuple[Path, Path], small_recipe: Recipe
) -> None:
    a, b = nodes
    recipe = replace(small_recipe, iterations=2, run_dir=str(a / "run"), payload_timeout=20.0)
    run = launch(recipe, OtherNode(b / "run"))
    graph = read_graph(run)
    done = {name: run.job(name).done(graph.fingerprints[name]) for name in graph.jobs}
    assert {name: len(each) for name, each in done.items()} == {
        name: job.num_shards for name, job in graph.jobs.items()
    }
    assert sum(len(run.job(name).failures()) for name in graph.jobs) == 0, "something was taken for missing"
    reports = [event for event in run.read_journal() if event["event"] == "report"]
    assert reports == [], "something whole was not believed"
    executions = [path for name in graph.jobs for path in (run.path / name / "shards").glob("*/*")]
    assert len(executions) == sum(job.num_shards for job in graph.jobs.values())


def test_a_sentinel_that_replaces_a_retracted_one_is_believed_once_the_node_sees_it(
    tmp_path: Path, graph: Graph
) -> None:
    with two_nodes(tmp_path / "quicker", 3.0) as (a, b):
        here, there = write_run(a / "run", graph), Run(b / "run")
        finish(here, graph, JOB, 0)
        assert list(there.job(JOB).done(graph.fingerprints[JOB])) == [0]
        here.job(JOB).retract(0)
        text = "another and longer payload\n"
        made: Sentinel = replace(sentinel(graph, JOB, 0, "two"), host="a host with a longer name")
        here.job(JOB).begin_attempt(0, "two")
        (here.job(JOB).attempt_folder(0, "two") / OUT).write_text(text)
        made = replace(made, outputs=(worker.describe(here.job(JOB).attempt_folder(0, "two"), OUT),))
        here.job(JOB).publish(made)
        fresh = Run(there.path).job(JOB)
        found = worker.wait_for_sentinels(fresh, graph.fingerprints[JOB], [0], 30.0)
        assert found[0] == made
        assert json.loads((there.path / JOB / "done" / "00000.json").read_text())["attempt"] == "two"
