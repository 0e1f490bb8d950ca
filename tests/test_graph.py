"""The graph: jobs of a recipe, their inputs, and what their fingerprints cover."""

import shutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fakes import TouchConfig, chain, touch

from aipo_hpc import graph as graph_module
from aipo_hpc.errors import GraphError
from aipo_hpc.graph import Edge, Graph, build_graph, make_graph
from aipo_hpc.guard import GuardConfig
from aipo_hpc.outside import Outside
from aipo_hpc.rankers.config import MemberConfig
from aipo_hpc.recipe import Recipe, load_recipe
from aipo_hpc.resources import Resources
from aipo_hpc.stage_table import STAGES
from aipo_hpc.stages.pairs import MixConfig


@pytest.fixture
def demo() -> Recipe:
    return replace(load_recipe("demo"), iterations=2)


def edges(graph: Graph, job: str) -> dict[str, tuple[str, str, str]]:
    return {name: (edge.job, edge.part, edge.by) for name, edge in graph.jobs[job].edges.items()}


# -- shape -----------------------------------------------------------------------------------------------------------


def test_a_recipe_makes_the_jobs_of_each_iteration_in_an_order_in_which_they_can_run(demo: Recipe) -> None:
    per_iteration = ["generate", "rank", "pairs", "reference", "train", "answers", "evaluate"]
    expected = ["iter-00/prompts", "iter-00/baseline"]
    expected += [f"iter-{number:02d}/{name}" for number in (0, 1) for name in per_iteration]
    assert list(build_graph(demo).jobs) == expected


def with_instruct(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, instruct=replace(recipe.instruct, num_prompts=10, num_shards=3), **changes)


def test_self_instruct_makes_the_prompts_of_every_iteration_with_its_policy_from_the_same_seeds(demo: Recipe) -> None:
    graph = build_graph(with_instruct(demo))
    pool, held_out = ("iter-00/prompts", "train.parquet", "all"), ("iter-00/prompts", "held_out.parquet", "all")
    first, second = ((f"iter-{number:02d}/collect", "prompts.parquet", "all") for number in (0, 1))
    assert edges(graph, "iter-00/instruct") == {"pool": pool, "held_out": held_out}
    assert edges(graph, "iter-01/instruct") == {
        "pool": pool,
        "held_out": held_out,
        "made.00": first,
        "policy": ("iter-00/train", "model/", "all"),
    }
    assert edges(graph, "iter-01/collect") == {"new": ("iter-01/instruct", "prompts.parquet", "all")}
    assert edges(graph, "iter-00/generate")["prompts"] == first
    assert edges(graph, "iter-01/generate")["prompts"] == second
    assert edges(graph, "iter-00/baseline")["prompts"] == held_out
    assert graph.jobs["iter-01/instruct"].num_shards == 3
    assert graph.jobs["iter-01/collect"].config.num_prompts == 10
    assert graph.jobs["iter-01/collect"].resources == demo.instruct.collect_resources


def test_seeds_of_their_own_and_their_clusters_are_jobs_that_all_iterations_share(demo: Recipe) -> None:
    model = demo.rank.model_name_or_path
    clusters = replace(demo.clusters, num_clusters=4, embeddings="bert", model_name_or_path=model)
    graph = build_graph(with_instruct(demo, seed_prompts=demo.prompts, clusters=clusters))
    pool = ("iter-00/seeds", "train.parquet", "all")
    assert graph.jobs["iter-00/seeds"].stage == "prompts" and graph.jobs["iter-00/seeds"].config.num_held_out == 0
    assert edges(graph, "iter-00/clusters") == {"pool": pool}
    embedder = graph.jobs["iter-00/clusters"].inputs["embedder"]
    assert isinstance(embedder, Outside) and embedder.value == model
    for iteration in (0, 1):
        found = edges(graph, f"iter-{iteration:02d}/instruct")
        assert (found["pool"], found["clusters"]) == (pool, ("iter-00/clusters", "clusters.parquet", "all"))


