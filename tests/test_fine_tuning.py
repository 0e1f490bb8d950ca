"""What all trainings share: trackers, DeepSpeed's settings, refusals."""

import importlib.util
from pathlib import Path

import pytest
from tiny_models import tiny_model_folder
from training_tasks import PLAIN, largest_difference, launch, logs, metrics, scored_rows, train_task

from aipo_hpc.errors import RecipeError
from aipo_hpc.fine_tuning import refuse_missing_packages
from aipo_hpc.stages.train import TrainConfig, run
from aipo_hpc.training import deepspeed_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return scored_rows(tmp_path_factory.mktemp("rows") / "reference", 20, model)


def test_tensorboard_gets_what_the_metrics_file_gets(
    tmp_path: Path, rows: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR", "WANDB_DIR", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", "not-to-be-written")
    task = train_task(tmp_path / "out", rows, model)
    outcome = run(TrainConfig(**PLAIN, report_to="tensorboard"), task)
    (events,) = [name for name in outcome.outputs if name.startswith("reports/")]
    found = EventAccumulator(str(task.out / "reports")).Reload()
    for name in ("rewards/margins", "regularization/alpha", "loss"):
        logged = [event.value for event in found.Scalars(f"train/{name}")]
        assert logged == pytest.approx([line[name] for line in metrics(task.out)], rel=1e-5, abs=1e-6)
    assert not any(b"not-to-be-written" in path.read_bytes() for path in task.out.rglob("*") if path.is_file())
    assert "tfevents" in events


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"train.report_to='wandb' needs the package wandb.*pip install wandb"):
        refuse_missing_packages(TrainConfig(report_to="wandb"))
    refuse_missing_packages(TrainConfig())
    with pytest.raises(RecipeError, match=r"train.report_to='tensorbord' is not known. Did you mean 'tensorboard'"):
        TrainConfig(report_to="tensorbord")


def test_offloading_goes_with_the_stages_that_can_do_it() -> None:
    found = deepspeed_config(TrainConfig(zero_stage=3, offload_optimizer=True, offload_param=True))
    assert found is not None
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert found["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert deepspeed_config(TrainConfig(zero_stage=0)) is None
    with pytest.raises(RecipeError, match="offload_optimizer=True must be used with zero_stage 1, 2 or 3"):
        TrainConfig(zero_stage=0, offload_optimizer=True)
    with pytest.raises(RecipeError, match="offload_param=True must be used with zero_stage=3"):
        TrainConfig(zero_stage=2, offload_param=True)


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "offload_param"), [(1, False), (2, False), (3, True)])
def test_offloading_changes_weights_by_rounding_alone(
    tmp_path: Path, rows: Path, model: Path, zero_stage: int, offload_param: bool
) -> None:
    pytest.importorskip("deepspeed")
    config = {**PLAIN, "zero_stage": zero_stage}
    plain, offloaded = train_task(tmp_path / "plain", rows, model), train_task(tmp_path / "offloaded", rows, model)
    assert launch(plain, **config) == [0], logs(plain)
    assert launch(offloaded, **config, offload_optimizer=True, offload_param=offload_param) == [0], logs(offloaded)
    # The norm that gradients are clipped to is summed in another order: rounding, not another training.
    difference = largest_difference(plain.out / "model", offloaded.out / "model")
    print(f"largest difference of a weight: {difference:.1e}")
    assert difference < 1e-5
