"""Finished work that is damaged is found, judged by two, made again, and not for ever."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import Driven, TouchConfig, chain, driven, finish, touch, write_run

from aipo_hpc import worker
from aipo_hpc.clusters.inline import InlineCluster
from aipo_hpc.damage import Inspector, answerable
from aipo_hpc.errors import InputNotVisible, RunFailed
from aipo_hpc.graph import Graph, make_graph
from aipo_hpc.launch import launch
from aipo_hpc.recipe import Recipe
from aipo_hpc.record import read_graph
from aipo_hpc.sentinel import Blame, Failure
from aipo_hpc.store import Run

A, B = "iter-00/a", "iter-00/b"


@pytest.fixture
def graph() -> Graph:
    return chain(num_shards=2)


@pytest.fixture
def run(tmp_path: Path, graph: Graph) -> Run:
    return write_run(tmp_path / "run", graph, payload_timeout=0.2)


def payload(run: Run, graph: Graph, job: str, shard: int) -> Path:
    fresh = Run(run.path).job(job)
    return fresh.files(fresh.done(graph.fingerprints[job])[shard])[0]


def damage_payload(run: Run, graph: Graph) -> None:
    payload(run, graph, A, 1).write_text("altered\n")


def damage_payload_in_place(run: Run, graph: Graph) -> None:
    path = payload(run, graph, A, 1)
    path.write_text(path.read_text().swapcase())


def remove_payload(run: Run, graph: Graph) -> None:
    payload(run, graph, A, 1).unlink()


def remove_payload_folder(run: Run, graph: Graph) -> None:
    shutil.rmtree(payload(run, graph, A, 1).parent)


def cut_sentinel(run: Run, graph: Graph) -> None:
    path = run.path / A / "done" / "00001.json"
    path.write_text(path.read_text()[:-30])


def remove_sentinel(run: Run, graph: Graph) -> None:
    (run.path / A / "done" / "00001.json").unlink()


DAMAGES = [
    damage_payload, damage_payload_in_place, remove_payload, remove_payload_folder, cut_sentinel, remove_sentinel,
]  # fmt: skip


def finish_a(run: Run, graph: Graph) -> None:
    for shard in range(2):
        worker.Envelope(str(run.path), A, shard, "aipo-cafe-0", shard, 0).run()


def follow(at_work: Driven, looks: int = 40) -> None:
    for _ in range(looks):
        decision = at_work.driver.tick()
        if decision.finished:
            return
        if decision.stuck:
            raise RunFailed(str(decision.given_up))
    pytest.fail("\n".join(at_work.lines))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("known", [True, False])
def test_damaged_work_is_made_again_and_the_run_finishes_without_a_human(
    run: Run, graph: Graph, damage: Callable[[Run, Graph], None], known: bool
) -> None:
    """``known``: the driver had seen the sentinel while it was whole."""
    finish_a(run, graph)
    whole = payload(run, graph, A, 1).read_bytes()
    if known:
        run.job(A).done(graph.fingerprints[A])
    damage(run, graph)
    with driven(run, graph, InlineCluster()) as at_work:
        follow(at_work)
    assert payload(run, graph, A, 1).read_bytes() == whole
    recorded = [failure for failure in run.job(A).failures() if failure.kind == "damaged"]
    executions = len(list((run.path / A / "shards" / "00001").iterdir()))
    print(f"{len(recorded)} damage recorded, {executions} attempts left; " + "; ".join(at_work.lines)[:300])
    assert sorted(run.job(A).done(graph.fingerprints[A])) == [0, 1]


def test_damage_is_journalled_told_and_only_the_damaged_shard_is_made_again(run: Run, graph: Graph) -> None:
    finish_a(run, graph)
    damage_payload(run, graph)
    with driven(run, graph, InlineCluster()) as at_work:
        follow(at_work)
    (told,) = [line for line in at_work.lines if "computed again" in line]
    assert f"{A} shard 1: finished, but" in told and "is 8 bytes" in told
    (noted,) = [event for event in run.read_journal() if event["event"] == "retract"]
    assert (noted["job"], noted["shard"]) == (A, 1)
    sent = [event for event in run.read_journal() if event["event"] == "submit" and event["job"] == A]
    assert [event["shards"] for event in sent] == [[1]]
    assert list((run.path / "set-aside").iterdir()), "the sentinel was not kept"


def test_a_blame_by_a_node_that_sees_less_than_the_driver_retracts_nothing(run: Run, graph: Graph) -> None:
    made = finish(run, graph, A, 0)
    blamed = Failure(B, 0, "s-1.0.r0", 1, "input_not_visible", "not there", blames=(Blame(A, 0, made.digest),))
    assert Inspector(run, graph).look({B: [blamed]}) == []
    unseen = replace(blamed, blames=(Blame(A, 0),))
    assert Inspector(run, graph).look({B: [unseen]}) == []


def test_a_blame_of_what_was_made_again_since_is_past(run: Run, graph: Graph) -> None:
    made = finish(run, graph, A, 0)
    blamed = Failure(B, 0, "s-1.0.r0", 1, "input_not_visible", "", blames=(Blame(A, 0, "0" * 64),))
    run.job(A).files(made)[0].write_text("altered\n")
    assert Inspector(run, graph).look({B: [blamed]}) == []


def test_a_blame_is_judged_once_and_many_blames_of_one_shard_are_one_damage(run: Run, graph: Graph) -> None:
    made = finish(run, graph, A, 0)
    run.job(A).files(made)[0].unlink()
    blames = (Blame(A, 0, made.digest),)
    failures = {B: [Failure(B, 0, f"s-{n}.0.r0", 1, "input_not_visible", "", blames=blames) for n in range(3)]}
    inspector = Inspector(run, graph)
    assert [(each.job, each.shard) for each in inspector.look(failures)] == [(A, 0)]
    assert inspector.look(failures) == []


def test_a_failure_keeps_its_blames_on_disk_and_one_that_was_written_without_is_read(run: Run) -> None:
    blamed = Failure(B, 0, "s-1.0.r0", 1, "input_not_visible", "not there", blames=(Blame(A, 0, "12"), Blame(A, 1)))
    run.job(B).record_failure(blamed)
    assert Run(run.path).job(B).failures() == [blamed]
    path = run.path / B / "failed" / "00000.1.json"
    path.write_text(path.read_text().replace('"blames"', '"blame"'))
    assert Run(run.path).job(B).failures() == []
    for nonsense in ("[]", '{"blames": 3}', '{"blames": [{"x": 1}]}', "null"):
        path.write_text(nonsense)
        assert Run(run.path).job(B).failures() == []


def test_a_worker_names_all_inputs_that_it_misses_in_one_failure(run: Run, graph: Graph) -> None:
    finish_a(run, graph)
    for shard in range(2):
        finish(run, graph, B, shard)
        payload(run, graph, B, shard).unlink()
    with pytest.raises(InputNotVisible, match=r"(?s)b/shards/00000/.*b/shards/00001/"):
        worker.Envelope(str(run.path), "iter-00/c", 0, "aipo-cafe-9", 0, 1).run()
    (failure,) = run.job("iter-00/c").failures()
    assert [(blame.job, blame.shard) for blame in failure.blames] == [(B, 0), (B, 1)]
    assert failure.kind == "input_not_visible"


class Vandal(InlineCluster):
    """Something that spoils the first job's file whenever it is written."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def submit(self, run: Run, job: object, submission: object, after: object) -> str:
        name = super().submit(run, job, submission, ())  # type: ignore[arg-type]
        if job.name == A:  # type: ignore[attr-defined]
            payload(run, self._graph, A, 0).write_text("spoilt\n")
        return name