def test_without_self_instruct_its_settings_change_nothing(demo: Recipe) -> None:
    changed = replace(demo, instruct=replace(demo.instruct, num_seeds=3), seed_prompts=demo.prompts)
    assert build_graph(changed).fingerprints == build_graph(demo).fingerprints


def test_more_iterations_of_self_instruct_leave_the_earlier_ones_as_they_are(demo: Recipe) -> None:
    two, three = (build_graph(with_instruct(replace(demo, iterations=number))).fingerprints for number in (2, 3))
    assert two.items() <= three.items()


def test_each_job_reads_what_it_should(demo: Recipe) -> None:
    graph = build_graph(demo)
    rows = "rows.parquet"
    prompts = edges(graph, "iter-00/generate")["prompts"]
    held_out = edges(graph, "iter-00/baseline")["prompts"]
    assert prompts[0] == held_out[0] == "iter-00/prompts" and prompts[1] != held_out[1]
    for at, before in (("iter-00", None), ("iter-01", ("iter-00/train", "model/", "all"))):
        policy = {} if before is None else {"policy": before}
        assert edges(graph, f"{at}/generate") == {"prompts": prompts, **policy}
        assert edges(graph, f"{at}/rank") == {"responses": (f"{at}/generate", rows, "shard")}
        assert edges(graph, f"{at}/pairs") == {"ranked": (f"{at}/rank", rows, "all"), **policy}
        (pairs, reference) = (edges(graph, f"{at}/reference").get(name) for name in ("pairs", "reference"))
        assert pairs is not None and pairs[0] == f"{at}/pairs" and reference == before
        assert edges(graph, f"{at}/reference").get("policy") == before
        assert edges(graph, f"{at}/train") == {"pairs": (f"{at}/reference", rows, "all"), **policy}
        own = (f"{at}/train", "model/", "all")
        assert edges(graph, f"{at}/answers") == {"prompts": held_out, "policy": own}
        assert edges(graph, f"{at}/evaluate") == {
            "answers": (f"{at}/answers", rows, "all"),
            "baseline": ("iter-00/baseline", rows, "all"),
        }


