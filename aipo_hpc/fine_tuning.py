"""What preference training and supervised fine-tuning share: settings, the policy, resuming, and the model they write.

out   model/...        config, safetensors, tokenizer, chat template, generation config
      adapter/...      with LoRA: what was trained, by itself; model/ is the policy with it merged in
      metrics.jsonl    one line per logged step
      reports/...      what ``report_to`` keeps
"""

import difflib
import importlib.util
from dataclasses import dataclass
from typing import Any

from aipo_hpc.errors import RecipeError
from aipo_hpc.resources import Resources
from aipo_hpc.settings import memory_bound, tuning

LR_SCHEDULER_TYPES = ("cosine", "linear", "constant_with_warmup", "constant")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class FineTuningConfig:
    """How a policy is optimized, whatever the loss."""

    stage = ""  # how the recipe calls these settings

    learning_rate: float = 5e-7
    """Peak learning rate of AdamW."""
    num_train_epochs: float = 1.0
    """Passes over the data; fractions are allowed."""
    global_batch_size: int = 256
    """Pairs (sft: sequences) per optimizer step, over all processes and accumulated micro-batches."""
    per_device_train_batch_size: int = memory_bound(2, divides=True)
    """Of these, per process and forward pass; must divide the global batch size together with the number of processes."""
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
    lora_r: int | None = None
    """Rank of LoRA adapters, which alone are trained and then merged (None: all weights are trained)."""
    lora_alpha: int = 32
    """LoRA's scale: what adapters add is multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout before the adapters."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the modules that get adapters, e.g. q_proj v_proj (none: all linear layers but the output's)."""
    load_in_4bit: bool = False
    """QLoRA: hold the frozen weights in 4 bits while training (needs bitsandbytes, and zero_stage below 3)."""
    gradient_checkpointing: bool = tuning(True)
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    zero_stage: int = tuning(3)
    """DeepSpeed ZeRO stage 1 to 3 (0: no DeepSpeed)."""
    offload_optimizer: bool = tuning(False)
    """Keep the optimizer's state and step in the nodes' memory instead of the GPUs' (zero_stage 1 to 3)."""
    offload_param: bool = tuning(False)
    """Keep the weights there, too, and fetch them layer by layer (zero_stage 3)."""
    save_steps: int = tuning(25)
    """Optimizer steps between checkpoints."""
    save_total_limit: int = tuning(2)
    """Checkpoints kept at a time, at least 2: one of them may be in the making."""
    logging_steps: int = tuning(1)
    """Optimizer steps between lines of metrics.jsonl."""
    report_to: str = tuning("none")
    """Also log to tensorboard, wandb or trackio. Written below the task's folder; wandb stays offline (send it later with
    `wandb sync`) unless WANDB_MODE=online is set."""
    resources: Resources = tuning(Resources(nodes=1, tasks_per_node=8, gpus_per_node=8, cpus_per_task=8, time=720))
    """What training asks the cluster for: one process per GPU."""

    def __post_init__(self) -> None:
        refuse_unknown(f"{self.stage}.lr_scheduler_type", self.lr_scheduler_type, LR_SCHEDULER_TYPES)
        refuse_unknown(f"{self.stage}.report_to", self.report_to, TRACKERS)
        self.refuse(
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
            ("lora_r", self.lora_r, self.lora_r is None or self.lora_r > 0, "1 or more"),
            ("lora_alpha", self.lora_alpha, self.lora_alpha > 0, "above 0"),
            ("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1, "from 0 to below 1"),
            (
                "load_in_4bit",
                self.load_in_4bit,
                not self.load_in_4bit or (self.lora_r is not None and self.zero_stage < 3),
                "used with lora_r and a zero_stage below 3: 4-bit weights are not trained, nor split over processes",
            ),
            ("zero_stage", self.zero_stage, self.zero_stage in (0, 1, 2, 3), "0, 1, 2 or 3"),
            (
                "offload_optimizer",
                self.offload_optimizer,
                not self.offload_optimizer or self.zero_stage > 0,
                "used with zero_stage 1, 2 or 3",
            ),
            (
                "offload_param",
                self.offload_param,
                not self.offload_param or self.zero_stage == 3,
                "used with zero_stage=3",
            ),
            ("save_steps", self.save_steps, self.save_steps > 0, "1 or more"),
            ("save_total_limit", self.save_total_limit, self.save_total_limit >= 2, "2 or more"),
            ("logging_steps", self.logging_steps, self.logging_steps > 0, "1 or more"),
        )

    def refuse(self, *rules: tuple[str, Any, bool, str]) -> None:
        """Raise RecipeError for the fields of rules (name, value, whether it is valid, what it must be) that are not."""
        wrong = [f"{self.stage}.{name}={value!r} must be {what}" for name, value, valid, what in rules if not valid]
        if wrong:
            raise RecipeError("; ".join(wrong) + ".")


def refuse_unknown(field: str, value: str, known: tuple[str, ...]) -> None:
    """Raise RecipeError, with the nearest that there is, for a value that is not among the known ones."""
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"{field}={value!r} is not known.{hint} Choose one of {', '.join(known)}.")


def refuse_missing_packages(config: FineTuningConfig) -> None:
    """Raise RecipeError for a setting whose package is not installed here."""
    needed = {
        "peft": (config.lora_r is not None, "lora_r", "pip install peft"),
        "bitsandbytes": (config.load_in_4bit, "load_in_4bit", "pip install bitsandbytes"),
        config.report_to: (config.report_to != "none", "report_to", f"pip install {config.report_to}"),
    }
    for package, (is_needed, field, remedy) in needed.items():
        if is_needed and importlib.util.find_spec(package) is None:
            raise RecipeError(
                f"{config.stage}.{field}={getattr(config, field)!r} needs the package {package}, which is not installed "
                f"here: {remedy}, or leave the field as it is by default."
            )


def gradient_accumulation_steps(config: FineTuningConfig, world_size: int) -> int:
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
    stage = config.stage
    choices = (
        f"{stage}.per_device_train_batch_size to one of {', '.join(map(str, micro))}" if micro else "fewer processes"
    )
    raise RecipeError(
        f"{stage}.global_batch_size={config.global_batch_size} is not a multiple of {per_forward} "
        f"({world_size} processes x {stage}.per_device_train_batch_size={config.per_device_train_batch_size}). "
        f"Set it to {nearest}, or set {choices}."
    )
