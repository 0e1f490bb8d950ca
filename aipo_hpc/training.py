"""One attempt at a training: arguments, the policy, where to resume, and what is written in the end.

out   model/...        config, safetensors, tokenizer, chat template, generation config
adapter/...      with LoRA: what was trained, by itself; model/ is the policy with it merged in
metrics.jsonl    one line per logged step
reports/...      what ``report_to`` keeps
"""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments, set_seed

from aipo_hpc import checkpoints, leaving, lora, process_group, trackers
from aipo_hpc.fine_tuning import FineTuningConfig, gradient_accumulation_steps, refuse_missing_packages
from aipo_hpc.metrics_file import MetricsFile
from aipo_hpc.model_files import files_below, load_model, recompute_rotary, save_model
from aipo_hpc.task import Place, Task

Arguments = TypeVar("Arguments", bound=TrainingArguments)

MODEL = "model"
REPORTS = "reports"


@contextlib.contextmanager
def together(config: FineTuningConfig) -> Iterator[Place]:
    """This process' place among those that train together, for as long as they do.

    Raises RecipeError, before a model is loaded, for a missing package and for batch sizes that do not fit.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    place = Place.here()
    refuse_missing_packages(config)
    gradient_accumulation_steps(config, place.world_size)
    with process_group.joined(place, deepspeed=config.zero_stage > 0):
        yield place


def deepspeed_config(config: FineTuningConfig) -> dict[str, Any] | None:
    """DeepSpeed's settings; what is ``auto`` follows from TrainingArguments.

    Without an optimizer section DeepSpeed takes torch's AdamW and compiles none of its own, for offloading either.
    """
    if config.zero_stage == 0:
        return None
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": True,  # without it ZeRO-3 saves no weights, and no error
    }
    for name in ("offload_optimizer", "offload_param"):
        if getattr(config, name):
            zero[name] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def arguments(
    kind: type[Arguments], config: FineTuningConfig, task: Task, place: Place, num_steps: int, **more: Any
) -> Arguments:
    """TrainingArguments of a training of ``num_steps`` optimizer steps; ``more`` are those of one stage alone."""
    if config.report_to != "none":
        trackers.keep_in(task.out / REPORTS)
    return kind(
        output_dir=str(task.out / checkpoints.CHECKPOINTS),
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps(config, place.world_size),
        learning_rate=config.learning_rate,
        # The first warm-up step has a learning rate of 0: a training of one step must not be all warm-up.
        warmup_steps=min(math.ceil(num_steps * config.warmup_ratio), num_steps - 1),
        lr_scheduler_type=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=config.dtype == "bfloat16",
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        deepspeed=deepspeed_config(config),
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=(task.seed * 1_000_003 + task.iteration) % 2**32,
        save_strategy="steps" if num_steps > config.save_steps else "no",
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=config.report_to,
        run_name=task.job,
        project="aipo_hpc",
        trackio_static_space_id=False,  # nothing is published
        disable_tqdm=True,
        **more,
    )


def load_policy(config: FineTuningConfig, name: str, seed: int) -> Any:
    """The policy as it is trained, with adapters if there are to be any.

    In ``dtype`` under DeepSpeed, which keeps fp32 master weights, and if only adapters, which are fp32, are trained; in
    fp32, run under autocast, otherwise.
    """
    kwargs: dict[str, Any] = {}
    if config.load_in_4bit:
        kwargs = lora.four_bits(config.dtype)
    held = config.zero_stage > 0 or config.lora_r is not None
    model = load_model(name, getattr(torch, config.dtype) if held else torch.float32, **kwargs)
    if config.zero_stage == 3:
        recompute_rotary(model)
    if config.lora_r is not None:
        set_seed(seed)  # the same adapters on every process and in every attempt
        model = lora.attach(model, config)
    return model


def resume_from(task: Task, place: Place, shape: Mapping[str, Any]) -> Path | None:
    """The checkpoint that this attempt continues from, the same on all processes."""
    newest = None
    if place.rank == 0:
        checkpoints.remove_incomplete(task.out)
        newest = checkpoints.newest_complete([*task.earlier, task.out], shape)
    found: Path | None = process_group.agree(newest)
    return found


def train_and_write(
    config: FineTuningConfig,
    task: Task,
    trainer: MetricsFile,
    tokenizer: Any,
    shape: Mapping[str, Any],
    resume: Path | None,
) -> tuple[str, ...]:
    """Train to the end and write all that ``run`` gives back; returns its files, on rank 0.

    Raises Left if it was asked to leave before; then it has saved a checkpoint.
    """
    trainer.add_callback(checkpoints.MarkComplete(shape, task.advance))
    before_the_end = checkpoints.SaveBeforeTheEnd()
    trainer.add_callback(before_the_end)
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    finally:
        trackers.finish(config.report_to)
    if before_the_end.left:
        process_group.wait_for_all()
        raise leaving.Left(f"{task.job}: saved at step {trainer.state.global_step} before the time limit")
    folders = _write_model(config, task, trainer, tokenizer)
    process_group.wait_for_all()
    if not trainer.is_world_process_zero():
        return ()
    trainer.write_metrics()
    shutil.rmtree(task.out / checkpoints.CHECKPOINTS, ignore_errors=True)
    written = [file for folder in folders for file in files_below(folder)]
    written += [*trackers.written_below(task.out / REPORTS), trainer.metrics_path]
    return tuple(sorted(file.relative_to(task.out).as_posix() for file in written))


def steps_done(resume: Path | None) -> int:
    """Optimizer steps that a checkpoint holds."""
    return 0 if resume is None else int(resume.name.rpartition("-")[2])


def _write_model(config: FineTuningConfig, task: Task, trainer: MetricsFile, tokenizer: Any) -> list[Path]:
    """Write the model from rank 0, with all processes taking part; returns the folders."""
    folder = task.out / MODEL
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if config.lora_r is not None:
        adapter = lora.gathered_adapter(model)
        if not trainer.is_world_process_zero():
            return []
        for each in (folder, task.out / lora.ADAPTER):
            shutil.rmtree(each, ignore_errors=True)
        lora.save_adapter(model, adapter, task.out / lora.ADAPTER)
        merged = lora.merged(task.inputs["policy"].model, task.out / lora.ADAPTER, getattr(torch, config.dtype))
        save_model(merged, merged.state_dict(), tokenizer, folder)
        return [folder, task.out / lora.ADAPTER]
    if config.zero_stage == 0:
        model.to(getattr(torch, config.dtype))
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # under ZeRO-3 only rank 0 receives them
    if not trainer.is_world_process_zero():
        return []
    shutil.rmtree(folder, ignore_errors=True)
    save_model(model, weights, tokenizer, folder)
    return [folder]
