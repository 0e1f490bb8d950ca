"""Old models go when nobody needs them any more, whatever dies meanwhile, and come back when somebody does."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedCluster, driven, sentinel, write_run

from aipo_hpc import job_folder, worker
from aipo_hpc.cancel import reset_job
from aipo_hpc.damage import Inspector
from aipo_hpc.errors import InputNotVisible, RecipeError
from aipo_hpc.graph import Graph, build_graph
from aipo_hpc.launch import launch
from aipo_hpc.ledger import pruned_models
from aipo_hpc.lineage import chain
from aipo_hpc.plan import plan_table
from aipo_hpc.recipe import Recipe, load_recipe, validate
from aipo_hpc.report import best_model, final_model, print_report
from aipo_hpc.retention import evaluations, expendable, readers, wanted_again
from aipo_hpc.sentinel import Blame, Failure, Output
from aipo_hpc.settings import everything
from aipo_hpc.store import Run
from aipo_hpc.terminal import job_table

TRAIN = [f"iter-{iteration:02d}/train" for iteration in range(4)]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return build_graph(replace(load_recipe("demo"), iterations=4))


@pytest.fixture
def run(graph: Graph, tmp_path: Path) -> Run:
    return written(tmp_path / "run", graph)


def written(path: Path, graph: Graph) -> Run:
    run = write_run(path, graph, payload_timeout=0.2)
    demo = replace(load_recipe("demo"), run_dir=str(path))
    run.write_recipe({"run_id": "cafe", "recipe": "demo", "settings": everything(demo)})
    return run


def everything_but(graph: Graph, *names: str) -> set[str]:
    return set(graph.jobs) - set(names)


def finish(run: Run, graph: Graph, name: str, **counts: float) -> None:
    """Make all shards of a job done, with small files of the names that a reader expects."""
    folder, job = run.job(name), graph.jobs[name]
    parts = {edge.part for each in graph.jobs.values() for edge in each.edges.values() if edge.job == name}
    files = [each for part in parts for each in ([f"{part}config.json", f"{part}w"] if part[-1] == "/" else [part])]
    for shard in range(job.num_shards):
        out, _ = folder.begin_attempt(shard, "one")
        for file in (*files, "metrics.json"):
            (out / file).parent.mkdir(exist_ok=True)
            (out / file).write_text("x\n")
        outputs = tuple(Output(file, 2, hashlib.sha256(b"x\n").hexdigest()) for file in (*files, "metrics.json"))
        made = sentinel(graph, name, shard, outputs=outputs)
        inputs = {each: {"job": edge.job, "sentinels": []} for each, edge in job.edges.items()}
        folder.publish(replace(made, counts=counts, inputs=inputs))


def finish_run(run: Run, graph: Graph, rates: list[float], *, without: tuple[str, ...] = ()) -> None:
    """All jobs done; the models of the iterations have these win rates."""
    for name, job in graph.jobs.items():
        if name not in without:
            finish(run, graph, name, **(evaluation(rates[job.iteration]) if job.stage == "evaluate" else {}))


def evaluation(rate: float) -> dict[str, float]:
    counts = ("wins", "ties", "losses", "mean_length", "baseline_mean_length", "not_judged")
    return {"win_rate": rate, **dict.fromkeys(counts, 1.0)}


def model(run: Run, name: str) -> Path:
    return run.path / name / "shards" / "00000" / "one" / "model"


def models(run: Run) -> list[bool]:
    return [(model(run, name) / "w").is_file() for name in TRAIN]


def tick(run: Run, graph: Graph, keep: int | None, ticks: int = 1) -> list[str]:
    """What a new driver says, and what it sends."""
    fresh = Run(run.path)
    with driven(fresh, graph, ScriptedCluster(), keep_models=keep) as at_work:
        for _ in range(ticks):
            at_work.driver.tick()
        return [*at_work.lines, *(f"sent {each.job}" for each in at_work.journal.submissions.values())]


def test_the_last_models_and_the_best_are_kept(graph: Graph) -> None:
    rates = dict(zip(TRAIN, [0.7, 0.5, 0.6, 0.4], strict=True))
    assert expendable(graph, set(graph.jobs), rates, 1) == [TRAIN[1], TRAIN[2]]
    assert expendable(graph, set(graph.jobs), rates, 2) == [TRAIN[1]]
    assert expendable(graph, set(graph.jobs), rates, 4) == expendable(graph, set(graph.jobs), rates, 9) == []


def test_of_equal_models_the_last_is_the_best(graph: Graph) -> None:
    rates = dict(zip(TRAIN, [0.5, 0.7, 0.7, 0.4], strict=True))
    assert expendable(graph, set(graph.jobs), rates, 1) == TRAIN[:2]


@pytest.mark.parametrize("reader", ["generate", "pairs", "reference", "train"])
def test_a_model_stays_while_the_next_iteration_reads_it(graph: Graph, reader: str) -> None:
    done = everything_but(graph, f"iter-01/{reader}")
    assert f"iter-01/{reader}" in readers(graph, TRAIN[0])
    assert TRAIN[0] not in expendable(graph, done, dict.fromkeys(TRAIN, 0.5), 1)


@pytest.mark.parametrize("reader", ["answers", "evaluate"])
def test_a_model_stays_until_it_is_evaluated_for_it_may_be_the_best(graph: Graph, reader: str) -> None:
    done = everything_but(graph, f"iter-00/{reader}")
    assert evaluations(graph, TRAIN[0]) == ["iter-00/evaluate"]
    rates = {name: 0.5 for name in TRAIN[1:]}
    assert expendable(graph, done, rates, 1) == TRAIN[1:3]


def test_only_models_that_are_there_count_as_the_last_ones(graph: Graph) -> None:
    done = everything_but(graph, *graph.downstream(TRAIN[2]))
    assert expendable(graph, done, {TRAIN[0]: 0.5, TRAIN[1]: 0.6}, 1) == [TRAIN[0]]
    assert expendable(graph, done, {TRAIN[0]: 0.5, TRAIN[1]: 0.6}, 2) == []


def test_a_deleted_model_is_wanted_again_with_those_it_is_made_from(graph: Graph) -> None:
    everything = set(graph.jobs)
    assert wanted_again(graph, everything, TRAIN[:3]) == []
    assert wanted_again(graph, everything - {"iter-02/pairs"}, [TRAIN[1]]) == [TRAIN[1]]
    assert wanted_again(graph, everything - {"iter-02/pairs"}, TRAIN[:3]) == TRAIN[:2]
    assert wanted_again(graph, everything - {"iter-02/rank"}, TRAIN[:3]) == [], "this ranker reads no policy"


def test_keep_models_must_leave_one(small_recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="keep_models=0: must be at least 1"):
        validate(replace(small_recipe, keep_models=0))


def test_a_driver_deletes_models_and_only_models_and_the_run_stays_done(
    run: Run, graph: Graph, capsys: pytest.CaptureFixture[str]
) -> None:
    finish_run(run, graph, [0.5, 0.7, 0.6, 0.4])
    lost = run.job(TRAIN[0]).attempt_folder(0, "lost") / "checkpoints"
    lost.mkdir(parents=True)
    rows = sorted(path for path in run.path.rglob("*.parquet"))
    with driven(run, graph, ScriptedCluster(), keep_models=1) as at_work:
        assert at_work.driver.tick().finished
        assert at_work.driver.tick().finished
        assert not at_work.journal.submissions
    assert models(run) == [False, True, False, True]
    assert sum("nobody needs it any more" in line for line in at_work.lines) == 2, "each is told once"
    assert rows == sorted(path for path in run.path.rglob("*.parquet"))
    assert (model(run, TRAIN[0]).parent / "metrics.json").is_file() and not lost.parent.exists()
    assert [event["job"] for event in run.read_journal() if event["event"] == "prune"] == [TRAIN[0], TRAIN[2]]

    fresh = Run(run.path)
    assert final_model(fresh, graph) == str(model(run, TRAIN[3]))
    assert best_model(fresh, graph) == (str(model(run, TRAIN[1])), 0.7)
    print_report(fresh, graph)
    assert f"best model by win rate (70.0 %): {model(run, TRAIN[1])}" in capsys.readouterr().out
    status = dict(zip(*[list(column.cells) for column in job_table(graph, fresh, {}).columns][:3:2], strict=True))
    assert (status[TRAIN[0]], status[TRAIN[1]]) == ("1 (model deleted)", "1")
    outlook = dict(zip(graph.jobs, plan_table(graph, fresh).columns[-1].cells, strict=True))
    assert outlook[TRAIN[0]] == "nothing: done; its model was deleted (keep_models)"
    assert any("(deleted since: keep_models)" in line for line in chain(fresh, graph, TRAIN[0]))


def test_without_keep_models_everything_stays(run: Run, graph: Graph) -> None:
    finish_run(run, graph, [0.5, 0.7, 0.6, 0.4])
    assert tick(run, graph, None) == [] and all(models(run))


def test_a_model_of_which_a_successor_is_not_to_be_seen_stays(run: Run, graph: Graph) -> None:
    finish_run(run, graph, [0.5, 0.7, 0.6, 0.4])
    (model(run, TRAIN[1]) / "w").write_text("cut off by a full disk")
    tick(run, graph, 1)
    assert models(run)[0]


def test_a_driver_that_has_nothing_new_to_look_at_lists_no_model(
    run: Run, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_run(run, graph, [0.5, 0.7, 0.6, 0.4])
    with driven(run, graph, ScriptedCluster(), keep_models=1) as at_work:
        at_work.driver.tick()
        monkeypatch.setattr(job_folder.JobFolder, "prune", lambda *_: pytest.fail("looked again"))
        monkeypatch.setattr("aipo_hpc.retention.expendable", lambda *_: pytest.fail("asked again"))
        at_work.driver.tick()


class Killed(BaseException):
    """The process is gone at this point."""


def before_any_file(remove: Callable[..., None]) -> Callable[..., None]:
    def removing(folder: Path, **options: Any) -> None:
        if folder.name == "model":
            raise Killed
        remove(folder, **options)

    return removing


def between_files(remove: Callable[..., None]) -> Callable[..., None]:
    def removing(folder: Path, **options: Any) -> None:
        if folder.name == "model":
            (folder / "config.json").unlink()
            raise Killed
        remove(folder, **options)

    return removing


@pytest.mark.parametrize("where", [before_any_file, between_files])
def test_a_driver_killed_after_the_note_does_no_harm_and_the_next_one_deletes_the_rest(
    run: Run, graph: Graph, monkeypatch: pytest.MonkeyPatch, where: Callable[..., Any]
) -> None:
    finish_run(run, graph, [0.5, 0.7, 0.6, 0.4])
    with monkeypatch.context() as patch:
        patch.setattr(job_folder.shutil, "rmtree", where(shutil.rmtree))
        with pytest.raises(Killed):
            tick(run, graph, 1)
    assert models(run) == [True] * 4, "the weights are still there"
    fresh = Run(run.path)
    assert pruned_models(fresh, graph) == {TRAIN[0]}
    tick(run, graph, 1)
    assert models(run) == [False, True, False, True]
    assert not model(run, TRAIN[0]).exists()


def test_a_driver_killed_before_the_note_has_deleted_nothing(
    run: Run, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, text: str) -> None:
        if path.suffix == ".pruned":
            raise Killed
        original(path, text)

    original = job_folder.write_durably
    finish_run(run, graph, [0.5, 0.7, 0.6, 0.4])
    with monkeypatch.context() as patch:
        patch.setattr(job_folder, "write_durably", killed)
        with pytest.raises(Killed):
            tick(run, graph, 1)
    assert pruned_models(Run(run.path), graph) == set()
    assert all((model(run, name) / "config.json").is_file() for name in TRAIN)
    tick(run, graph, 1)
    assert models(run) == [False, True, False, True]


def pruned_run(run: Run, graph: Graph) -> Run:
    """A finished run of which the first and the third model are deleted; read anew."""
    finish_run(run, graph, [0.5, 0.7, 0.6, 0.4])
    tick(run, graph, 1)
    return Run(run.path)


def test_a_deleted_model_is_no_damage_and_a_worker_is_told_at_once_what_became_of_it(run: Run, graph: Graph) -> None:
    fresh = pruned_run(run, graph)
    made = fresh.job(TRAIN[0]).done(graph.fingerprints[TRAIN[0]])[0]
    with pytest.raises(InputNotVisible, match="keep_models"):
        fresh.job(TRAIN[0]).wait_for_payload(made, "model/", 600.0)
    blamed = Failure(
        "iter-01/pairs", 0, "s-1.0.r0", 1, "input_not_visible", "", blames=(Blame(TRAIN[0], 0, made.digest),)
    )
    assert Inspector(fresh, graph).look({"iter-01/pairs": [blamed]}) == []
    (model(run, TRAIN[0]).parent / "metrics.json").unlink()
    assert Inspector(fresh, graph).look({"iter-01/pairs": [blamed]})[0].message.endswith("metrics.json is not there")


def test_what_is_not_done_any_more_has_the_deleted_models_it_needs_computed_again(run: Run, graph: Graph) -> None:
    fresh = pruned_run(run, graph)
    fresh.job("iter-03/pairs").retract(0)
    outlook = dict(zip(graph.jobs, plan_table(graph, fresh).columns[-1].cells, strict=True))
    assert outlook[TRAIN[2]] == "send all 1; its model was deleted (keep_models) and is needed again"
    said = tick(run, graph, 1, ticks=3)
    told = [line for line in said if "computed again" in line]
    print("\n".join(said))
    assert len(told) == 1 and told[0].startswith(f"{TRAIN[2]}: its model was deleted (keep_models) and is needed again")
    assert "GPU-hours" in told[0]
    sent = [line for line in said if line.startswith("sent")]
    assert sent == [f"sent {TRAIN[2]}", "sent iter-03/pairs"], "the one after the other, and nothing else"
    finish_again(run, graph, TRAIN[2])
    tick(run, graph, 1)
    assert (model(run, TRAIN[2]).parent.parent / "two" / "model" / "w").is_file(), "it is read again, so it stays"


def finish_again(run: Run, graph: Graph, name: str) -> None:
    out, _ = run.job(name).begin_attempt(0, "two")
    (out / "model").mkdir()
    files = ("model/config.json", "model/w")
    for file in files:
        (out / file).write_text("y\n")
    outputs = tuple(Output(file, 2, hashlib.sha256(b"y\n").hexdigest()) for file in files)
    Run(run.path).job(name).publish(sentinel(graph, name, 0, attempt="two", outputs=outputs))


def test_a_model_that_was_made_again_is_deleted_again_when_it_has_served(run: Run, graph: Graph) -> None:
    fresh = pruned_run(run, graph)
    fresh.job("iter-03/pairs").retract(0)
    tick(run, graph, 1)
    finish_again(run, graph, TRAIN[2])
    finish(Run(run.path), graph, "iter-03/pairs")
    tick(run, graph, 1)
    assert pruned_models(Run(run.path), graph) == {TRAIN[0], TRAIN[2]}
    assert not (model(run, TRAIN[2]).parent.parent / "two" / "model").exists()


def test_a_reset_says_which_deleted_models_must_be_computed_again_and_what_that_costs(run: Run, graph: Graph) -> None:
    pruned_run(run, graph)
    said = reset_job(Run(run.path), "iter-01/generate")
    print(said)
    above, _, below = said.partition("To be computed again before that, because their models were deleted")
    assert TRAIN[0] in below and TRAIN[0] not in above and TRAIN[2] in above
    num_jobs = len(graph.downstream("iter-01/generate"))
    num_shards = sum(graph.jobs[name].num_shards for name in graph.downstream("iter-01/generate"))
    assert f"moved {num_jobs} jobs ({num_shards + 1} finished shards" in above
    written(run.path, graph)
    assert [line for line in tick(run, graph, 1) if line.startswith("sent")] == [f"sent {TRAIN[0]}"]


def test_a_reset_that_needs_no_deleted_model_speaks_of_none(run: Run, graph: Graph) -> None:
    pruned_run(run, graph)
    assert "To be computed again" not in reset_job(Run(run.path), "iter-03/evaluate")


def test_a_longer_run_goes_on_from_the_last_model_without_the_deleted_ones(run: Run, graph: Graph) -> None:
    pruned_run(run, graph)
    longer = build_graph(replace(load_recipe("demo"), iterations=5))
    written(run.path, longer)
    said = tick(run, longer, 1)
    assert [line for line in said if line.startswith("sent")] == ["sent iter-04/generate"]
    assert models(run) == [False, True, False, True]


def test_a_worker_started_by_hand_without_its_model_says_what_to_type(run: Run, graph: Graph) -> None:
    fresh = pruned_run(run, graph)
    fresh.job("iter-01/pairs").retract(0)
    with pytest.raises(InputNotVisible, match="Type the launch command again"):
        worker.Envelope(str(run.path), "iter-01/pairs", 0, "hand-1", 0, 0).run()


def test_a_real_run_that_keeps_one_model_finishes_and_reruns_nothing(small_recipe: Recipe) -> None:
    recipe = replace(small_recipe, iterations=3, keep_models=1)
    launched = launch(recipe)
    graph = build_graph(recipe)
    kept = [name for name in TRAIN[:3] if name not in pruned_models(launched, graph)]
    sizes = [sum(path.stat().st_size for path in (launched.path / name).rglob("*.safetensors")) for name in TRAIN[:3]]
    print(f"kept {kept}; bytes of weights by iteration: {sizes}")
    assert TRAIN[2] in kept and len(kept) <= 2
    assert [size > 0 for size in sizes] == [name in kept for name in TRAIN[:3]]
    sent = [event for event in launched.read_journal() if event["event"] == "submit"]
    launch(recipe)
    assert [event for event in Run(launched.path).read_journal() if event["event"] == "submit"] == sent
