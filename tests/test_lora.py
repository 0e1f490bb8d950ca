"""Training adapters alone: what is trained, what is written, and that a kill costs nothing."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

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

from aipo_hpc.errors import RecipeError
from aipo_hpc.recipe import Recipe, validate
from aipo_hpc.stages.train import TrainConfig, run
from aipo_hpc.task import ADVANCED

pytest.importorskip("peft")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install bitsandbytes"
)
LORA: dict[str, Any] = {**PLAIN, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2}
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return scored_rows(tmp_path_factory.mktemp("rows") / "reference", 20, model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, rows: Path, model: Path) -> Path:
    task = train_task(tmp_path_factory.mktemp("lora") / "out", rows, model)
    outcome = run(TrainConfig(**LORA), task)
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "model/config.json"} <= {
        *outcome.outputs
    }
    assert set(outcome.outputs) == {
        path.relative_to(task.out).as_posix()
        for path in task.out.rglob("*")
        if path.is_file() and path.name != ADVANCED
    }
    return task.out


def assert_adapters_added(model: Path, out: Path) -> None:
    before, after, adapter = weights(model), weights(out / "model"), weights(out / "adapter")
    assert set(before) == set(after)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert {name.split(".")[-2] for name in changed} == LINEAR
    for name in changed:
        stem = "base_model.model." + name.removesuffix(".weight")
        a, b = adapter[f"{stem}.lora_A.weight"], adapter[f"{stem}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == 4
        torch.testing.assert_close(after[name], before[name] + 8 / 4 * b @ a, atol=1e-6, rtol=1e-5)


def test_the_model_is_the_policy_with_the_adapters_product_added(trained: Path, model: Path) -> None:
    assert_adapters_added(model, trained)
    assert metrics(trained)[-1]["rewards/margins"] > 0.01


def test_the_model_folder_loads_without_peft_and_says_so(trained: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(trained / "model")
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert "peft" not in (trained / "model" / "config.json").read_text()
    assert json.loads((trained / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_adapters_go_where_they_are_wanted(tmp_path: Path, rows: Path, model: Path) -> None:
    task = train_task(tmp_path / "out", rows, model)
    run(TrainConfig(**LORA, lora_target_modules=("q_proj", "v_proj")), task)
    before, after = weights(model), weights(task.out / "model")
    assert {name.split(".")[-2] for name in before if not before[name].equal(after[name])} == {"q_proj", "v_proj"}
    with pytest.raises(RecipeError, match=r"train.lora_target_modules=\['qq_proj'\]"):
        run(TrainConfig(**LORA, lora_target_modules=("qq_proj",)), train_task(tmp_path / "wrong", rows, model))


def test_a_bfloat16_policy_has_fp32_adapters_and_a_bfloat16_model(tmp_path: Path, rows: Path, model: Path) -> None:
    task = train_task(tmp_path / "out", rows, model)
    run(TrainConfig(**{**LORA, "dtype": "bfloat16"}), task)
    assert {tensor.dtype for tensor in weights(task.out / "adapter").values()} == {torch.float32}
    assert {tensor.dtype for tensor in weights(task.out / "model").values()} == {torch.bfloat16}


@pytest.mark.parametrize("load_in_4bit", [False, pytest.param(True, marks=[needs_bitsandbytes, pytest.mark.slow])])
def test_kill_9_and_resume_give_the_weights_of_an_undisturbed_run(
    tmp_path: Path, rows: Path, model: Path, load_in_4bit: bool
) -> None:
    config = {**LORA, "save_steps": 1, "lora_dropout": 0.1, "num_train_epochs": 2.0, "load_in_4bit": load_in_4bit}
    whole, resumed = killed_and_resumed(train_task, tmp_path, rows, model, **config)
    assert identical(whole / "adapter", resumed / "adapter")
    assert identical(whole / "model", resumed / "model")


@pytest.mark.parametrize("zero_stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_adapters_under_zero_with_two_processes_are_those_of_one(
    tmp_path: Path, rows: Path, model: Path, trained: Path, zero_stage: int
) -> None:
    pytest.importorskip("deepspeed")
    task = train_task(tmp_path / "out", rows, model)
    assert launch(task, num_processes=2, **{**LORA, "zero_stage": zero_stage}) == [0, 0], logs(task)
    assert largest_difference(trained / "adapter", task.out / "adapter") < 1e-3
    assert largest_difference(trained / "model", task.out / "model") < 1e-3
    for line, same in zip(metrics(trained), metrics(task.out), strict=True):
        assert line["loss"] == pytest.approx(same["loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_kill_9_under_zero_and_resume_give_the_adapters_of_an_undisturbed_run(
    tmp_path: Path, rows: Path, model: Path, zero_stage: int
) -> None:
    pytest.importorskip("deepspeed")
    config = {**LORA, "zero_stage": zero_stage, "save_steps": 1}
    whole, resumed = killed_and_resumed(train_task, tmp_path, rows, model, num_processes=2, **config)
    assert identical(whole / "adapter", resumed / "adapter")


def test_four_bits_need_adapters_and_weights_that_are_not_split() -> None:
    with pytest.raises(RecipeError, match=r"train.load_in_4bit=True must be used with lora_r and a zero_stage below 3"):
        TrainConfig(load_in_4bit=True)
    with pytest.raises(RecipeError, match="zero_stage below 3"):
        TrainConfig(load_in_4bit=True, lora_r=8, zero_stage=3)


def test_four_bits_without_bitsandbytes_are_refused_before_anything_is_submitted(
    small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(small_recipe.train, lora_r=4, load_in_4bit=True)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(RecipeError, match=r"train.load_in_4bit=True needs the package bitsandbytes.*pip install"):
        validate(replace(small_recipe, train=config))


def in_four_bits(model: Path, folder: Path) -> Path:
    """The model with what its linear layers, but the output's, are once they went through 4 bits."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy: Any = AutoModelForCausalLM.from_pretrained(model)
    for name, layer in policy.named_modules():
        if name.rpartition(".")[2] in LINEAR:
            held = quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=True)
            layer.weight.data = dequantize_4bit(*held)
    policy.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@needs_bitsandbytes
