"""Train the policy on scored pairs: rows.TrainRow -> a model folder.

    in    pairs     rows.parquet of all reference shards
          policy    the model to start from
    out   model/...        config, safetensors, tokenizer, chat template, generation config
          metrics.jsonl    one line per logged step

Every process of the task calls ``run`` with the same task; rank 0's outcome is the one that counts. An attempt continues
from the newest complete checkpoint of its own folder or of an earlier attempt's.
"""

import difflib
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.objectives import objective
from aipo_hpc.resources import Resources
from aipo_hpc.rows import TrainRow, read_rows
from aipo_hpc.settings import memory_bound, tuning
from aipo_hpc.task import Outcome, Place, Task

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from aipo_hpc.trainer import PairTrainer

MODEL = "model"
LR_SCHEDULER_TYPES = ("cosine", "linear", "constant_with_warmup", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of preference training. The defaults are those of AIPO's main comparison (arXiv 2409.08845)."""

    loss_type: str = "aipo"
    """Objective: aipo, alpha_dpo, sigmoid (DPO), nll_loss (DPO + NLL), simpo, sigmoid_norm (DPO per token), robust, hinge,
    ipo, r_dpo, ld_dpo, wpo, kto_pair, bco_pair, sppo_hard or nca_pair."""
    beta: float = 0.1
    """Inverse temperature of the implicit reward (SimPO: 2.0)."""
    alpha: float = 0.09
    """How much of the reference's own margin is added to the margin asked for; holds response length down. In r_dpo the
    penalty per token of length (0.002), in ld_dpo the weight of tokens beyond the shared length (0.5)."""
    lambda_: Annotated[float, tyro.conf.arg(name="lambda")] = 0.5
    """Weight of the chosen response's negative log-likelihood per token (aipo, nll_loss)."""
    gamma: float = 0.0
    """Constant margin: in nats, inside beta; outside beta in SimPO (0.5)."""
    label_smoothing: float = 0.0
    """Probability that a pair is labelled the wrong way round, from 0 to below 0.5."""
    learning_rate: float = 5e-7
    """Peak learning rate of AdamW."""
    num_train_epochs: float = 1.0
    """Passes over the pairs; fractions are allowed."""
    global_batch_size: int = 256
    """Pairs per optimizer step, over all processes and accumulated micro-batches."""
    per_device_train_batch_size: int = memory_bound(2, divides=True)
    """Pairs per process and forward pass; must divide the global batch size together with the number of processes."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    lr_scheduler_type: str = "cosine"
    """Course of the learning rate after that, by its transformers name: cosine, linear, constant_with_warmup, constant."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm (0: never)."""
    dtype: str = "bfloat16"
    """Number format of weights and arithmetic, bfloat16 or float32; bfloat16 keeps fp32 master weights."""
    gradient_checkpointing: bool = tuning(True)
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    zero_stage: int = tuning(3)
    """DeepSpeed ZeRO stage 1 to 3 (0: no DeepSpeed)."""
    save_steps: int = tuning(25)
    """Optimizer steps between checkpoints."""
    save_total_limit: int = tuning(2)
    """Checkpoints kept at a time, at least 2: one of them may be in the making."""
    logging_steps: int = tuning(1)
    """Optimizer steps between lines of metrics.jsonl."""
    resources: Resources = tuning(Resources(nodes=1, tasks_per_node=8, gpus_per_node=8, cpus_per_task=8, time=720))
    """What training asks the cluster for: one process per GPU."""

    def __post_init__(self) -> None:
        chosen = objective(self.loss_type)
        lowest, highest = chosen.alpha
        if self.lr_scheduler_type not in LR_SCHEDULER_TYPES:
            close = difflib.get_close_matches(self.lr_scheduler_type, LR_SCHEDULER_TYPES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise RecipeError(
                f"train.lr_scheduler_type={self.lr_scheduler_type!r} is not known.{hint} Choose one of "
                f"{', '.join(LR_SCHEDULER_TYPES)}."
            )
        wrong = [
            f"train.{name}={value!r} must be {what}"
            for name, value, valid, what in (
                ("beta", self.beta, self.beta > 0, "above 0"),
                (
                    "alpha",
                    self.alpha,
                    "alpha" not in chosen.uses or lowest <= self.alpha <= highest,
                    f"from {lowest:g} to {highest:g} for {self.loss_type}",
                ),
                ("lambda", self.lambda_, self.lambda_ >= 0, "0 or more"),
                ("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 0.5, "from 0 to below 0.5"),
                *(
                    (name, value, value == 0 or name in chosen.uses, f"0 for {self.loss_type}, which has none")
                    for name, value in (("gamma", self.gamma), ("label_smoothing", self.label_smoothing))
                ),
                ("learning_rate", self.learning_rate, self.learning_rate > 0, "above 0"),
                ("num_train_epochs", self.num_train_epochs, self.num_train_epochs > 0, "above 0"),
                ("global_batch_size", self.global_batch_size, self.global_batch_size > 0, "1 or more"),
                (
                    "per_device_train_batch_size",
                    self.per_device_train_batch_size,
                    self.per_device_train_batch_size > 0,
                    "1 or more",
                ),
                ("warmup_ratio", self.warmup_ratio, 0 <= self.warmup_ratio <= 1, "from 0 to 1"),
                ("dtype", self.dtype, self.dtype in ("bfloat16", "float32"), "bfloat16 or float32"),
                ("zero_stage", self.zero_stage, self.zero_stage in (0, 1, 2, 3), "0, 1, 2 or 3"),
                ("save_steps", self.save_steps, self.save_steps > 0, "1 or more"),
                ("save_total_limit", self.save_total_limit, self.save_total_limit >= 2, "2 or more"),
                ("logging_steps", self.logging_steps, self.logging_steps > 0, "1 or more"),
            )
            if not valid
        ]
        if wrong:
            raise RecipeError("; ".join(wrong) + ".")


def gradient_accumulation_steps(config: TrainConfig, world_size: int) -> int:
    """Micro-batches per process and optimizer step that make up the global batch.

    Raises RecipeError if it cannot be divided evenly, naming the nearest global batch sizes that can.
    """
    per_forward = config.per_device_train_batch_size * world_size
    if config.global_batch_size % per_forward == 0:
        return config.global_batch_size // per_forward
    below = config.global_batch_size // per_forward * per_forward
    nearest = " or ".join(str(size) for size in (below, below + per_forward) if size > 0)
    sizes = [size for size in range(1, config.global_batch_size + 1) if config.global_batch_size % size == 0]
    micro = [size // world_size for size in sizes if size % world_size == 0]
    choices = (
        f"train.per_device_train_batch_size to one of {', '.join(map(str, micro))}" if micro else "fewer processes"
    )
    raise RecipeError(
        f"train.global_batch_size={config.global_batch_size} is not a multiple of {per_forward} "
        f"({world_size} processes x train.per_device_train_batch_size={config.per_device_train_batch_size}). "
        f"Set it to {nearest}, or set {choices}."
    )


def run(config: TrainConfig, task: Task) -> Outcome:
    """Train, write the model, and return what there is to know about it; on ranks other than 0 an empty outcome.

    Raises RecipeError if the batch sizes do not fit or the loss stops being a number, DataError if there are no pairs.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    place = Place.here()
    gradient_accumulation_steps(config, place.world_size)  # refuse before anything is loaded

    from aipo_hpc import process_group

    with process_group.joined(place, deepspeed=config.zero_stage > 0):
        return _train(config, task, place)


def _train(config: TrainConfig, task: Task, place: Place) -> Outcome:
    from aipo_hpc import batches, checkpoints, process_group, trainer
    from aipo_hpc.chat import load_tokenizer

    rows = batches.compact(read_rows(task.inputs["pairs"].named("rows.parquet"), TrainRow))
    if not rows:
        raise DataError(f"{task.job}: there are no pairs to train on; see the counts of the stages before.")
    steps = batches.global_batches(
        len(rows), config.num_train_epochs, config.global_batch_size, f"{task.seed}/{task.iteration}"
    )
    slots = batches.Slots(rows, steps, config.per_device_train_batch_size * place.world_size)
    tokenizer = load_tokenizer(task.inputs["policy"].model)

    shape = {"world_size": place.world_size, "zero_stage": config.zero_stage, "num_steps": len(steps)}
    if place.rank == 0:
        checkpoints.remove_incomplete(task.out)
        newest = checkpoints.newest_complete([*task.earlier, task.out], shape)
    resume = process_group.agree(newest if place.rank == 0 else None)

    # The arguments come first: they switch on ZeRO-3's sharded loading.
    arguments = _arguments(config, task, place, num_steps=len(steps))
    model = _load(config, task.inputs["policy"].model)
    pair_trainer = trainer.PairTrainer(
        model=model,
        args=arguments,
        train_dataset=slots,
        loss_type=config.loss_type,
        beta=config.beta,
        alpha=config.alpha,
        lambda_=config.lambda_,
        gamma=config.gamma,
        label_smoothing=config.label_smoothing,
        pairs_per_epoch=len(rows),
        pairs_per_step=config.global_batch_size,
        metrics_path=task.out / trainer.METRICS,
    )
    pair_trainer.add_callback(checkpoints.MarkComplete(shape, task.advance))
    pair_trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    written = _write_model(config, pair_trainer, tokenizer, task.out)
    process_group.wait_for_all()
    if place.rank != 0:
        return Outcome(0, ())
    pair_trainer.write_metrics()
    shutil.rmtree(task.out / checkpoints.CHECKPOINTS, ignore_errors=True)
    first, last = pair_trainer.metrics[0], pair_trainer.metrics[-1]
    counts = {
        "pairs": len(rows),
        "steps": len(steps),
        "global_batch_size": min(config.global_batch_size, sum(map(len, steps))),
        "grad_accumulation": arguments.gradient_accumulation_steps,
        "world_size": place.world_size,
        "resumed_from_step": 0 if resume is None else int(resume.name.rpartition("-")[2]),
        "loss_first": first["loss"],
        "loss_last": last["loss"],
        "reward_accuracy": trainer.last_epoch_mean(pair_trainer.metrics, "rewards/accuracies"),
        "reward_margin": trainer.last_epoch_mean(pair_trainer.metrics, "rewards/margins"),
    }
    return Outcome(len(rows), tuple(sorted([*written, trainer.METRICS])), counts)


def _arguments(config: TrainConfig, task: Task, place: Place, num_steps: int) -> "TrainingArguments":
    import torch
    from transformers import TrainingArguments

    from aipo_hpc import checkpoints, trainer

    return TrainingArguments(
        output_dir=str(task.out / checkpoints.CHECKPOINTS),
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps(config, place.world_size),
        num_train_epochs=1,  # the data holds all passes
        train_sampling_strategy="sequential",  # ... and is in order
        remove_unused_columns=False,
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
        deepspeed=trainer.deepspeed_config(config.zero_stage) if config.zero_stage > 0 else None,
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
        report_to="none",
        disable_tqdm=True,
    )


def _load(config: TrainConfig, name: str) -> Any:
    """The policy: in ``dtype`` under DeepSpeed, which keeps fp32 master weights; in fp32, run under autocast, without."""
    import torch

    from aipo_hpc.model_files import load_model, recompute_rotary

    model = load_model(name, getattr(torch, config.dtype) if config.zero_stage > 0 else torch.float32)
    if config.zero_stage == 3:
        recompute_rotary(model)
    return model


def _write_model(config: TrainConfig, pair_trainer: "PairTrainer", tokenizer: Any, out: Path) -> list[str]:
    """Write the model folder from rank 0, with all processes taking part; return its files relative to ``out``."""
    import torch

    from aipo_hpc.model_files import files_below, save_model

    model = pair_trainer.accelerator.unwrap_model(pair_trainer.model_wrapped)
    if config.zero_stage == 0:
        model.to(getattr(torch, config.dtype))
    weights = pair_trainer.gathered_weights()
    if not pair_trainer.is_world_process_zero():
        return []
    folder = out / MODEL
    shutil.rmtree(folder, ignore_errors=True)
    save_model(model, weights, tokenizer, folder)
    return [path.relative_to(out).as_posix() for path in files_below(folder)]
