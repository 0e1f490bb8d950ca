"""The graph: a run as jobs with named inputs, built from a recipe by a pure function.

    iter-00   prompts ─┬─ generate ── rank ── pairs ── reference ── train ── answers ── evaluate
                       └─ baseline ─────────────────────────────────────────────────────┘
    iter-01   generate (policy: iter-00/train) ── rank ── ...

With self-instruct (``instruct.num_prompts``), ``instruct ── collect`` come before every ``generate`` and make its prompts,
from seeds that are the source's prompts or the job ``seeds``, in the job ``clusters`` if there are to be clusters.

With ``preferences.source``, the job ``preferences`` stands for ``generate ── rank`` of all iterations.

``answers`` and ``baseline`` are the stage ``generate`` over the held-out prompts, with the new and with the initial policy.
The policy of an iteration is the model that the iteration before it trained; it is also its reference, unless the recipe
names another. With ``conversations.source``, ``conversations ── sft`` come first, and the initial policy is what they make.
Each policy answers the benchmarks that are asked for: ``answers-NAME``, the initial one ``baseline-NAME``, ``answer_files``.

With ``pairs.decontaminate`` and ``pairs.mix``, ``kept_out`` and ``mixed_0``, ... are read at the launch for every ``pairs``;
with ``pairs.accumulate``, ``pairs`` also reads those of the iterations before.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aipo_hpc.errors import GraphError
from aipo_hpc.outside import Outside, outside, policy_outside, ranker_inputs, source_inputs
from aipo_hpc.rankers.config import without_models
from aipo_hpc.recipe import Recipe
from aipo_hpc.resources import Resources
from aipo_hpc.settings import content
from aipo_hpc.stage_table import STAGES
from aipo_hpc.stages import (
    answer_files,
    benchmark,
    clusters,
    collect,
    conversations,
    evaluate,
    generate,
    instruct,
    kept_out,
    pairs,
    preferences,
    prompts,
)


@dataclass(frozen=True)
class Edge:
    """An input made by another job: by all of its shards, or shard by shard; ``part`` names the files, or a folder/."""

    job: str
    part: str
    by: Literal["all", "shard"] = "all"
    trust_remote_code: bool = False
    """Whether the code that comes with a model is run; a trained one brings that of the model it was made from."""


@dataclass(frozen=True)
class Job:
    """One stage at one iteration. ``name`` is its identity; the fingerprint tells whether its content changed."""

    name: str
    stage: str
    iteration: int
    num_shards: int
    seed: int
    config: Any
    inputs: Mapping[str, Edge | Outside]
    resources: Resources | None = None
    """None: runs where the run is launched, before anything is submitted."""

    @property
    def edges(self) -> dict[str, Edge]:
        """The inputs that other jobs make."""
        return {name: source for name, source in self.inputs.items() if isinstance(source, Edge)}


@dataclass(frozen=True)
class Graph:
    """Jobs in an order in which each comes after its inputs, with their fingerprints and contents."""

    jobs: Mapping[str, Job]
    contents: Mapping[str, dict[str, Any]]
    fingerprints: Mapping[str, str]

    def downstream(self, name: str) -> list[str]:
        """``name`` and all jobs that depend on it, in order."""
        found = {name}
        for job in self.jobs.values():
            if any(edge.job in found for edge in job.edges.values()):
                found.add(job.name)
        return [job for job in self.jobs if job in found]


def make_graph(jobs: list[Job]) -> Graph:
    """Check jobs, which come after their inputs, and tell their fingerprints.

    Raises GraphError for a name used twice, an unknown input, one that comes later (so that jobs would wait for each other),
    or a shard-by-shard input with another number of shards.
    """
    named: dict[str, Job] = {}
    contents: dict[str, dict[str, Any]] = {}
    fingerprints: dict[str, str] = {}
    for job in jobs:
        if not re.fullmatch(r"iter-\d+/[a-z][a-z0-9_-]*", job.name):
            raise GraphError(f"{job.name!r}: a job's name becomes a folder's; it must be like iter-00/generate")
        if job.name in named:
            raise GraphError(f"{job.name}: two jobs have this name")
        for name, edge in job.edges.items():
            if edge.job not in named:
                raise GraphError(
                    f"{job.name}: input {name!r} names job {edge.job!r}, which is not among the jobs before it: {list(named)}"
                )
            if edge.by == "shard" and named[edge.job].num_shards != job.num_shards:
                raise GraphError(
                    f"{job.name}: input {name!r} is read shard by shard, but {edge.job} has "
                    f"{named[edge.job].num_shards} shards and {job.name} has {job.num_shards}"
                )
        named[job.name] = job
        contents[job.name] = job_content(job, fingerprints)
        fingerprints[job.name] = digest(contents[job.name])
    return Graph(named, contents, fingerprints)


def job_content(job: Job, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What decides the result of a job: settings, inputs' identities, number of shards, seed, version of the stage."""
    inputs = {
        name: {"job": source.job, "part": source.part, "by": source.by, "fingerprint": fingerprints[source.job]}
        if isinstance(source, Edge)
        else {"identity": source.identity}
        for name, source in sorted(job.inputs.items())
    }
    return {
        "stage": job.stage,
        "version": STAGES[job.stage].version,
        "iteration": job.iteration,
        "num_shards": job.num_shards,
        "seed": job.seed,
        "settings": content(job.config),
        "inputs": inputs,
    }


