"""Every recipe that comes along, run from beginning to end in miniature."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from miniature import miniature, miniature_policy, miniature_reward_model
from sandbox import Sandbox
from test_recipes import NAMES

from aipo_hpc.chat_templates import read_template
from aipo_hpc.launch import launch
from aipo_hpc.recipe import load_recipe
from aipo_hpc.record import read_graph
from aipo_hpc.rows import Pair, Ranked, read_rows
from aipo_hpc.store import Run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    miniature_policy(folder / "policy")
    miniature_reward_model(folder / "reward_model")
    return folder


def outputs(run: Run, job: str) -> dict[str, Path]:
    """Files of a job's first shard by their names in it."""
    record = run.job(job).read_job()
    assert record is not None
    sentinel = run.job(job).done(record["fingerprint"])[0]
    folder = run.job(job).attempt_folder(0, sentinel.attempt)
    return {output.path: folder / output.path for output in sentinel.outputs}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_to_its_end_in_miniature(name: str, models: Path, tmp_path: Path) -> None:
    threads, begun = torch.get_num_threads(), time.monotonic()
    torch.set_num_threads(1)
    try:
        recipe = load_recipe(name)
        run = launch(miniature(recipe, models, tmp_path / "run"))
    finally:
        torch.set_num_threads(threads)
    trained = run.job("iter-00/train").read_job()
    assert trained is not None and trained["settings"]["loss_type"] == recipe.train.loss_type
    assert trained["settings"]["beta"] == recipe.train.beta
    pairs = list(read_rows([outputs(run, "iter-00/pairs")["pairs.parquet"]], Pair))
    assert pairs
    ranking = "preferences" if recipe.preferences.source else "rank"
    ranked = list(read_rows([outputs(run, f"iter-00/{ranking}")["rows.parquet"]], Ranked))
    wanted = 2 if recipe.preferences.source else recipe.generate.n
    assert max(len(row.candidates) for row in ranked) == wanted
    template = outputs(run, "iter-00/train")["model/chat_template.jinja"].read_text()
    if recipe.chat_template is not None:
        assert template == read_template(recipe.chat_template)
    metrics = json.loads(outputs(run, "iter-00/evaluate")["metrics.json"].read_text())
    assert 0 <= metrics["win_rate"] <= 1
    seconds = time.monotonic() - begun
    print(f"{name}: {len(ranked)} prompts, {len(pairs)} pairs, {recipe.train.loss_type}, {seconds:.1f} s")


@pytest.mark.timeout(1800)
def test_a_recipe_runs_on_slurm_in_miniature(models: Path, tmp_path: Path, slurm_sandbox: Sandbox) -> None:
    """In two shards, so that ranking overlaps with generation, on the nodes of a real Slurm."""
    own = tmp_path / "mine.py"
    own.write_text(
        "from pathlib import Path\n"
        "from miniature import miniature\n"
        "from aipo_hpc.recipe import Recipe, load_recipe\n\n\n"
        "def recipe() -> Recipe:\n"
        f"    return miniature(load_recipe('sppo'), Path({str(models)!r}), Path({str(tmp_path / 'run')!r}))\n"
    )
    settings = ["cluster=slurm", "slurm.query_seconds=3", "poll_seconds=0.3", "generate.num_shards=2"]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **slurm_sandbox.env, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "aipo_hpc.launch", f"recipe={own}", *settings]
    subprocess.run(command, env=environment, check=True, timeout=1500)
    run = Run(tmp_path / "run")
    graph = read_graph(run)
    for name, job in graph.jobs.items():
        assert len(run.job(name).done(graph.fingerprints[name])) == job.num_shards
    assert graph.jobs["iter-00/train"].config.loss_type == "sppo_hard"
    submitted = [event for event in run.read_journal() if event["event"] == "submitted"]
    print(f"{len(submitted)} submissions for {len(graph.jobs)} jobs")
    assert submitted
