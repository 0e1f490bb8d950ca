"""Training in one process, without DeepSpeed: what is optimized, what is written, and what a kill costs."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_model_folder
from training_tasks import (
    PLAIN,
    REPOSITORY,
    identical,
    largest_difference,
    launch,
    logs,
    metrics,
    scored_rows,
    train_task,
    weights,
)

from aipo_hpc import batches, checkpoints
from aipo_hpc.errors import DataError, GuardStop, RecipeError
from aipo_hpc.fine_tuning import gradient_accumulation_steps
from aipo_hpc.guard import GuardConfig
from aipo_hpc.logps import collate, response_logps
from aipo_hpc.objectives import OBJECTIVES, objective
from aipo_hpc.objectives.batch import Extras, Ratios, Shared
from aipo_hpc.rows import TrainRow, read_rows, write_rows
from aipo_hpc.settings import content
from aipo_hpc.stages.train import TrainConfig, run
from aipo_hpc.task import ADVANCED, Outcome, Task
from aipo_hpc.trainer import last_epoch_mean


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """20 pairs, scored under the model that training starts from."""
    return scored_rows(tmp_path_factory.mktemp("rows") / "reference", 20, model)


@pytest.fixture(scope="module")
def foreign_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pairs, scored under another model, so that rewards are not 0 at the start."""
    folder = tmp_path_factory.mktemp("foreign")
    return scored_rows(folder / "reference", 20, tiny_model_folder(folder / "tiny", seed=9))


def train(out: Path, rows: Path, model: Path, **config: Any) -> tuple[Task, Outcome]:
    task = train_task(out, rows, model)
    return task, run(TrainConfig(**{**PLAIN, **config}), task)


NO_RATIOS = Ratios()


def by_hand(
    model: Path, rows: list[TrainRow], loss_type: str = "aipo", ratios: Ratios = NO_RATIOS, **settings: float
) -> float:
    """Mean loss over rows, one pair at a time."""
    from transformers import AutoModelForCausalLM

    policy: Any = AutoModelForCausalLM.from_pretrained(model)
    losses = []
    for row in rows:
        batch = collate([row])
        with torch.no_grad():
            logps = response_logps(policy, batch, weights=True)
        references = torch.tensor([row.ref_chosen_logps]), torch.tensor([row.ref_rejected_logps])
        shared = torch.tensor([row.ref_chosen_shared_logps]), torch.tensor([row.ref_rejected_shared_logps])
        extras = Extras(Shared(logps.chosen_shared, logps.rejected_shared, *shared), logps.weights, ratios)
        sums = (logps.chosen, logps.rejected, *references, *batch["lengths"].chunk(2))
        losses.append(objective(loss_type)(*sums, **settings, extras=extras).item())
    return sum(losses) / len(losses)