def digest(value: dict[str, Any]) -> str:
    """SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def build_graph(recipe: Recipe) -> Graph:
    """The jobs of a recipe. Reads outside models and prompt files only to tell their identity."""
    initial: Edge | Outside = policy_outside(recipe)
    judging = evaluate.judging(recipe.evaluate, recipe.rank)
    rankers = ranker_inputs(recipe.rank)
    evaluation = dataclasses.replace(without_models(judging), benchmarks=())
    ranking = dataclasses.replace(without_models(recipe.rank), num_shards=None)
    answers = dataclasses.replace(
        generate.sampled_only(recipe.generate),
        n=1,
        num_prompts=None,
        temperature=evaluation.temperature,
        num_shards=evaluation.num_shards,
    )
    jobs: list[Job] = []

    def add(
        iteration: int,
        name: str,
        config: Any,
        inputs: Mapping[str, Edge | Outside],
        num_shards: int = 1,
        stage: str | None = None,
    ) -> str:
        path = f"iter-{iteration:02d}/{name}"
        resources = getattr(config, "resources", None)
        jobs.append(Job(path, stage or name, iteration, num_shards, recipe.seed, config, inputs, resources))
        return path

    def read_preferences(name: str, config: preferences.PreferencesConfig) -> str:
        preferred: dict[str, Edge | Outside] = {
            **source_inputs(config.source, config.revision),
            "held_out": Edge(prompts_job, prompts.HELD_OUT),
            "policy": policy_outside(recipe),
        }
        return add(0, name, dataclasses.replace(config, source=""), preferred, stage="preferences")

    prompts_job = add(0, "prompts", recipe.data, source_inputs(recipe.prompts, recipe.data.revision))
    if recipe.conversations.source:
        chats = source_inputs(recipe.conversations.source, recipe.conversations.revision)
        chats_job = add(0, "conversations", dataclasses.replace(recipe.conversations, source=""), chats)
        conversed: dict[str, Edge | Outside] = {
            "conversations": Edge(chats_job, conversations.CONVERSATIONS),
            "policy": initial,
        }
        initial = Edge(add(0, "sft", recipe.sft, conversed), "model/", trust_remote_code=recipe.trust_remote_code)
    judges = {name: judge or initial for name, judge in ranker_inputs(judging).items()}
    baseline_inputs: dict[str, Edge | Outside] = {"prompts": Edge(prompts_job, prompts.HELD_OUT), "policy": initial}
    baseline_job = add(0, "baseline", answers, baseline_inputs, evaluation.num_shards, "generate")
    questions: dict[str, Edge | Outside] = {each.name: outside(each.questions) for each in recipe.evaluate.benchmarks}

    def answer_benchmarks(iteration: int, prefix: str, policy: Edge | Outside) -> dict[str, str]:
        """Jobs in which a policy answers the benchmarks, by benchmark."""
        return {
            each.name: add(
                iteration,
                f"{prefix}-{each.name}",
                benchmark.answering(each, recipe.generate),
                {"questions": questions[each.name], "policy": policy},
                each.num_shards,
                "benchmark",
            )
            for each in recipe.evaluate.benchmarks
        }

    baselines = answer_benchmarks(0, "baseline", initial)
    # What the reference is in every iteration, if it is not the iteration's own policy.
    held: dict[str, Edge | Outside] = {"initial": initial}
    if (name := recipe.reference.model) not in ("previous", "initial"):
        held[name] = outside(name, recipe.reference.revision)
    if recipe.preferences.source:
        ranked = Edge(read_preferences("preferences", recipe.preferences), preferences.PREFERENCES)
    beside: dict[str, Edge | Outside] = {}
    if recipe.pairs.decontaminate:
        listed = add(0, "kept_out", kept_out.KeptOutConfig(), source_inputs(recipe.pairs.decontaminate, None))
        beside[pairs.KEPT_OUT] = Edge(listed, kept_out.KEPT_OUT)
    for number, mixed in enumerate(recipe.pairs.mix):
        name = read_preferences(f"mixed_{number}", mixed.reading())
        beside[f"{pairs.MIXED}{number}"] = Edge(name, preferences.PREFERENCES)
    policy: Edge | Outside = initial
    asked = Edge(prompts_job, prompts.TRAIN)
    made: dict[str, Edge | Outside] = {}
    known: dict[str, Edge | Outside] = {"pool": asked, "held_out": Edge(prompts_job, prompts.HELD_OUT)}
    if recipe.instruct.num_prompts and recipe.seed_prompts:
        seeds = source_inputs(recipe.seed_prompts, recipe.seed_data.revision)
        known["pool"] = Edge(add(0, "seeds", recipe.seed_data, seeds, stage="prompts"), prompts.TRAIN)
    if recipe.instruct.num_prompts and recipe.clusters.num_clusters:
        clustered = {"pool": known["pool"]}
        if recipe.clusters.model_name_or_path:
            clustered["embedder"] = outside(recipe.clusters.model_name_or_path, recipe.clusters.revision)
        clustering = dataclasses.replace(recipe.clusters, model_name_or_path="", revision=None)
        known["clusters"] = Edge(add(0, "clusters", clustering, clustered), clusters.CLUSTERS)
    for iteration in range(recipe.iterations):
        if recipe.instruct.num_prompts:
            wanted = {**known, **made, "policy": policy}
            instructed = add(iteration, "instruct", recipe.instruct, wanted, recipe.instruct.num_shards)
            collected = add(
                iteration,
                "collect",
                collect.CollectConfig(
                    num_prompts=recipe.instruct.num_prompts,
                    near_duplicate=recipe.instruct.near_duplicate,
                    min_share=recipe.instruct.min_share,
                    resources=recipe.instruct.collect_resources,
                ),
                {"new": Edge(instructed, instruct.PROMPTS)},
            )
            asked = Edge(collected, collect.PROMPTS)
            made[f"{instruct.MADE}{iteration:02d}"] = asked
        if not recipe.preferences.source:
            shards = recipe.generate.num_shards
            generated = add(iteration, "generate", recipe.generate, {"prompts": asked, "policy": policy}, shards)
            ranking_job = add(
                iteration,
                "rank",
                ranking,
                {
                    "responses": Edge(generated, "rows.parquet", "shard"),
                    **{name: ranker or policy for name, ranker in rankers.items()},
                },
                shards,
            )
            ranked = Edge(ranking_job, "rows.parquet")
        pairing = pairs.as_known_to_its_job(recipe.pairs, iteration, recipe.guard)
        for back in range(1, len(pairing.accumulate) + 1):
            beside[f"{pairs.EARLIER}{back}"] = Edge(f"iter-{iteration - back:02d}/pairs", pairs.OWN_PAIRS)
        paired = add(iteration, "pairs", pairing, {"ranked": ranked, "policy": policy, **beside})
        referenced = add(
            iteration,
            "reference",
            # Which model it is, is an input, known by what it holds.
            dataclasses.replace(recipe.reference, model="", revision=None),
            {
                "pairs": Edge(paired, pairs.PAIRS),
                "reference": held.get(recipe.reference.model, policy),
                "policy": policy,
            },
            recipe.reference.num_shards,
        )
        trained = add(
            iteration,
            "train",
            dataclasses.replace(recipe.train, guard=recipe.guard),
            {"pairs": Edge(referenced, "rows.parquet"), "policy": policy},
        )
        policy = Edge(trained, "model/", trust_remote_code=recipe.trust_remote_code)
        answered = add(
            iteration,
            "answers",
            answers,
            {"prompts": Edge(prompts_job, prompts.HELD_OUT), "policy": policy},
            evaluation.num_shards,
            "generate",
        )
        add(
            iteration,
            "evaluate",
            evaluation,
            {
                "answers": Edge(answered, "rows.parquet"),
                "baseline": Edge(baseline_job, "rows.parquet"),
                **judges,
            },
        )
        if answered_by := answer_benchmarks(iteration, "answers", policy):
            rows: dict[str, Edge | Outside] = {name: Edge(job, "rows.parquet") for name, job in answered_by.items()}
            if iteration == 0:
                rows |= {f"{name}.initial": Edge(job, "rows.parquet") for name, job in baselines.items()}
            add(
                iteration,
                "answer_files",
                answer_files.AnswerFilesConfig(tuple(answered_by), recipe.name),
                {**rows, **{f"{name}.questions": each for name, each in questions.items()}},
            )
    return make_graph(jobs)
