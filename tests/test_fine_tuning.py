"""What all trainings share: trackers, DeepSpeed's settings, refusals."""

import contextlib
import hashlib
import importlib.util
import json
import sqlite3
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_model_folder
from training_tasks import PLAIN, largest_difference, launch, logs, metrics, scored_rows, train_task

from aipo_hpc.errors import RecipeError
from aipo_hpc.fine_tuning import refuse_missing_packages
from aipo_hpc.recipe import Recipe, validate
from aipo_hpc.stages.train import TrainConfig, run
from aipo_hpc.training import deepspeed_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return scored_rows(tmp_path_factory.mktemp("rows") / "reference", 20, model)


def tensorboard_scalars(reports: Path, name: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.value for event in EventAccumulator(str(reports)).Reload().Scalars(f"train/{name}")]


def wandb_scalars(reports: Path, name: str) -> list[float]:
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = reports.rglob("*.wandb")
    found = []
    for data in leveldb_log(path.read_bytes()):
        for item in Record.FromString(data).history.item:
            if "/".join((item.key, *item.nested_key)).strip("/") == f"train/{name}":
                found.append(float(item.value_json))
    return found


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """Records of a file of wandb's: pieces of (checksum, length, whether it is the last of a record) in blocks of 32 KiB."""
    block, at, record = 2**15, 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def trackio_scalars(reports: Path, name: str) -> list[float]:
    with contextlib.closing(sqlite3.connect(reports / "aipo_hpc.db")) as database:
        lines = [json.loads(line) for (line,) in database.execute("SELECT metrics FROM metrics ORDER BY step")]
    return [line[f"train/{name}"] for line in lines if f"train/{name}" in line]


def digests(folder: Path) -> dict[Path, bytes]:
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("scalars", [tensorboard_scalars, wandb_scalars, trackio_scalars])
def test_a_tracker_gets_what_the_metrics_file_gets_below_the_tasks_folder_and_is_done_with_the_training(
    tmp_path: Path,
    rows: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    scalars: Callable[[Path, str], list[float]],
) -> None:
    name = scalars.__name__.removesuffix("_scalars")
    pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")
    for variable in ("TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR", "WANDB_DIR", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("WANDB_API_KEY", "not-to-be-written")
    first, second = train_task(tmp_path / "first", rows, model), train_task(tmp_path / "second", rows, model)
    outcome = run(TrainConfig(**PLAIN, report_to=name), first)
    reported = [each for each in outcome.outputs if each.startswith("reports/")]
    found = digests(first.out)
    assert reported and not any((first.out / each).is_symlink() for each in reported)
    run(TrainConfig(**{**PLAIN, "beta": 0.2}, report_to=name), second)
    assert digests(first.out) == found, "written to after its end"
    for out in (first.out, second.out):
        for metric in ("rewards/margins", "regularization/alpha", "loss"):
            expected = [line[metric] for line in metrics(out)]
            assert scalars(out / "reports", metric) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert not any(b"not-to-be-written" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    print(f"{name}: {len(metrics(first.out))} steps each of two trainings, in {reported}")


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_submitted(
    small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"train.report_to='wandb' needs the package wandb.*pip install wandb"):
        validate(replace(small_recipe, train=replace(small_recipe.train, report_to="wandb")))
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
