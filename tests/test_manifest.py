"""Lineage: an iteration's manifest, its model's card and the chain back to the prompts, against sentinels made by hand."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import chain as fake_chain
from fakes import driven, sentinel, write_run
from huggingface_hub import ModelCard

from aipo_hpc.clusters.inline import InlineCluster
from aipo_hpc.graph import Edge, Graph, build_graph
from aipo_hpc.ledger import effort, num_gpus, versions
from aipo_hpc.lineage import chain, newest_model
from aipo_hpc.manifest import Manifests, make_manifest, read_manifest, revision, write_manifest
from aipo_hpc.model_card import CARD
from aipo_hpc.outside import Outside
from aipo_hpc.recipe import load_recipe
from aipo_hpc.resources import Resources
from aipo_hpc.sentinel import Failure, Output, Sentinel
from aipo_hpc.settings import everything
from aipo_hpc.store import MANIFEST, Run

RECIPE = replace(load_recipe("demo"), model_name_or_path="org/base", prompts="org/prompts", iterations=2)
VERSIONS = {"torch": "2.13.0", "aipo_hpc": "0.1.0+gabc"}
VERDICT = {
    "win_rate": 0.625, "win_rate_se": 0.0321, "length_controlled_win_rate": 0.6, "length_controlled_win_rate_se": 0.04,
    "wins": 20, "ties": 35, "losses": 5, "mean_length": 88.25, "baseline_mean_length": 90.0, "not_judged": 4,
}  # fmt: skip
COUNTS: Mapping[str, Mapping[str, float]] = {
    "prompts": {"train": 50, "held_out": 64},
    "generate": {"candidates": 100},
    "pairs": {"kept": 40, "dropped_tie": 10, "guard_tie_rate": 0.2},
    "train": {"guard_reference_agreement": 0.6},
    "evaluate": VERDICT,
}
ROWS = {"prompts": 114, "generate": 25, "rank": 25, "pairs": 40}


@pytest.fixture(scope="module")
def graph() -> Graph:
    return build_graph(RECIPE)


@pytest.fixture
def run(graph: Graph, tmp_path: Path) -> Run:
    made = write_run(tmp_path / "run", graph)
    made.write_recipe({"run_id": "cafe", "recipe": "demo", "settings": everything(RECIPE)})
    return made


def made(run: Run, graph: Graph, name: str, shard: int, attempt: str = "one") -> Sentinel:
    """A sentinel as a worker would write it: an hour long, on two GPUs, with the digests of what it read."""
    stage = name.split("/")[1]
    inputs: dict[str, Any] = {}
    for title, source in graph.jobs[name].inputs.items():
        if isinstance(source, Edge):
            read = run.job(source.job).done(graph.fingerprints[source.job])
            chosen = [read[shard]] if source.by == "shard" else list(read.values())
            inputs[title] = {"job": source.job, "sentinels": [each.digest for each in chosen]}
        else:
            inputs[title] = {"identity": source.identity}
    outputs: tuple[Output, ...] = ()
    if stage == "train":
        outputs = (Output("model/config.json", 2, "c"), Output("model/model.safetensors", 2, name))
        (run.job(name).attempt_folder(shard, attempt) / "model").mkdir(parents=True, exist_ok=True)
    return replace(
        sentinel(graph, name, shard, attempt, outputs), rows=ROWS.get(stage, 40), counts=dict(COUNTS.get(stage, {})),
        started=1000.0, ended=4600.0, gpus=("H100", "H100"), versions=VERSIONS, inputs=inputs,
    )  # fmt: skip


def complete(run: Run, graph: Graph, iterations: int = 2) -> None:
    """All jobs of the first iterations are done."""
    for name, job in graph.jobs.items():
        if job.iteration < iterations:
            for shard in range(job.num_shards):
                run.job(name).publish(made(run, graph, name, shard))


# -- the manifest ----------------------------------------------------------------------------------------------------


def test_a_manifest_tells_models_data_settings_counts_versions_and_hours(run: Run, graph: Graph) -> None:
    complete(run, graph)
    run.job("iter-00/rank").record_failure(Failure("iter-00/rank", 0, "x.0.r0", 1, "bug", "it broke"))
    found = make_manifest(run, graph, 0)
    assert (found["recipe"], found["run_id"], found["iteration"], found["seed"]) == ("demo", "cafe", 0, RECIPE.seed)
    assert found["model"]["files"] == {"model/config.json": "c", "model/model.safetensors": "iter-00/train"}
    assert found["model"]["path"] == "iter-00/train/shards/00000/one/model"
    assert found["outside"]["policy"] == {"value": "org/base", "revision": None, "identity": "org/base"}
    assert found["outside"]["ranker"]["identity"].startswith("sha256:")
    stages = found["stages"]
    assert list(stages) == [name.split("/")[1] for name in graph.jobs if name.startswith("iter-00")]
    assert stages["generate"]["rows_in"] == {"prompts": 50} and stages["baseline"]["rows_in"] == {"prompts": 64}
    assert (stages["rank"]["rows_in"], stages["rank"]["rows"]) == ({"responses": 50}, 50)  # two shards of 25
    assert (stages["pairs"]["rows_in"], stages["pairs"]["rows"]) == ({"ranked": 50}, 40)
    assert stages["generate"]["counts"] == {"candidates": 200}
    assert stages["train"]["settings"]["loss_type"] == "aipo" and stages["train"]["versions"] == VERSIONS
    assert found["guard"] == {"tie_rate": 0.2, "reference_agreement": 0.6} and found["evaluation"] == VERDICT
    assert (stages["rank"]["failed_attempts"], stages["rank"]["gpus"]) == (1, {"H100": 4})
    shards = sum(job.num_shards for job in graph.jobs.values() if job.iteration == 0)
    assert (found["task_hours"], found["gpu_hours"]) == (shards, 2 * shards)
    print(f"{len(stages)} stages, {found['gpu_hours']:g} GPU-hours in {found['task_hours']:g} task-hours")


def test_a_later_iteration_names_the_model_it_began_with(run: Run, graph: Graph) -> None:
    complete(run, graph)
    first, second = (make_manifest(run, graph, iteration) for iteration in (0, 1))
    assert second["stages"]["train"]["inputs"]["policy"] == {"job": "iter-00/train", "part": "model/"}
    assert "policy" not in second["outside"] and first["model"]["sha256"] != second["model"]["sha256"]


def test_the_same_run_gives_the_same_manifest_and_an_unfinished_iteration_tells_what_is_there(run, graph) -> None:
    complete(run, graph, iterations=1)
    one = write_manifest(run, graph, 0)
    stamp = (run.path / "iter-00" / MANIFEST).stat().st_mtime_ns
    assert write_manifest(Run(run.path), graph, 0) == one == read_manifest(run, 0)
    assert (run.path / "iter-00" / MANIFEST).stat().st_mtime_ns == stamp  # what is right is left alone
    later = make_manifest(run, graph, 1)
    assert later["model"] is None and later["stages"]["train"]["shards_done"] == 0


def test_a_damaged_manifest_counts_as_none_and_is_written_again(run: Run, graph: Graph) -> None:
    complete(run, graph)
    whole = write_manifest(run, graph, 0)
    path = run.path / "iter-00" / MANIFEST
    path.write_text(path.read_text()[:100])
    assert read_manifest(run, 0) is None
    write_manifest(run, graph, 0)
    assert read_manifest(run, 0) == whole


def test_manifests_are_written_once_an_iteration_is_complete_and_again_when_it_was_made_anew(run, graph) -> None:
    kept = Manifests(run, graph)

    def look() -> list[int]:
        kept.update({name: set(run.job(name).done(graph.fingerprints[name])) for name in graph.jobs})
        return [iteration for iteration in (0, 1) if read_manifest(run, iteration)]

    assert look() == []
    complete(run, graph, iterations=1)
    assert look() == [0]
    complete(run, graph)
    assert look() == [0, 1]
    run.job("iter-01/evaluate").retract(0)
    look()
    again = replace(made(run, graph, "iter-01/evaluate", 0, "two"), counts={**VERDICT, "wins": 21})
    run.job("iter-01/evaluate").publish(again)
    look()
    assert read_manifest(run, 1)["evaluation"]["wins"] == 21  # type: ignore[index]


def test_a_driver_writes_them_for_any_graph(tmp_path: Path) -> None:
    graph = fake_chain(iterations=2)
    run = write_run(tmp_path / "run", graph)
    with driven(run, graph, InlineCluster()) as at_work:
        at_work.driver.follow(0.01)
    for iteration in (0, 1):
        found = read_manifest(run, iteration)
        assert found is not None and found["model"] is None and list(found["stages"]) == ["a", "b", "c"]
        assert found["stages"]["a"]["versions"]["python"] and found["task_hours"] > 0 and found["gpu_hours"] == 0


def test_what_is_set_aside_takes_its_manifest_along(run: Run, graph: Graph) -> None:
    complete(run, graph)
    for iteration in (0, 1):
        write_manifest(run, graph, iteration)
    target = run.set_jobs_aside(graph.downstream("iter-01/rank"))
    assert read_manifest(run, 0) is not None and read_manifest(run, 1) is None
    assert (target / "iter-01" / MANIFEST).is_file()


# -- hours and versions ----------------------------------------------------------------------------------------------


def test_gpus_are_counted_on_all_nodes_of_a_gang_and_once_for_a_task(graph: Graph) -> None:
    base = sentinel(graph, "iter-00/train", 0)
    gang = Resources(nodes=2, tasks_per_node=8, gpus_per_node=8)
    assert num_gpus(replace(base, gpus=("H100",) * 8, num_processes=16), gang) == 16
    assert num_gpus(replace(base, gpus=("H100",) * 4, num_processes=1), Resources(gpus_per_node=4)) == 4
    assert num_gpus(base, None) == 0
    job = replace(graph.jobs["iter-00/train"], resources=gang)
    found = effort([replace(base, gpus=("H100",) * 8, num_processes=16, started=0.0, ended=1800.0)], job)
    assert found == {"gpu_hours": 8.0, "task_hours": 0.5, "seconds": 1800.0}


def test_versions_that_differ_between_shards_are_all_named(graph: Graph) -> None:
    base = sentinel(graph, "iter-00/train", 0)
    one, other = (replace(base, versions={"torch": "2", "vllm": vllm}) for vllm in ("1", "3"))
    assert versions([one, other, one]) == {"torch": "2", "vllm": ["1", "3"]}


def test_a_model_of_the_hub_is_known_by_the_commit_it_was_fetched_at() -> None:
    commit = "0123456789" * 4
    assert revision(f"/cache/models--a--b/snapshots/{commit}", "main") == commit
    assert (revision("/models/mine", None), revision("org/name", "main")) == (None, "main")


# -- the card --------------------------------------------------------------------------------------------------------


def test_a_model_gets_a_card_that_the_hub_can_read(run: Run, graph: Graph) -> None:
    complete(run, graph)
    found = write_manifest(run, graph, 0)
    path = run.path / found["model"]["path"] / CARD
    card = ModelCard.load(path)
    assert (card.data.base_model, card.data.datasets) == ("org/base", ["org/prompts"])
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert "aipo" in card.data.tags
    front = yaml.safe_load(path.read_text().split("---")[1])
    assert front["base_model"] == "org/base"
    for told in (
        "62.5 % ± 3.2",
        "60.0 % ± 4.0",
        found["model"]["sha256"],
        "50 rows of ranked -> 40 rows",
        "torch 2.13.0",
    ):
        assert told in card.text, told


def test_a_card_names_no_path_of_this_machine_and_says_what_is_not_known(tmp_path: Path) -> None:
    recipe = load_recipe("demo")
    graph = build_graph(recipe)
    run = write_run(tmp_path / "run", graph)
    run.write_recipe({"run_id": "cafe", "recipe": "demo", "settings": everything(recipe)})
    for name, job in graph.jobs.items():
        for shard in range(job.num_shards):
            if name.startswith("iter-00") and name != "iter-00/evaluate":
                run.job(name).publish(made(run, graph, name, shard))
    text = (run.path / write_manifest(run, graph, 0)["model"]["path"] / CARD).read_text()
    assert "Not evaluated." in text and "policy (local)" in text and str(Path(recipe.prompts).parent) not in text
    assert "base_model" not in text and "datasets:" not in text


def test_a_model_that_was_deleted_to_save_space_needs_no_card(run: Run, graph: Graph) -> None:
    complete(run, graph)
    (run.job("iter-00/train").attempt_folder(0, "one") / "model").rmdir()
    assert write_manifest(run, graph, 0)["model"]["sha256"]


# -- the chain -------------------------------------------------------------------------------------------------------


def test_the_chain_leads_from_the_newest_model_to_the_prompts_and_names_each_job_once(run: Run, graph: Graph) -> None:
    assert newest_model(run, graph) is None
    complete(run, graph)
    assert newest_model(run, graph) == "iter-01/train"
    lines = list(chain(run, graph, "iter-01/train"))
    print("\n".join(lines[:12]))
    assert lines[0].startswith("iter-01/train: train, loss_type aipo")
    above = ("train", "reference", "pairs", "rank", "generate")
    text = "\n".join(lines)
    for name in (*(f"iter-0{i}/{stage}" for i in (0, 1) for stage in above), "iter-00/prompts"):
        assert text.count(f"{name}: ") == 1, name
    assert "source = org/prompts, org/prompts" in text and "policy = the model of iter-00/train: " in text
    assert lines[-1] == "made with aipo_hpc 0.1.0+gabc, torch 2.13.0" and "MADE AGAIN" not in text
    assert "/evaluate:" not in text and "/answers:" not in text  # nothing of the model comes from them


def test_the_chain_says_where_something_was_made_again_since_it_was_read(run: Run, graph: Graph) -> None:
    complete(run, graph)
    run.job("iter-01/pairs").retract(0)
    run.job("iter-01/pairs").publish(replace(made(run, graph, "iter-01/pairs", 0), attempt="two"))
    (line,) = [line for line in chain(run, graph, "iter-01/train") if "MADE AGAIN" in line]
    assert "MADE AGAIN since it was read: 40 rows of iter-01/pairs" in line


def test_every_outside_input_is_in_some_manifest(run: Run, graph: Graph) -> None:
    complete(run, graph)
    told = {name for iteration in (0, 1) for name in make_manifest(run, graph, iteration)["outside"]}
    outside = {
        name for job in graph.jobs.values() for name, source in job.inputs.items() if isinstance(source, Outside)
    }
    assert told == outside
    json.dumps(make_manifest(run, graph, 0))  # plain values only