def test_training_writes_a_model_that_transformers_loads_and_a_line_per_step(
    tmp_path: Path, rows: Path, model: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    task, outcome = train(tmp_path / "out", rows, model, num_train_epochs=2.0, save_steps=2)
    assert set(outcome.outputs) == {
        path.relative_to(task.out).as_posix()
        for path in task.out.rglob("*")
        if path.is_file() and path.name != ADVANCED
    }
    assert list(outcome.outputs) == sorted(outcome.outputs)
    assert {"model/config.json", "model/generation_config.json", "model/tokenizer.json"} <= set(outcome.outputs)
    assert not (task.out / "checkpoints").exists()
    assert all(path.stat().st_mode & 0o044 for path in (task.out / "model").iterdir())

    trained = AutoModelForCausalLM.from_pretrained(task.out / "model")
    assert trained.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(task.out / "model").chat_template is not None
    assert GenerationConfig.from_pretrained(task.out / "model").eos_token_id == 2
    before, after = weights(model), weights(task.out / "model")
    assert set(before) == set(after)
    assert all(not before[name].equal(after[name]) for name in before)

    lines = metrics(task.out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["epoch"] for line in lines] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    wanted = "loss grad_norm learning_rate nll rewards/chosen rewards/rejected rewards/accuracies rewards/margins"
    assert {*wanted.split(), "logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected"} <= set(lines[0])
    assert outcome.rows == 20
    scored = list(read_rows([rows], TrainRow))
    assert outcome.counts == {
        "pairs": 20,
        "steps": 5,
        "global_batch_size": 8,
        "grad_accumulation": 4,
        "world_size": 1,
        "resumed_from_step": 0,
        "loss_first": lines[0]["loss"],
        "loss_last": lines[-1]["loss"],
        "reward_accuracy": pytest.approx(sum(line["rewards/accuracies"] for line in lines[2:]) / 3),
        "reward_margin": pytest.approx(sum(line["rewards/margins"] for line in lines[2:]) / 3),
        "guard_reference_agreement": sum(row.ref_chosen_logps > row.ref_rejected_logps for row in scored) / len(scored),
    }
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_reported_reward_accuracy_is_the_mean_over_the_last_pass_each_line_by_the_steps_it_covers() -> None:
    def line(step: int, epoch: float, value: float) -> dict[str, float]:
        return {"step": step, "epoch": epoch, "value": value}

    lines = [line(1, 0.25, 0.0), line(4, 1.0, 0.5), line(5, 1.25, 0.6), line(8, 2.0, 0.8)]
    assert last_epoch_mean(lines, "value") == pytest.approx((0.6 + 3 * 0.8) / 4)
    assert last_epoch_mean(lines[:2], "value") == pytest.approx((0.0 + 3 * 0.5) / 4)
    assert last_epoch_mean(lines[:1], "value") == 0.0


def test_the_logged_loss_is_the_objectives_mean_over_the_pairs_of_the_step(
    tmp_path: Path, foreign_rows: Path, model: Path
) -> None:
    task, _ = train(tmp_path / "out", foreign_rows, model, learning_rate=1e-12)
    all_rows = list(read_rows([foreign_rows], TrainRow))
    steps = batches.global_batches(20, 1.0, 8, "7/0")
    assert [len(step) for step in steps] == [8, 8, 4]
    settings = {"beta": 0.1, "alpha": 0.09, "lambda_": 0.5, "gamma": 0.0, "label_smoothing": 0.0}
    for line, step in zip(metrics(task.out), steps, strict=True):
        assert line["loss"] == pytest.approx(by_hand(model, [all_rows[index] for index in step], **settings), abs=1e-5)


def test_logged_rewards_are_beta_times_the_log_ratio_without_alpha(
    tmp_path: Path, foreign_rows: Path, model: Path
) -> None:
    task, _ = train(tmp_path / "out", foreign_rows, model, learning_rate=1e-12, global_batch_size=20, alpha=0.5)
    line = metrics(task.out)[0]
    all_rows = list(read_rows([foreign_rows], TrainRow))
    mean_reference = sum(row.ref_chosen_logps for row in all_rows) / len(all_rows)
    assert line["rewards/chosen"] == pytest.approx(0.1 * (line["logps/chosen"] - mean_reference), abs=1e-5)
    assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-6)
    assert line["lengths/chosen"] == pytest.approx(sum(len(row.chosen_ids) for row in all_rows) / 20)
    reference_margin = 0.1 * (mean_reference - sum(row.ref_rejected_logps for row in all_rows) / 20)
    assert line["margins/reference"] == pytest.approx(reference_margin, abs=1e-5)
    assert line["margins/policy"] == pytest.approx(0.1 * (line["logps/chosen"] - line["logps/rejected"]), abs=1e-5)
    assert line["regularization/alpha"] == pytest.approx(-0.5 * reference_margin, abs=1e-5)
    assert line["regularization/nll"] == pytest.approx(0.5 * line["nll"], abs=1e-6)


def test_the_first_step_of_plain_dpo_costs_ln_2(tmp_path: Path, rows: Path, model: Path) -> None:
    _, outcome = train(tmp_path / "out", rows, model, alpha=0.0, lambda_=0.0)
    assert outcome.counts["loss_first"] == pytest.approx(math.log(2), abs=1e-6)


