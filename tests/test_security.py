"""A run is its owner's: nobody else can write to it, no secret is in it, no name leads out of it."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import TouchConfig, chain, child_environment, eventually, write_run
from sandbox import Sandbox
from test_chain import chained, finished

from aipo_hpc.errors import GraphError, RecipeError, RunError
from aipo_hpc.graph import make_graph
from aipo_hpc.launch import step
from aipo_hpc.recipe import Recipe, validate
from aipo_hpc.store import Run

SECRETS = {"HF_TOKEN": "hf_SECRETofTheTest", "WANDB_API_KEY": "wandbSECRETofTheTest"}


def test_a_run_directory_and_the_folders_on_the_way_are_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.umask(0o022)
    Run(Recipe(name="mine").folder()).create()
    for folder in (tmp_path / "runs", tmp_path / "runs" / "mine"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_run_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(RunError, match="chmod go-w"):
        Run(tmp_path).create()


def test_a_run_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(RunError, match=r"belongs to another user \(uid 12345\)"):
        Run(tmp_path).create()


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "with space", "new\nline", "-rf"])
def test_a_recipes_name_cannot_lead_out_of_its_place(name: str, small_recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="names the run directory"):
        validate(replace(small_recipe, name=name))


@pytest.mark.parametrize("name", ["../a", "iter-00/../a", "iter-00/a/b", "a", "iter-00/A b"])
def test_a_jobs_name_cannot_lead_out_of_its_run(name: str) -> None:
    job = replace(chain(1).jobs["iter-00/a"], name=name)
    with pytest.raises(GraphError, match="must be like iter-00/generate"):
        make_graph([job])


@pytest.mark.parametrize(
    "setup", ["export HF_TOKEN=hf_x", "WANDB_API_KEY=x", "export MY_password=x", "export A=1 AWS_SECRET=x"]
)
def test_a_secret_in_the_settings_is_refused_before_it_is_written(setup: str, small_recipe: Recipe) -> None:
    recipe = replace(small_recipe, slurm=replace(small_recipe.slurm, setup=("module load cuda", setup)))
    with pytest.raises(RecipeError, match=r"would be kept in files of the run"):
        validate(recipe)


def test_no_secret_of_the_environment_is_in_any_file_of_a_run(
    slurm_sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**slurm_sandbox.env, **child_environment(tmp_path / "site"), **SECRETS}.items():
        monkeypatch.setenv(name, value)
    fails = tmp_path / "fails"
    fails.write_text("RuntimeError with a traceback")
    run = chained(tmp_path / "run", chain(2, TouchConfig(fail=str(fails))))
    step(run.path, None)
    assert eventually(lambda: run.job("iter-00/a").failures(), 60)
    fails.unlink()
    assert eventually(lambda: finished(run), 240)

    files = [path for path in run.path.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".pkl", ".sh", ".out", ".json", ".jsonl"} <= kinds
    for path in files:
        held = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in held], path
        assert os.environ["PATH"].encode() not in held, f"{path} holds the environment"
    loose = [path for path in run.path.rglob("*") if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)]
    assert loose == []
    pickles = [path.relative_to(run.path) for path in files if path.suffix == ".pkl"]
    assert all(path.parts[0] == "chain" or path.parts[2] == "logs" for path in pickles)
    print(
        f"{len(files)} files ({', '.join(sorted(kinds))}), {len(pickles)} of them submitit's pickles: no secret, no environment"
    )


def test_a_job_whose_shards_still_run_is_not_reset(
    slurm_sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aipo_hpc.cancel import cancel_run, reset_job

    for name, value in {**slurm_sandbox.env, **child_environment(tmp_path / "site")}.items():
        monkeypatch.setenv(name, value)
    hold = tmp_path / "hold"
    hold.touch()
    run = chained(tmp_path / "run", chain(2, TouchConfig(hold=str(hold))))
    step(run.path, None)
    with pytest.raises(RunError, match=r"shards of iter-00/a, iter-00/b still wait or run"):
        reset_job(run, "iter-00/a")
    assert (run.path / "iter-00/a/job.json").exists(), "nothing was moved"
    cancel_run(run)
    hold.unlink()

    def is_reset() -> bool:
        try:
            return "0.00 GPU-hours" in reset_job(run, "iter-00/a")
        except RunError:
            return False  # what was cancelled takes seconds to end

    assert eventually(is_reset, 60)
    assert not (run.path / "iter-00/a").exists() and list(run.path.glob("set-aside/*/iter-00/a/job.json"))


def test_a_run_directory_made_by_hand_is_checked_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", chain(1))
    (tmp_path / "run").chmod(0o775)
    with pytest.raises(RunError, match="others may write to it"):
        run.create()