def test_the_reference_is_the_previous_the_initial_or_another_model(demo: Recipe, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(demo.model_name_or_path, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    graphs = {
        name: build_graph(replace(demo, reference=replace(demo.reference, model=name)))
        for name in ("previous", "initial", str(other))
    }
    initial = graphs["previous"].jobs["iter-00/generate"].inputs["policy"]
    found = {
        name: [graph.jobs[f"iter-0{k}/reference"].inputs["reference"] for k in (0, 1)] for name, graph in graphs.items()
    }
    assert found["previous"] == [initial, Edge("iter-00/train", "model/")]
    assert found["initial"] == [initial, initial]
    first, second = found[str(other)]
    assert first == second and isinstance(first, Outside) and first.value == str(other)
    one, same, another = (graph.fingerprints["iter-00/reference"] for graph in graphs.values())
    assert one == same != another, "in the first iteration, the previous model is the initial one"
    assert graphs["initial"].fingerprints["iter-01/reference"] != graphs["previous"].fingerprints["iter-01/reference"]


def test_where_a_reference_lies_is_not_content_but_what_it_is(demo: Recipe, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        shutil.copytree(demo.model_name_or_path, folder)
    graphs = [build_graph(replace(demo, reference=replace(demo.reference, model=str(folder)))) for folder in (one, two)]
    assert graphs[0].fingerprints == graphs[1].fingerprints


def test_with_conversations_supervised_fine_tuning_makes_the_initial_policy(demo: Recipe, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text("{}")
    tuned = replace(
        demo,
        conversations=replace(demo.conversations, source=str(chats)),
        reference=replace(demo.reference, model="initial"),
    )
    graph = build_graph(tuned)
    assert list(graph.jobs)[:4] == ["iter-00/prompts", "iter-00/conversations", "iter-00/sft", "iter-00/baseline"]
    assert graph.jobs["iter-00/conversations"].resources is None, "read where the run is launched"
    assert edges(graph, "iter-00/sft") == {"conversations": ("iter-00/conversations", "conversations.parquet", "all")}
    made = ("iter-00/sft", "model/", "all")
    for job in ("iter-00/baseline", "iter-00/generate", "iter-00/pairs", "iter-00/train"):
        assert edges(graph, job)["policy"] == made
    assert edges(graph, "iter-01/reference")["reference"] == made
    assert graph.fingerprints["iter-00/prompts"] == build_graph(demo).fingerprints["iter-00/prompts"]


def test_shards_and_resources_are_those_of_the_stages(demo: Recipe) -> None:
    recipe = replace(demo, generate=replace(demo.generate, num_shards=5, resources=Resources(time=7)))
    jobs = build_graph(recipe).jobs
    assert (jobs["iter-01/generate"].num_shards, jobs["iter-01/rank"].num_shards) == (5, 5)
    assert {jobs[f"iter-00/{name}"].num_shards for name in ("prompts", "pairs", "train", "evaluate")} == {1}
    assert jobs["iter-00/prompts"].resources is None, "read where the run is launched"
    assert jobs["iter-00/generate"].resources == Resources(time=7)


def test_downstream_is_the_job_and_all_that_depends_on_it(demo: Recipe) -> None:
    graph = build_graph(demo)
    assert graph.downstream("iter-01/pairs") == [
        f"iter-01/{name}" for name in ("pairs", "reference", "train", "answers", "evaluate")
    ]
    assert graph.downstream("iter-00/baseline") == ["iter-00/baseline", "iter-00/evaluate", "iter-01/evaluate"]
    assert graph.downstream("iter-00/prompts") == list(graph.jobs)


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([touch("iter-00/a"), touch("iter-00/a")], "iter-00/a: two jobs have this name"),
        (
            [touch("iter-00/a"), touch("iter-00/b", source=("iter-00/trian", "all"))],
            r"iter-00/b: input 'source' names job 'iter-00/trian', which is not among .*\['iter-00/a'\]",
        ),
        ([touch("iter-00/a", source=("iter-00/a", "all"))], "iter-00/a: input 'source' names job 'iter-00/a'"),
        (
            [touch("iter-00/a", 4), touch("iter-00/b", 3, source=("iter-00/a", "shard"))],
            "iter-00/b: input 'source' is read shard by shard, but iter-00/a has 4 shards and iter-00/b has 3",
        ),
    ],
)  # fmt: skip
def test_a_graph_that_does_not_hold_together_is_refused(jobs: list[graph_module.Job], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        make_graph(jobs)


# -- fingerprints ----------------------------------------------------------------------------------------------------

TUNING: dict[str, Callable[[Recipe], Recipe]] = {
    "partition of all": lambda r: replace(r, slurm=replace(r.slurm, partition="gpu", account="me", qos="high")),
    "where it runs": lambda r: replace(r, cluster="slurm", run_dir="/elsewhere", drive="once", poll_seconds=9.0),
    "waits": lambda r: replace(r, payload_timeout=1.0),
    "name": lambda r: replace(r, name="another"),
    "resources of generate": lambda r: replace(
        r, generate=replace(r.generate, resources=Resources(partition="x", time=1, nodes=2, mem_gb=3.0))
    ),
    "nodes of training": lambda r: replace(r, train=replace(r.train, resources=Resources(nodes=4, tasks_per_node=8))),
    "micro-batch of training": lambda r: replace(
        r,
        train=replace(r.train, per_device_train_batch_size=1, zero_stage=2, save_steps=3, gradient_checkpointing=True),
    ),
    "batches of ranking": lambda r: replace(r, rank=replace(r.rank, tokens_per_batch=99)),
    "batches of the reference": lambda r: replace(r, reference=replace(r.reference, tokens_per_batch=99)),
    "thresholds of the guard": lambda r: replace(r, guard=replace(r.guard, stop_tie_rate=0.9, warn_length_gap=None)),
    "number of iterations": lambda r: replace(r, iterations=5),
    "a whole number written as a float": lambda r: replace(r, generate=replace(r.generate, top_p=1)),
}


@pytest.mark.parametrize("change", TUNING.values(), ids=TUNING)
def test_what_does_not_decide_content_is_in_no_fingerprint(demo: Recipe, change: Callable[[Recipe], Recipe]) -> None:
    before, after = build_graph(demo).fingerprints, build_graph(change(demo)).fingerprints
    assert {name: after[name] for name in before} == before


CONTENT: dict[str, tuple[Callable[[Recipe], Recipe], str, set[str]]] = {
    "seed": (lambda r: replace(r, seed=43), "iter-00/prompts", set()),
    "held out": (lambda r: replace(r, data=replace(r.data, num_held_out=63)), "iter-00/prompts", set()),
    "candidates": (lambda r: replace(r, generate=replace(r.generate, n=5)), "iter-00/generate", set()),
    "shards": (lambda r: replace(r, generate=replace(r.generate, num_shards=3)), "iter-00/generate", set()),
    "answers' length": (
        lambda r: replace(r, generate=replace(r.generate, max_tokens=9)),
        "iter-00/generate",
        {"iter-00/baseline"},
    ),
    "beta": (lambda r: replace(r, train=replace(r.train, beta=0.2)), "iter-00/train", set()),
    "batch of a step": (lambda r: replace(r, train=replace(r.train, global_batch_size=8)), "iter-00/train", set()),
    "shards of the reference": (
        lambda r: replace(r, reference=replace(r.reference, num_shards=2)),
        "iter-00/reference",
        set(),
    ),
}


@pytest.mark.parametrize(("change", "first", "also"), CONTENT.values(), ids=CONTENT)
def test_what_decides_content_changes_the_job_and_all_downstream_and_nothing_else(
    demo: Recipe, change: Callable[[Recipe], Recipe], first: str, also: set[str]
) -> None:
    graph = build_graph(demo)
    after = build_graph(change(demo)).fingerprints
    changed = {name for name, fingerprint in graph.fingerprints.items() if after[name] != fingerprint}
    assert first in changed and set(graph.downstream(first)) <= changed
    assert set(graph.jobs) - changed == {name for name in graph.jobs if name not in graph.downstream(first)} - also


def test_a_field_of_settings_is_content_unless_it_is_declared_to_be_tuning(demo: Recipe) -> None:
    """The list of tuning fields, so that a new one is a decision."""
    found: set[str] = set()
    for stage in STAGES.values():
        if stage.config is not TouchConfig:
            found |= {f"{stage.config.__name__}.{f.name}" for f in fields(stage.config) if f.metadata.get("tuning")}
    print("never part of a fingerprint:", ", ".join(sorted(found)))
    content = {"n", "temperature", "top_p", "max_tokens", "beta", "alpha", "loss_type", "learning_rate", "ranker",
               "global_batch_size", "num_train_epochs", "selection", "dtype", "engine"}  # fmt: skip
    assert not content & {name.split(".")[1] for name in found}


def test_where_models_and_prompts_lie_is_in_no_fingerprint_but_what_they_hold_is(demo: Recipe, tmp_path: Path) -> None:
    moved = replace(
        demo,
        model_name_or_path=str(shutil.copytree(demo.model_name_or_path, tmp_path / "policy")),
        prompts=str(shutil.copy(demo.prompts, tmp_path / "mine.jsonl")),
        rank=replace(
            demo.rank, model_name_or_path=str(shutil.copytree(demo.rank.model_name_or_path, tmp_path / "ranker"))
        ),
    )
    before, graph = build_graph(demo), build_graph(moved)
    assert graph.fingerprints == before.fingerprints
    assert graph.jobs["iter-00/generate"].inputs["policy"] != before.jobs["iter-00/generate"].inputs["policy"]

    with (tmp_path / "policy" / "config.json").open("a") as file:
        file.write("\n")
    after = build_graph(moved).fingerprints
    assert after["iter-00/prompts"] == before.fingerprints["iter-00/prompts"]
    assert after["iter-00/generate"] != before.fingerprints["iter-00/generate"]


def test_a_revision_of_a_hub_model_is_part_of_its_identity(demo: Recipe) -> None:
    hub = replace(demo, model_name_or_path="org/model")
    pinned = replace(hub, revision="abc")
    policy = build_graph(pinned).jobs["iter-00/generate"].inputs["policy"]
    assert policy == Outside("org/model", "org/model@abc", "abc")
    assert build_graph(hub).fingerprints["iter-00/train"] != build_graph(pinned).fingerprints["iter-00/train"]


def test_a_new_version_of_a_stage_changes_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = chain().fingerprints
    monkeypatch.setitem(STAGES, "touch", replace(STAGES["touch"], version=2))  # type: ignore[arg-type]
    assert all(chain().fingerprints[name] != fingerprint for name, fingerprint in before.items())


def test_settings_are_frozen_and_nothing_in_a_graph_depends_on_when_it_was_built(demo: Recipe) -> None:
    assert build_graph(demo) == build_graph(demo)

    def frozen(settings: Any) -> bool:
        nested = [getattr(settings, each.name) for each in fields(settings)]
        return type(settings).__dataclass_params__.frozen and all(frozen(each) for each in nested if is_dataclass(each))

    assert frozen(demo)


def test_edges_are_told_from_what_comes_from_outside(demo: Recipe) -> None:
    job = build_graph(demo).jobs["iter-01/rank"]
    assert isinstance(job.inputs["responses"], Edge) and isinstance(job.inputs["ranker"], Outside)
    assert list(job.edges) == ["responses"]


# Rankers


def test_a_policy_that_judges_is_the_iterations_own_and_in_evaluation_the_initial_one(small_recipe: Recipe) -> None:
    judged = replace(small_recipe, rank=replace(small_recipe.rank, ranker="judge", model_name_or_path="policy"))
    jobs = build_graph(judged).jobs
    assert jobs["iter-00/rank"].inputs["ranker"] == jobs["iter-00/generate"].inputs["policy"]
    assert jobs["iter-01/rank"].inputs["ranker"] == Edge("iter-00/train", "model/")
    for iteration in ("iter-00", "iter-01"):
        assert jobs[f"{iteration}/evaluate"].inputs["ranker"] == jobs["iter-00/baseline"].inputs["policy"]
        assert jobs[f"{iteration}/evaluate"].config.ranker == "judge"


def test_each_member_of_an_ensemble_is_an_input_and_in_the_fingerprint(small_recipe: Recipe, tmp_path: Path) -> None:
    own = small_recipe.rank.model_name_or_path
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)

    def ranking(other: str, **changes: Any) -> dict[str, str]:
        members = (MemberConfig("pairrm", own), MemberConfig("reward_model", str(tmp_path / other), **changes))
        rank = replace(small_recipe.rank, ranker="ensemble", model_name_or_path="", members=members)
        graph = build_graph(replace(small_recipe, rank=rank))
        assert {"ranker.pairrm", "ranker.reward_model"} <= set(graph.jobs["iter-00/evaluate"].inputs)
        return dict(graph.fingerprints)

    before = ranking("one")
    for other in (ranking("two"), ranking("one", max_length=77)):
        assert other["iter-00/generate"] == before["iter-00/generate"]
        assert other["iter-00/rank"] != before["iter-00/rank"]
    (tmp_path / "one").rename(tmp_path / "moved")
    assert ranking("moved") == before, "where a model lies is no content"


# -- pairs from elsewhere --------------------------------------------------------------------------------------------


def mixing(recipe: Recipe, folder: Path) -> Recipe:
    """A recipe that reads two benchmarks and a dataset and accumulates over two iterations."""
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl", "prefs.jsonl"):
        (folder / name).write_text(f'{{"prompt": "{name}", "chosen": "a", "rejected": "b"}}\n')
    dataset = MixConfig(source=str(folder / "prefs.jsonl"), name="prefs", ratio=0.5)
    chosen = replace(
        recipe.pairs,
        decontaminate=f"{folder / 'a.jsonl'} + {folder / 'b.jsonl'}",
        accumulate=(0.5, 0.25),
        mix=(dataset,),
    )
    return replace(recipe, pairs=chosen, iterations=4)


def test_pairs_read_benchmarks_datasets_and_the_own_pairs_of_the_iterations_before(
    demo: Recipe, tmp_path: Path
) -> None:
    graph = build_graph(mixing(demo, tmp_path / "data"))
    assert list(graph.jobs["iter-00/kept_out"].inputs) == ["source", "source.01"]
    assert list(graph.jobs["iter-00/mixed_0"].inputs) == ["source", "held_out", "policy"]
    assert {graph.jobs[f"iter-00/{name}"].resources for name in ("kept_out", "mixed_0")} == {None}
    found = [
        {
            name: edge[:2]
            for name, edge in edges(graph, f"iter-{number:02d}/pairs").items()
            if name.startswith("earlier")
        }
        for number in range(4)
    ]
    before = [(f"iter-{number:02d}/pairs", "own.parquet") for number in range(3)]
    assert found == [
        {},
        {"earlier.1": before[0]},
        {"earlier.1": before[1], "earlier.2": before[0]},
        {"earlier.1": before[2], "earlier.2": before[1]},
    ]
    for number in range(4):
        given = edges(graph, f"iter-{number:02d}/pairs")
        assert given["kept_out"] == ("iter-00/kept_out", "kept_out.parquet", "all")
        assert given["mixed.0"] == ("iter-00/mixed_0", "rows.parquet", "all")


def test_where_benchmarks_and_datasets_lie_decides_nothing_and_what_they_hold_does(
    demo: Recipe, tmp_path: Path
) -> None:
    here, there = mixing(demo, tmp_path / "here"), mixing(demo, tmp_path / "there")
    assert build_graph(here).fingerprints == build_graph(there).fingerprints
    assert build_graph(replace(here, iterations=2)).fingerprints.items() <= build_graph(here).fingerprints.items()
    before = build_graph(here)
    (tmp_path / "here" / "b.jsonl").write_text('{"prompt": "another"}\n')
    after = build_graph(here).fingerprints
    changed = {name for name in after if after[name] != before.fingerprints[name]}
    assert changed == {"iter-00/kept_out", *before.downstream("iter-00/pairs")}


def test_another_share_of_a_dataset_does_not_read_it_again(demo: Recipe, tmp_path: Path) -> None:
    recipe = mixing(demo, tmp_path / "data")
    more = replace(recipe.pairs, mix=(replace(recipe.pairs.mix[0], ratio=0.6, keep="keep_end"),))
    before, after = build_graph(recipe).fingerprints, build_graph(replace(recipe, pairs=more)).fingerprints
    assert before["iter-00/mixed_0"] == after["iter-00/mixed_0"]
    assert before["iter-00/pairs"] != after["iter-00/pairs"]


def test_the_thresholds_of_the_guard_reach_pairs_and_training(demo: Recipe) -> None:
    graph = build_graph(replace(demo, guard=GuardConfig(stop_tie_rate=0.9)))
    for job in ("iter-00/pairs", "iter-01/train"):
        assert graph.jobs[job].config.guard.stop_tie_rate == 0.9