def test_four_bits_hold_the_policy_in_training_and_whole_weights_get_the_adapters(
    tmp_path: Path, rows: Path, model: Path
) -> None:
    task, same = train_task(tmp_path / "out", rows, model), tmp_path / "same"
    run(TrainConfig(**LORA, load_in_4bit=True), task)
    run(TrainConfig(**LORA), train_task(same, rows, in_four_bits(model, tmp_path / "rounded")))
    for line, expected in zip(metrics(task.out), metrics(same), strict=True):
        for name in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-3)
    assert_adapters_added(model, task.out)
    print(
        "loss in 4 bits and on weights that went through them:",
        metrics(task.out)[-1]["loss"],
        metrics(same)[-1]["loss"],
    )


@needs_bitsandbytes
@pytest.mark.slow
# A gradient that is rounding alone in bfloat16 still moves a weight by Adam's whole step, the learning rate.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 2 * LORA["learning_rate"])])
def test_four_bits_under_zero_2_with_two_processes_are_those_of_one(
    tmp_path: Path, rows: Path, model: Path, dtype: str, tolerance: float
) -> None:
    pytest.importorskip("deepspeed")
    config = {**LORA, "dtype": dtype, "load_in_4bit": True}
    one, two = train_task(tmp_path / "one", rows, model), train_task(tmp_path / "two", rows, model)
    run(TrainConfig(**config), one)
    assert launch(two, num_processes=2, **{**config, "zero_stage": 2}) == [0, 0], logs(two)
    assert largest_difference(one.out / "adapter", two.out / "adapter") < tolerance
    for line, same in zip(metrics(one.out), metrics(two.out), strict=True):
        assert line["loss"] == pytest.approx(same["loss"], rel=1e-3)
