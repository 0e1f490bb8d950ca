"""Drift: a relaunch with other content settings is refused by job, field, old and new value."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import chain, finish, touch, write_run

from aipo_hpc.cancel import reset_job
from aipo_hpc.drift import drifts, refuse_drift
from aipo_hpc.errors import DriftError
from aipo_hpc.graph import Graph, build_graph, make_graph
from aipo_hpc.journal import Journal
from aipo_hpc.outside import Outside
from aipo_hpc.recipe import Recipe, load_recipe
from aipo_hpc.resources import Resources
from aipo_hpc.stage_table import STAGES
from aipo_hpc.store import Run


@pytest.fixture
def demo(tmp_path: Path) -> Recipe:
    return replace(load_recipe("demo"), run_dir=str(tmp_path / "run"))


def worked_on(path: Path, graph: Graph) -> Run:
    """A run in which a shard of each job is finished."""
    run = write_run(path, graph)
    for job in graph.jobs:
        finish(run, graph, job, 0)
    return run


def launched(recipe: Recipe) -> Run:
    return worked_on(recipe.folder(), build_graph(recipe))


def test_the_same_settings_do_not_drift(demo: Recipe) -> None:
    refuse_drift(launched(demo), build_graph(demo))


def test_a_new_run_directory_has_nothing_to_drift_from(demo: Recipe) -> None:
    refuse_drift(Run(demo.folder()), build_graph(demo))


def test_the_message_names_job_field_old_new_and_both_ways_out(demo: Recipe) -> None:
    run = launched(demo)
    changed = replace(demo, train=replace(demo.train, beta=0.25))
    with pytest.raises(DriftError) as refused:
        refuse_drift(run, build_graph(changed))
    text = str(refused.value)
    print(text)
    for number in range(demo.iterations):
        assert f"iter-{number:02d}/train: settings.beta: 0.1 -> 0.25" in text
    assert str(run.path) in text and "a run directory of their own (run_dir=...)" in text
    assert f"python -m aipo_hpc reset {run.path} iter-00/train" in text
    assert "generate" not in text and "evaluate" not in text, "what only follows has no line of its own"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda r: replace(r, seed=7), "iter-00/prompts: seed: 42 -> 7"),
        (lambda r: replace(r, generate=replace(r.generate, num_shards=3)), "iter-00/generate: num_shards: 2 -> 3"),
        (lambda r: replace(r, model_name_or_path="org/m"), "iter-00/generate: inputs.policy.identity: 'sha256:"),
        (lambda r: replace(r, generate=replace(r.generate, top_p=0.5)), "iter-00/generate: settings.top_p: 1 -> 0.5"),
    ],
)  # fmt: skip
def test_every_part_of_content_is_told_by_its_name(demo: Recipe, change: Callable[[Recipe], Recipe], line: str) -> None:
    with pytest.raises(DriftError) as refused:
        refuse_drift(launched(demo), build_graph(change(demo)))
    assert line in str(refused.value), refused.value


def test_a_finished_run_may_be_extended_and_tuned(demo: Recipe) -> None:
    run = launched(demo)
    more = replace(
        demo,
        iterations=demo.iterations + 2,
        cluster="slurm",
        slurm=replace(demo.slurm, partition="gpu"),
        train=replace(demo.train, per_device_train_batch_size=1, resources=Resources(nodes=2, time=9)),
    )
    refuse_drift(run, build_graph(more))
    fewer = replace(demo, iterations=1)
    refuse_drift(run, build_graph(fewer))


def test_finished_shards_still_count_in_an_extended_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", chain())
    finish(run, chain(), "iter-00/a", 1)
    longer = chain(iterations=3)
    assert list(Run(run.path).job("iter-00/a").done(longer.fingerprints["iter-00/a"])) == [1]


def test_the_way_out_leads_out(demo: Recipe) -> None:
    run = launched(demo)
    changed = build_graph(replace(demo, train=replace(demo.train, beta=0.25)))
    reset_job(run, "iter-00/train")
    refuse_drift(Run(run.path), changed)
    assert (run.path / "iter-00/generate/job.json").exists() and not (run.path / "iter-01/generate").exists()


def test_what_nothing_was_sent_of_and_nothing_is_finished_of_may_still_change(demo: Recipe) -> None:
    graph = build_graph(demo)
    run = write_run(demo.folder(), graph)
    finish(run, graph, "iter-00/generate", 0)
    changed = build_graph(replace(demo, train=replace(demo.train, beta=0.25)))
    refuse_drift(run, changed)
    Journal(run).intend("cafe", "iter-00/train", (0,), ())
    with pytest.raises(DriftError, match=r"iter-00/train: settings\.beta: 0\.1 -> 0\.25"):
        refuse_drift(run, changed)


def test_a_new_version_of_a_stage_counts_as_drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = worked_on(tmp_path / "run", chain())
    monkeypatch.setitem(STAGES, "touch", replace(STAGES["touch"], version=2))  # type: ignore[arg-type]
    with pytest.raises(DriftError, match="iter-00/a: version: 1 -> 2"):
        refuse_drift(run, chain())


def test_an_input_that_comes_goes_or_is_wired_otherwise_is_told(tmp_path: Path) -> None:
    def wired(**inputs: tuple[str, str]) -> Graph:
        return make_graph([touch("iter-00/a"), touch("iter-00/z"), touch("iter-00/b", **inputs)])

    run = worked_on(tmp_path / "run", wired(source=("iter-00/a", "all")))
    other = drifts(run, wired(source=("iter-00/z", "all")))
    assert other == {"iter-00/b": ["inputs.source.job: 'iter-00/a' -> 'iter-00/z'"]}
    (lines,) = drifts(run, wired(other=("iter-00/a", "all"))).values()
    assert [line.split(":")[0] for line in lines] == ["inputs.other", "inputs.source"]


def test_a_job_json_that_is_damaged_does_not_stop_the_launch_that_writes_it_anew(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", chain())
    (run.path / "iter-00/a/job.json").write_text("{")
    assert drifts(run, chain()) == {}


def test_where_an_input_from_outside_lies_is_no_drift(tmp_path: Path) -> None:
    def reading(value: str, identity: str) -> Graph:
        return make_graph([replace(touch("iter-00/a"), inputs={"source": Outside(value, identity)})])

    run = worked_on(tmp_path / "run", reading("/here", "sha256:1"))
    assert drifts(run, reading("/there", "sha256:1")) == {}
    assert list(drifts(run, reading("/here", "sha256:2"))) == ["iter-00/a"]
