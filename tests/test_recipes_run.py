"""Every recipe that comes along, run from beginning to end in miniature."""

import json
import time
from pathlib import Path

import pytest
import torch
from miniature import miniature, miniature_policy, miniature_reward_model
from test_recipes import NAMES

from aipo_hpc.chat_templates import read_template
from aipo_hpc.launch import launch
from aipo_hpc.recipe import load_recipe
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
    ranked = list(read_rows([outputs(run, "iter-00/rank")["rows.parquet"]], Ranked))
    assert max(len(row.candidates) for row in ranked) == recipe.generate.n
    template = outputs(run, "iter-00/train")["model/chat_template.jinja"].read_text()
    if recipe.chat_template is not None:
        assert template == read_template(recipe.chat_template)
    metrics = json.loads(outputs(run, "iter-00/evaluate")["metrics.json"].read_text())
    assert 0 <= metrics["win_rate"] <= 1
    seconds = time.monotonic() - begun
    print(f"{name}: {len(ranked)} prompts, {len(pairs)} pairs, {recipe.train.loss_type}, {seconds:.1f} s")
