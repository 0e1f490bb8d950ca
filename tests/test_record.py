"""job.json: all that a worker needs, and the graph again from the run directory alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import chain, write_run

from aipo_hpc.errors import RunError
from aipo_hpc.graph import Graph, build_graph
from aipo_hpc.recipe import load_recipe
from aipo_hpc.record import read_graph
from aipo_hpc.store import Run


@pytest.fixture(params=["demo", "chain"])
def graph(request: pytest.FixtureRequest) -> Graph:
    if request.param == "demo":
        return build_graph(replace(load_recipe("demo"), iterations=11))
    return chain(iterations=3)


def test_the_graph_comes_back_from_its_records_as_it_was(tmp_path: Path, graph: Graph) -> None:
    run = write_run(tmp_path / "run", graph)
    again = read_graph(Run(run.path))
    assert list(again.jobs) == list(graph.jobs), "in the same order, though names sort otherwise"
    assert again == graph


def test_a_record_is_what_a_worker_needs_and_can_be_read_by_people(tmp_path: Path, graph: Graph) -> None:
    run = write_run(tmp_path / "run", graph, payload_timeout=7.5)
    for name, job in graph.jobs.items():
        record = json.loads((run.path / name / "job.json").read_text())
        assert (record["name"], record["stage"], record["num_shards"]) == (name, job.stage, job.num_shards)
        assert record["fingerprint"] == graph.fingerprints[name] and record["payload_timeout"] == 7.5
        assert record["settings"].keys() >= record["content"]["settings"].keys()
        for source, edge in job.edges.items():
            said = record["inputs"][source]
            assert (said["job"], said["part"], said["by"]) == (edge.job, edge.part, edge.by)
            assert said["fingerprint"] == graph.fingerprints[edge.job]
            assert said["num_shards"] == graph.jobs[edge.job].num_shards


def test_a_run_without_jobs_says_what_to_type(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.create()
    run.write_recipe({"run_id": "cafe", "recipe": "x", "settings": {}})
    with pytest.raises(RunError, match=r"no jobs in it yet\. Type the launch command again"):
        read_graph(run)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", chain())
    (run.path / "iter-00" / "a" / "job.json").write_text("{")
    with pytest.raises(RunError, match=r"iter-00/a: no readable job\.json.*launch command again"):
        read_graph(Run(run.path))


def test_a_damaged_last_record_is_not_taken_for_a_shorter_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", chain())
    (run.path / "iter-00" / "c" / "job.json").write_text("")
    with pytest.raises(RunError, match=r"iter-00/c: no readable job\.json"):
        read_graph(Run(run.path))


def test_a_record_of_fields_that_this_version_does_not_have_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", chain())
    path = run.path / "iter-00" / "a" / "job.json"
    record = json.loads(path.read_text())
    record["settings"]["colour"] = "red"
    path.write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"iter-00/a: its job\.json .* another version .*no field 'colour'"):
        read_graph(Run(run.path))