def test_work_that_is_damaged_again_and_again_ends_the_run_with_what_to_look_for(tmp_path: Path) -> None:
    graph = chain(num_shards=1)
    run = write_run(tmp_path / "run", graph, payload_timeout=0.0)
    with driven(run, graph, Vandal(graph)) as at_work, pytest.raises(RunFailed, match=r"damaged.*is 7 bytes"):
        follow(at_work)
    assert len([event for event in run.read_journal() if event["event"] == "retract"]) == 4


def test_prompts_that_are_damaged_are_read_again_by_the_driver(small_recipe: Recipe) -> None:
    prepared = launch(replace(small_recipe, iterations=1, drive="prepare", payload_timeout=0.2))
    graph = read_graph(prepared)
    path = payload(prepared, graph, "iter-00/prompts", 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    run = launch(replace(small_recipe, iterations=1, payload_timeout=0.2))
    assert payload(run, graph, "iter-00/prompts", 0).read_bytes() == whole
    assert len(run.job("iter-00/train").done(graph.fingerprints["iter-00/train"])) == 1


class Careless(InlineCluster):
    """Something that removes the sentinel of the prompts while the run goes on."""

    removed = False

    def submit(self, run: Run, job: object, submission: object, after: object) -> str:
        if not self.removed:
            (run.path / "iter-00" / "prompts" / "done" / "00000.json").unlink()
            self.removed = True
        return super().submit(run, job, submission, ())  # type: ignore[arg-type]


def test_prompts_whose_sentinel_is_removed_while_the_run_goes_on_are_read_again(small_recipe: Recipe) -> None:
    cluster = Careless()
    run = launch(replace(small_recipe, iterations=1, payload_timeout=0.2), cluster)
    graph = read_graph(run)
    assert cluster.removed
    assert len(run.job("iter-00/train").done(graph.fingerprints["iter-00/train"])) == 1


def test_damage_to_a_job_that_is_not_in_the_graph_any_more_is_nobodys(run: Run, tmp_path: Path) -> None:
    other = make_graph([touch(A, 1, TouchConfig())])
    blamed = Failure(A, 0, "s-1.0.r0", 1, "input_not_visible", "", blames=(Blame("iter-09/a", 0, "12"),))
    assert Inspector(run, other).look({A: [blamed]}) == []


def test_a_worker_that_was_right_to_blame_its_input_speaks_against_neither_its_node_nor_its_shard() -> None:
    def blamed(node: str, at: float) -> Failure:
        blames = (Blame(A, 1, "12"),)
        return Failure(B, 1, f"s-{at}.1.r0", 1, "input_not_visible", "", time=at, node=node, blames=blames)

    right, later = blamed("n1", 10.0), blamed("n2", 30.0)
    found = Failure(A, 1, "s-1.1.r0", 1, "damaged", "", time=20.0)
    assert answerable({B: [right, later]}) == {B: [right, later]}, "nobody found anything damaged"
    assert answerable({A: [found], B: [right, later]}) == {A: [found], B: [later]}
