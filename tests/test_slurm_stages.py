"""Stages that a run may have besides the usual ones, as jobs of one run on a real Slurm: fine-tuning, prompts of the
policy's own making, and answers to benchmarks with the files that the benchmarks' own tools read.
"""

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sandbox import Sandbox
from tiny_models import listing_model_folder, task

from aipo_hpc.benchmarks import BenchmarkConfig, load_benchmark
from aipo_hpc.launch import launch
from aipo_hpc.recipe import Recipe
from aipo_hpc.record import read_graph
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Prompt, Responses, read_rows
from aipo_hpc.sentinel import Sentinel
from aipo_hpc.stages.sft import SftConfig

pytest.importorskip("trl")
pytestmark = pytest.mark.timeout(1800)
"""A whole run, each job of which loads torch: minutes on a busy machine."""

ONE_CORE = Resources(cpus_per_task=1, time=30)
QUESTIONS = {
    "alpaca_eval": {"instruction": "why is fire red", "output": "theirs", "generator": "x", "dataset": "helpful_base"},
    "mt_bench": {"question_id": 81, "category": "writing", "turns": ["tell a story", "make it small"]},
    "arena_hard": {"uid": "a1", "category": "arena-hard-v0.1", "cluster": "c", "prompt": "explain the moon"},
}


def written(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipe(small_recipe: Recipe, tmp_path: Path) -> Recipe:
    """One iteration with all of them. Fine-tuning hardly moves the policy, which must go on listing tasks."""
    draw = random.Random(1)
    seeds = [{"prompt": text} for text in sorted({task(draw) for _ in range(40)})]
    chats = [
        {"messages": [{"role": "user", "content": task(draw)}, {"role": "assistant", "content": "I do not know."}]}
        for _ in range(8)
    ]
    benchmarks = tuple(
        BenchmarkConfig(name, written(tmp_path / f"{name}.jsonl", [row]), max_tokens=6, max_prompt_tokens=200)
        for name, row in QUESTIONS.items()
    )
    return replace(
        small_recipe,
        cluster="slurm",
        poll_seconds=0.3,
        slurm=replace(small_recipe.slurm, query_seconds=3.0),
        model_name_or_path=str(listing_model_folder(tmp_path / "listing")),
        prompts=written(tmp_path / "seeds.jsonl", seeds),
        iterations=1,
        data=replace(small_recipe.data, limit=None, num_held_out=4),
        conversations=replace(small_recipe.conversations, source=written(tmp_path / "chats.jsonl", chats)),
        sft=SftConfig(
            learning_rate=1e-7, global_batch_size=4, per_device_train_batch_size=2, max_length=128, dtype="float32",
            zero_stage=0, gradient_checkpointing=False, resources=ONE_CORE,
        ),
        clusters=replace(small_recipe.clusters, num_clusters=2, resources=ONE_CORE),
        instruct=replace(
            small_recipe.instruct, engine="transformers", dtype="float32", num_prompts=12, num_shards=2, batch_size=8,
            max_tokens=60, max_prompt_tokens=300, temperature=1.0, top_p=1.0, near_duplicate=0.9,
            resources=ONE_CORE, collect_resources=ONE_CORE,
        ),
        generate=replace(small_recipe.generate, num_shards=1),
        evaluate=replace(small_recipe.evaluate, benchmarks=benchmarks),
    )  # fmt: skip


def test_fine_tuning_new_prompts_and_benchmarks_are_jobs_of_a_run_on_slurm(
    slurm_sandbox: Sandbox, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**slurm_sandbox.env, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    begun = time.monotonic()
    run = launch(recipe)
    graph = read_graph(run)

    def sentinels(name: str) -> dict[int, Sentinel]:
        return dict(run.job(f"iter-00/{name}").done(graph.fingerprints[f"iter-00/{name}"]))

    def files(name: str, pattern: str) -> list[Path]:
        return sorted((run.path / "iter-00" / name).glob(f"shards/*/*/{pattern}"))

    asked = [f"{who}-{name}" for who in ("baseline", "answers") for name in QUESTIONS]
    for name in ("sft", "clusters", "instruct", "collect", *asked, "answer_files"):
        found = sentinels(name)
        assert len(found) == graph.jobs[f"iter-00/{name}"].num_shards
        assert all("slurm_job_id" in sentinel.scheduler for sentinel in found.values()), name

    for name in ("instruct", "generate", "baseline", "baseline-mt_bench"):
        assert {each.inputs["policy"]["job"] for each in sentinels(name).values()} == {"iter-00/sft"}
    made = {row.prompt for row in read_rows(files("collect", "prompts.parquet"), Prompt)}
    answered = {row.prompt for row in read_rows(files("generate", "rows.parquet"), Responses)}
    assert len(made) == 12 and answered == made

    expected = {
        load_benchmark(name).answer_file(f"demo-{model}") for name in QUESTIONS for model in ("initial", "iter-00")
    }
    assert {output.path for output in sentinels("answer_files")[0].outputs} == expected
    first, second = read_rows(files("answers-mt_bench", "rows.parquet"), Responses)
    assert [said.content for said in second.messages][:2] == ["tell a story", first.candidates[0].response]
    jobs = sum(job.resources is not None for job in graph.jobs.values())
    print(f"{jobs} jobs on Slurm in {time.monotonic() - begun:.0f} s, fine-tuned policy to answer files")
