"""Training under DeepSpeed ZeRO, in processes of their own on this machine, with Gloo."""

import math
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model_folder
from training_tasks import (
    PLAIN,
    identical,
    killed_and_resumed,
    largest_difference,
    launch,
    logs,
    metrics,
    scored_rows,
    train_task,
    weights,
)

from aipo_hpc.stages.train import TrainConfig, run

pytest.importorskip("deepspeed")

# 22 pairs, 8 to a step: the last step has 6, a micro-batch less per process and, of the last one, half.
NUM_PAIRS = 22


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return scored_rows(tmp_path_factory.mktemp("rows") / "reference", NUM_PAIRS, model)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, rows: Path, model: Path) -> Path:
    """One process without DeepSpeed."""
    task = train_task(tmp_path_factory.mktemp("plain") / "out", rows, model)
    run(TrainConfig(**PLAIN), task)
    return task.out


def assert_same_training(one: Path, other: Path) -> None:
    for line, same in zip(metrics(one), metrics(other), strict=True):
        assert line["step"] == same["step"] and line["epoch"] == same["epoch"]
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "lengths/chosen"):
            assert line[name] == pytest.approx(same[name], rel=1e-4, abs=1e-5)
    assert largest_difference(one / "model", other / "model") < 1e-4


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_zero_with_two_processes_is_plain_training(
    tmp_path: Path, rows: Path, model: Path, plain: Path, zero_stage: int
) -> None:
    task = train_task(tmp_path / "out", rows, model)
    config = {**PLAIN, "zero_stage": zero_stage, "gradient_checkpointing": zero_stage == 3}
    assert launch(task, num_processes=2, **config) == [0, 0], logs(task)
    assert_same_training(plain, task.out)
    before, after = weights(model), weights(task.out / "model")
    assert set(before) == set(after)
    for name, tensor in after.items():
        assert tensor.shape == before[name].shape and not tensor.equal(before[name]), name


def test_the_first_step_of_dpo_costs_ln_2_under_zero_and_bfloat16(tmp_path: Path, model: Path) -> None:
    """Reference values rounded to bfloat16 on their way to the loss would show here."""
    rows = scored_rows(tmp_path / "reference", 8, model, dtype="bfloat16", tokens_per_batch=1)
    task = train_task(tmp_path / "out", rows, model)
    config = {**PLAIN, "dtype": "bfloat16", "zero_stage": 3, "alpha": 0.0, "lambda_": 0.0, "gamma": 0.0}
    assert launch(task, **{**config, "per_device_train_batch_size": 1}) == [0], logs(task)
    line = metrics(task.out)[0]
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert line["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)
    assert {tensor.dtype for tensor in weights(task.out / "model").values()} == {torch.bfloat16}


@pytest.mark.slow
def test_two_processes_without_deepspeed_are_plain_training(
    tmp_path: Path, rows: Path, model: Path, plain: Path
) -> None:
    task = train_task(tmp_path / "out", rows, model)
    assert launch(task, num_processes=2, **PLAIN) == [0, 0], logs(task)
    assert_same_training(plain, task.out)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_kill_9_under_zero_and_resume_give_the_weights_of_an_undisturbed_run(
    tmp_path: Path, rows: Path, model: Path, zero_stage: int
) -> None:
    config = {**PLAIN, "dtype": "bfloat16", "zero_stage": zero_stage, "num_train_epochs": 2.0, "save_steps": 1}
    whole, resumed = killed_and_resumed(
        train_task, tmp_path, rows, model, num_processes=2, die="in save of step 3", **config
    )
    assert identical(whole / "model", resumed / "model")
    assert metrics(whole) == metrics(resumed)


@pytest.mark.slow
def test_a_checkpoint_of_another_number_of_processes_is_passed_over(tmp_path: Path, rows: Path, model: Path) -> None:
    config = {**PLAIN, "zero_stage": 2, "save_steps": 1}
    first = train_task(tmp_path / "first", rows, model)
    assert launch(first, num_processes=2, die="after step 3", **config) == [-9, -9], logs(first)
    second = train_task(tmp_path / "second", rows, model, earlier=(first.out,))
    assert launch(second, **config) == [0], logs(second)
    assert "world_size was 2, is 1" in logs(second) and "'resumed_from_step': 0" in logs(second)
