"""Train the policy on scored pairs: rows.TrainRow -> a model folder.

    in    pairs     rows.parquet of all reference shards
          policy    the model to start from
    out   model/..., metrics.jsonl and what else ``training`` writes

Every process of the task calls ``run`` with the same task; rank 0's outcome is the one that counts. An attempt continues
from the newest complete checkpoint of its own folder or of an earlier attempt's.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from aipo_hpc import fine_tuning, guard
from aipo_hpc.errors import DataError
from aipo_hpc.guard import GuardConfig
from aipo_hpc.objectives import objective
from aipo_hpc.rows import TrainRow, read_rows
from aipo_hpc.settings import tuning
from aipo_hpc.task import Outcome, Place, Task


@dataclass(frozen=True)
class TrainConfig(fine_tuning.FineTuningConfig):
    """Settings of preference training. The defaults are those of AIPO's main comparison (arXiv 2409.08845)."""

    stage = "train"

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
    guard: Annotated[GuardConfig, tyro.conf.Suppress] = tuning(GuardConfig())
    """Thresholds: the recipe's own, guard.*"""

    def __post_init__(self) -> None:
        chosen = objective(self.loss_type)
        super().__post_init__()
        lowest, highest = chosen.alpha
        self.refuse(
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
        )


def run(config: TrainConfig, task: Task) -> Outcome:
    """Train, write the model, and return what there is to know about it; on ranks other than 0 an empty outcome.

    Raises RecipeError if the batch sizes do not fit or the loss stops being a number, DataError if there are no pairs.
    """
    from aipo_hpc import training

    with training.together(config) as place:
        return _train(config, task, place)


def _train(config: TrainConfig, task: Task, place: Place) -> Outcome:
    from transformers import TrainingArguments

    from aipo_hpc import batches, metrics_file, trainer, training
    from aipo_hpc.chat import load_tokenizer

    scored = read_rows(task.inputs["pairs"].named("rows.parquet"), TrainRow)
    rows = batches.compact(row for row in scored if row.error is None)
    if not rows:
        raise DataError(f"{task.job}: there are no pairs to train on; see the counts of the stages before.")
    # All processes see the same pairs, and stop here together.
    agreement = guard.agreement([row.ref_logps[0] for row in rows], [row.ref_logps[1] for row in rows])
    guard.enforce(guard.check({"reference_agreement": agreement}, config.guard), task.job)
    steps = batches.global_batches(
        len(rows), config.num_train_epochs, config.global_batch_size, f"{task.seed}/{task.iteration}"
    )
    slots = batches.Slots(rows, steps, config.per_device_train_batch_size * place.world_size)
    tokenizer = load_tokenizer(task.inputs["policy"].model)
    shape = {"world_size": place.world_size, "zero_stage": config.zero_stage, "num_steps": len(steps)}
    resume = training.resume_from(task, place, shape)

    # The arguments come first: they switch on ZeRO-3's sharded loading.
    arguments = training.arguments(
        TrainingArguments,
        config,
        task,
        place,
        len(steps),
        num_train_epochs=1,  # the data holds all passes
        train_sampling_strategy="sequential",  # ... and is in order
        remove_unused_columns=False,
    )
    pair_trainer = trainer.PairTrainer(
        model=training.load_policy(config, task.inputs["policy"].model, arguments.seed),
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
        metrics_path=task.out / metrics_file.METRICS,
    )
    written = training.train_and_write(config, task, pair_trainer, tokenizer, shape, resume)
    if place.rank != 0:
        return Outcome(0, ())
    first, last = pair_trainer.metrics[0], pair_trainer.metrics[-1]
    counts = {
        "pairs": len(rows),
        f"{guard.VALUE}reference_agreement": agreement,
        "steps": len(steps),
        "global_batch_size": min(config.global_batch_size, sum(map(len, steps))),
        "grad_accumulation": arguments.gradient_accumulation_steps,
        "world_size": place.world_size,
        "resumed_from_step": training.steps_done(resume),
        "loss_first": first["loss"],
        "loss_last": last["loss"],
        "reward_accuracy": trainer.last_epoch_mean(pair_trainer.metrics, "rewards/accuracies"),
        "reward_margin": trainer.last_epoch_mean(pair_trainer.metrics, "rewards/margins"),
    }
    return Outcome(len(rows), written, counts)
