"""Preference training on transformers' plain ``Trainer``: the loss, exact inputs, and metrics. Nothing else differs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from aipo_hpc.batches import FLOAT_COLUMNS, collate_slots
from aipo_hpc.logps import ResponseLogps, response_logps
from aipo_hpc.metrics_file import MetricsFile
from aipo_hpc.objectives import objective
from aipo_hpc.objectives.batch import Batch, Extras, Shared
from aipo_hpc.running_ratios import RunningRatios

_AVERAGED = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "margins/policy",
    "margins/reference",
    "logps/chosen",
    "logps/rejected",
    "nll",
    "lengths/chosen",
    "lengths/rejected",
)


class PairTrainer(MetricsFile):
    """Trains on ``batches.Slots`` with one of the objectives.

    The loss of a step is the mean of per-pair losses over the global batch. Logged besides Trainer's own, each a mean over
    the pairs since the last line:

        rewards/chosen, rejected    beta * (log pi - log ref); accuracies: how often chosen is above rejected; margins
        margins/policy, reference   beta * (log p(chosen) - log p(rejected)) under the policy and under the reference
        logps/chosen, rejected      log pi of a response, in nats
        nll                         -log pi per token of the chosen response
        lengths/chosen, rejected    tokens
        regularization/alpha, nll   what alpha adds to the objective's logit, what lambda adds to its loss; where it has them
    """

    def __init__(
        self,
        *,
        loss_type: str,
        beta: float,
        alpha: float,
        lambda_: float,
        gamma: float,
        label_smoothing: float,
        pairs_per_epoch: int,
        pairs_per_step: int,
        metrics_path: Path,
        **kwargs: Any,
    ) -> None:
        self._objective = objective(loss_type)
        self._ratios = RunningRatios() if "ratios" in self._objective.needs else None
        callbacks = [_LogLastStep(), *([self._ratios] if self._ratios else [])]
        super().__init__(data_collator=collate_slots, callbacks=callbacks, **kwargs)
        # The loss is a mean over the micro-batch; Trainer is to divide it by the number of micro-batches.
        self.model_accepts_loss_kwargs = False
        self._settings = (beta, alpha, lambda_, gamma, label_smoothing)
        self._averaged = (*_AVERAGED, *(f"regularization/{name}" for name in self._objective.regularization))
        self._pairs_per_epoch = pairs_per_epoch
        self._pairs_per_step = pairs_per_step
        self.metrics_path = metrics_path
        self._sums = torch.zeros(len(self._averaged) + 1, dtype=torch.float64, device=self.args.device)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device. Reference values stay fp32; Trainer would round them to DeepSpeed's dtype."""
        floats = {name: inputs[name].to(self.args.device) for name in FLOAT_COLUMNS}
        rest = {name: tensor for name, tensor in inputs.items() if name not in floats}
        return {**super()._prepare_inputs(rest), **floats}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Mean over the slots of this micro-batch of weight times per-pair loss; a scalar."""
        batch = self._batch(response_logps(model, inputs, weights="weights" in self._objective.needs), inputs)
        losses = self._objective.formula(batch)
        with torch.no_grad():
            self._note(batch, inputs["weights"] > 0)
        loss: Tensor = (losses * inputs["weights"]).mean()
        return loss

    def _batch(self, logps: ResponseLogps, inputs: dict[str, Any]) -> Batch:
        """The micro-batch as objectives see it."""
        extras = Extras(
            Shared(
                logps.chosen_shared,
                logps.rejected_shared,
                inputs["ref_chosen_shared_logps"],
                inputs["ref_rejected_shared_logps"],
            ),
            logps.weights,
            self._ratios.means if self._ratios else None,
        )
        references = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        chosen_lengths, rejected_lengths = inputs["lengths"].chunk(2)
        return Batch(
            logps.chosen, logps.rejected, *references, chosen_lengths, rejected_lengths, *self._settings, extras
        )

    def _note(self, batch: Batch, is_pair: Tensor) -> None:
        """Add up what ``log`` averages, on the device, so that a step waits for nothing."""
        chosen_rewards, rejected_rewards = batch.beta * batch.chosen_ratio, batch.beta * batch.rejected_ratio
        values = (
            chosen_rewards,
            rejected_rewards,
            chosen_rewards > rejected_rewards,
            chosen_rewards - rejected_rewards,
            batch.beta * batch.s_theta,
            batch.beta * batch.s_ref,
            batch.policy_chosen_logps,
            batch.policy_rejected_logps,
            -batch.policy_chosen_logps / batch.chosen_lengths,
            batch.chosen_lengths,
            batch.rejected_lengths,
            *(term(batch) for term in self._objective.regularization.values()),
            torch.ones_like(is_pair),
        )
        self._sums += torch.stack([value.double().masked_fill(~is_pair, 0.0).sum() for value in values])
        if self._ratios:
            self._ratios.note(batch.chosen_ratio[is_pair], batch.rejected_ratio[is_pair])

    def complete(self, logs: dict[str, float]) -> None:
        """Add the averages over all processes' pairs since the last line."""
        *sums, num_pairs = self.accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums.zero_()
        logs.update({name: value / num_pairs for name, value in zip(self._averaged, sums, strict=True)})

    def epochs_done(self) -> float:
        """To Trainer, all passes are one."""
        return self.state.global_step * self._pairs_per_step / self._pairs_per_epoch


class _LogLastStep(TrainerCallback):
    """The last step is logged even if it is not a multiple of ``logging_steps``."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


def last_epoch_mean(lines: Sequence[dict[str, float]], name: str) -> float:
    """Mean of a metric over the last pass over the pairs (over all lines, if there was no whole pass).

    Each line counts by the steps it covers. One step's value would be that of a few pairs.
    """
    since = lines[-1]["epoch"] - 1 + 1e-9
    covered = [
        line["step"] - before for line, before in zip(lines, (0, *(line["step"] for line in lines)), strict=False)
    ]
    chosen = [(line[name], steps) for line, steps in zip(lines, covered, strict=True) if line["epoch"] > since]
    return sum(value * steps for value, steps in chosen) / sum(steps for _, steps in chosen)