def test_neither_micro_batches_nor_gradient_checkpointing_change_the_result(
    tmp_path: Path, rows: Path, model: Path
) -> None:
    """20 pairs, 12 to a step: the last step has 8, which micro-batches of 3 do not divide."""
    one, _ = train(tmp_path / "one", rows, model, global_batch_size=12, per_device_train_batch_size=1)
    four, _ = train(tmp_path / "four", rows, model, global_batch_size=12, per_device_train_batch_size=4)
    three, _ = train(tmp_path / "three", rows, model, global_batch_size=12, per_device_train_batch_size=3)
    saving, _ = train(
        tmp_path / "saving",
        rows,
        model,
        global_batch_size=12,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
    )
    for other in (four, three, saving):
        for line, same in zip(metrics(one.out), metrics(other.out), strict=True):
            for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
                assert line[name] == pytest.approx(same[name], rel=1e-4, abs=1e-5)
        # Adam divides by the size of the gradient, so noise in tiny gradients shows, up to the learning rate.
        assert largest_difference(one.out / "model", other.out / "model") < 1e-4


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_every_objective_trains_and_is_its_formulas_mean(
    tmp_path: Path, foreign_rows: Path, model: Path, loss_type: str
) -> None:
    """Two steps of 10 pairs. What an objective needs besides sums comes from the trainer, whatever the micro-batch."""
    settings = {"loss_type": loss_type, "alpha": 0.04, "global_batch_size": 10, "beta": 0.3}
    two, _ = train(tmp_path / "two", foreign_rows, model, **settings)
    if objective(loss_type).needs:
        five, _ = train(tmp_path / "five", foreign_rows, model, per_device_train_batch_size=5, **settings)
        for line, same in zip(metrics(two.out), metrics(five.out), strict=True):
            for name in ("loss", "grad_norm", "margins/policy"):
                assert line[name] == pytest.approx(same[name], rel=1e-3, abs=1e-5)
    all_rows = list(read_rows([foreign_rows], TrainRow))
    first = [all_rows[index] for index in batches.global_batches(20, 1.0, 10, "7/0")[0]]
    values = {"beta": 0.3, "alpha": 0.04, "lambda_": 0.5, "gamma": 0.0, "label_smoothing": 0.0}
    assert metrics(two.out)[0]["loss"] == pytest.approx(by_hand(model, first, loss_type, **values), rel=1e-4)


def test_ratios_of_the_steps_before_are_what_relative_objectives_see(
    tmp_path: Path, foreign_rows: Path, model: Path
) -> None:
    """At a learning rate of nothing: log-ratios stay what they are, so that their means can be worked out from rows."""
    frozen: dict[str, Any] = {"learning_rate": 1e-12, "global_batch_size": 10, "beta": 0.3, "loss_type": "kto_pair"}
    task, _ = train(tmp_path / "kto", foreign_rows, model, **frozen)
    bco, _ = train(tmp_path / "bco", foreign_rows, model, **{**frozen, "loss_type": "bco_pair"})
    all_rows = list(read_rows([foreign_rows], TrainRow))
    first, second = batches.global_batches(20, 1.0, 10, "7/0")
    line = metrics(task.out)[0]
    means = Ratios(
        line["rewards/chosen"] / 0.3,
        line["rewards/rejected"] / 0.3,
        (line["rewards/chosen"] + line["rewards/rejected"]) / 0.6,
    )
    values = {"beta": 0.3, "alpha": 0.09, "lambda_": 0.5, "gamma": 0.0, "label_smoothing": 0.0}
    for out, name in ((task.out, "kto_pair"), (bco.out, "bco_pair")):
        for logged, step, ratios in zip(metrics(out), (first, second), (Ratios(), means), strict=True):
            expected = by_hand(model, [all_rows[index] for index in step], name, ratios=ratios, **values)
            assert logged["loss"] == pytest.approx(expected, rel=1e-4)


def test_fewer_pairs_than_a_global_batch_still_train_one_step(tmp_path: Path, rows: Path, model: Path) -> None:
    task, outcome = train(tmp_path / "out", rows, model, global_batch_size=256)
    assert outcome.counts["steps"] == 1 and outcome.counts["global_batch_size"] == 20
    assert metrics(task.out)[0]["learning_rate"] > 0
    assert not identical(model, task.out / "model")


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(
    tmp_path: Path, rows: Path, model: Path
) -> None:
    one, _ = train(tmp_path / "one", rows, model)
    two, _ = train(tmp_path / "two", rows, model)
    assert identical(one.out / "model", two.out / "model")
    assert batches.global_batches(20, 1.0, 8, "7/0") != batches.global_batches(20, 1.0, 8, "7/1")


