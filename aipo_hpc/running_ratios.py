"""Mean log-ratios of policy to reference over the training so far, for objectives that are relative to them.

They change once per optimizer step, when the pairs of the step are known on all processes, and are part of checkpoints:
neither micro-batches, nor the number of processes, nor an interruption changes what a step sees.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from aipo_hpc.objectives.batch import Ratios


class RunningRatios(TrainerCallback, ExportableState):
    """Holds ``means`` for the step that is being computed; the trainer notes each micro-batch of it."""

    def __init__(self) -> None:
        self.means = Ratios()
        self._running_pairs = 0.0
        self._step: Tensor | None = None

    def note(self, chosen: Tensor, rejected: Tensor) -> None:
        """Add the log-ratios r(y_w) and r(y_l) of some pairs, of shape (pairs,), to those of the step."""
        sums = torch.stack(
            [chosen.double().sum(), rejected.double().sum(), torch.full_like(chosen, 1.0).double().sum()]
        )
        self._step = sums if self._step is None else self._step + sums

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer on every process after an optimizer step, before a checkpoint of it is saved."""
        assert self._step is not None
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._step)
        chosen, rejected, pairs = self._step.tolist()
        self._step = None
        total = self.means.running * 2 * self._running_pairs + chosen + rejected
        self._running_pairs += pairs
        self.means = Ratios(chosen / pairs, rejected / pairs, total / (2 * self._running_pairs))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in trainer_state.json."""
        means = {"chosen": self.means.chosen, "rejected": self.means.rejected, "running": self.means.running}
        return {"args": {}, "attributes": {"means": means, "pairs": self._running_pairs}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer when a checkpoint, if there is one, has been read."""
        kept = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(kept, dict) and kept.get("attributes"):
            self.means = Ratios(**kept["attributes"]["means"])
            self._running_pairs = kept["attributes"]["pairs"]