def test_bfloat16_without_deepspeed_keeps_fp32_weights_while_training_and_writes_bfloat16(
    tmp_path: Path, rows: Path, model: Path
) -> None:
    task, outcome = train(tmp_path / "out", rows, model, dtype="bfloat16", alpha=0.0, lambda_=0.0)
    assert {tensor.dtype for tensor in weights(task.out / "model").values()} == {torch.bfloat16}
    assert json.loads((task.out / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert outcome.counts["loss_first"] == pytest.approx(math.log(2), abs=0.02)


def test_every_visit_of_a_pair_is_in_exactly_one_step() -> None:
    steps = batches.global_batches(10, 2.5, 4, "seed")
    visits = [index for step in steps for index in step]
    assert sorted(visits[:10]) == sorted(visits[10:20]) == list(range(10))
    assert len(visits) == 25 and [len(step) for step in steps] == [4] * 6 + [1]


def test_kill_9_and_resume_give_the_weights_and_metrics_of_an_undisturbed_run(
    tmp_path: Path, rows: Path, model: Path
) -> None:
    config = {**PLAIN, "num_train_epochs": 2.0, "save_steps": 1}
    whole = train_task(tmp_path / "whole", rows, model)
    assert launch(whole, **config) == [0], logs(whole)

    # Killed in the middle of the second checkpoint's save, then again after a step, then left alone.
    first = train_task(tmp_path / "first", rows, model)
    assert launch(first, die="in save of step 3", **config) == [-9], logs(first)
    assert (first.out / "checkpoints/checkpoint-3").exists()
    assert not (first.out / "checkpoints/checkpoint-3/complete.json").exists()
    second = train_task(tmp_path / "second", rows, model, earlier=(first.out,))
    assert launch(second, die="after step 4", **config) == [-9], logs(second)
    before = sorted(path for path in first.out.rglob("*") if path.is_file())
    third = train_task(tmp_path / "third", rows, model, earlier=(first.out, second.out))
    assert launch(third, **config) == [0], logs(third)

    assert "'resumed_from_step': 3" in logs(third)
    assert identical(whole.out / "model", third.out / "model")
    assert metrics(whole.out) == metrics(third.out)
    assert sorted(path for path in first.out.rglob("*") if path.is_file()) == before


def test_an_attempt_in_the_same_folder_removes_what_a_killed_save_left(tmp_path: Path, rows: Path, model: Path) -> None:
    config = {**PLAIN, "save_steps": 1}
    task = train_task(tmp_path / "out", rows, model)
    assert launch(task, die="in save of step 2", **config) == [-9], logs(task)
    assert sorted(path.name for path in (task.out / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    checkpoints.remove_incomplete(task.out)
    assert [path.name for path in (task.out / "checkpoints").iterdir()] == ["checkpoint-1"]
    outcome = run(TrainConfig(**config), task)
    assert outcome.counts["resumed_from_step"] == 1


def kept_checkpoint(attempt: Path, step: int, **shape: int) -> Path:
    """A checkpoint of two files with its marker, as a save leaves it."""
    folder = attempt / "checkpoints" / f"checkpoint-{step}"
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / f"global_step{step}" / "optimizer.pt").write_bytes(b"moments")
    state, arguments = SimpleNamespace(global_step=step, is_world_process_zero=True), SimpleNamespace()
    arguments.output_dir = str(folder.parent)
    advanced = attempt / "advanced"
    checkpoints.MarkComplete(shape, advanced.touch).on_save(arguments, state, None)
    return folder


def test_the_newest_complete_checkpoint_that_fits_is_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attempts = [tmp_path / "0", tmp_path / "1", tmp_path / "2"]
    assert checkpoints.newest_complete(attempts, {"world_size": 8}) is None
    kept_checkpoint(attempts[0], 9, world_size=8)
    newest = kept_checkpoint(attempts[1], 100, world_size=8)
    kept_checkpoint(attempts[1], 20, world_size=8)
    kept_checkpoint(attempts[2], 150, world_size=4)
    marker = kept_checkpoint(attempts[2], 160, world_size=8) / "complete.json"
    marker.write_text(marker.read_text()[:-9])
    (kept_checkpoint(attempts[2], 170, world_size=8) / "complete.json").unlink()
    (kept_checkpoint(attempts[2], 180, world_size=8) / "complete.json").write_text('{"global_step": 180}')
    assert checkpoints.newest_complete(attempts, {"world_size": 8}) == newest
    assert "world_size was 4, is 8" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "altered", "gone", "emptied"])
def test_a_damaged_checkpoint_with_its_marker_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    before = kept_checkpoint(tmp_path, 10)
    path = kept_checkpoint(tmp_path, 20) / "global_step20" / "optimizer.pt"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": b"mom", "altered": b"nomentm", "emptied": b""}[damage])
    assert checkpoints.newest_complete([tmp_path], {}) == before
    assert "not resuming from" in caplog.text and "optimizer.pt" in caplog.text


def test_a_batch_that_cannot_be_divided_is_refused_with_the_nearest_that_can() -> None:
    assert gradient_accumulation_steps(TrainConfig(), 8) == 16
    config = TrainConfig(global_batch_size=100, per_device_train_batch_size=8)
    with pytest.raises(RecipeError, match=r"100 is not a multiple of 32 .* Set it to 96 or 128.* one of 1, 5, 25"):
        gradient_accumulation_steps(config, 4)
    with pytest.raises(RecipeError, match=r"Set it to 16"):
        gradient_accumulation_steps(TrainConfig(global_batch_size=4, per_device_train_batch_size=2), 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss_type": "aipoo"}, "Did you mean 'aipo'"),
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"lambda_": -1.0}, "lambda=-1.0"),
        ({"loss_type": "r_dpo"}, "alpha=0.09 must be from 0 to 0.05 for r_dpo"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 must be 0 for ipo, which has none"),
        ({"loss_type": "kto_pair", "gamma": 0.5}, "gamma=0.5 must be 0 for kto_pair"),
        ({"zero_stage": 4}, "0, 1, 2 or 3"),
        ({"dtype": "float16"}, "bfloat16 or float32"),
        ({"save_total_limit": 1}, "2 or more"),
        ({"lr_scheduler_type": "cosin"}, "Did you mean 'cosine'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainConfig(**wrong)


def test_no_pairs_at_all_is_an_error_of_the_data(tmp_path: Path, model: Path) -> None:
    write_rows(tmp_path / "rows.parquet", [], TrainRow)
    with pytest.raises(DataError, match="no pairs to train on"):
        train(tmp_path / "out", tmp_path / "rows.parquet", model)


def test_too_little_agreement_of_the_reference_stops_before_the_model_is_loaded_and_a_lower_threshold_trains(
    tmp_path: Path, rows: Path, model: Path
) -> None:
    scored = list(read_rows([rows], TrainRow))
    share = fmean(row.ref_chosen_logps > row.ref_rejected_logps for row in scored)
    print(f"the reference agrees with {share:.2f} of {len(scored)} pairs")
    above = GuardConfig(warn_reference_agreement=None, stop_reference_agreement=share + 0.01)
    with pytest.raises(GuardStop, match=f"reference_agreement {share:.3f} is below guard.stop_reference_agreement"):
        train(tmp_path / "stopped", rows, tmp_path / "no model", guard=above)
    _, outcome = train(tmp_path / "trained", rows, model, guard=replace(above, stop_reference_agreement=share))
    assert outcome.counts["guard_reference_agreement"] == share


def test_a_loss_that_is_no_number_stops_training_at_once(tmp_path: Path, rows: Path, model: Path) -> None:
    with pytest.raises(RecipeError, match=r"(loss|grad_norm) is (nan|inf) at step \d+: lower the learning rate"):
        train(tmp_path / "out", rows, model, learning_rate=1e30, max_grad_norm=0.0)


def test_sampling_flags_without_sampling_do_not_fail_the_save(tmp_path: Path, rows: Path, model: Path) -> None:
    import shutil

    flawed = tmp_path / "flawed"
    shutil.copytree(model, flawed)
    (flawed / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.6, "do_sample": false}')
    task, _ = train(tmp_path / "out", rows, flawed)
    assert json.loads((task.out / "model" / "generation_config.json").read_text())["temperature"] == 0.6


def test_only_what_decides_the_weights_is_content() -> None:
    tuned = {"per_device_train_batch_size", "gradient_checkpointing", "zero_stage", "save_steps", "save_total_limit"}
    assert not {*tuned, "logging_steps", "resources"} & set(content(TrainConfig()))
    assert {"alpha", "lambda_", "learning_rate", "global_batch_size", "dtype"} <= set(content(TrainConfig()))


def test_lambda_is_called_lambda_on_the_command_line() -> None:
    code = (
        "import sys, tyro; from aipo_hpc.stages.train import TrainConfig\n"
        "assert tyro.cli(TrainConfig, args=['--lambda', '0.2']).lambda_ == 0.2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
