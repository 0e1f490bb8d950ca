"""What a formula is given: the pairs of a batch, the settings, and what only some formulas need."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class Shared:
    """Log-probabilities of the first min(|y_w|, |y_l|) tokens of each response; shape (batch,) each."""

    policy_chosen: "Tensor"
    policy_rejected: "Tensor"
    ref_chosen: "Tensor"
    ref_rejected: "Tensor"


@dataclass(frozen=True)
class Ratios:
    """Means of r(y) over pairs of earlier optimizer steps and all processes, in nats; 0 before the first step.

    They come from earlier steps because the pairs of a step are spread over micro-batches and processes: their own mean
    is known only when the step is over, and a loss that took the mean of a micro-batch would depend on its size.
    """

    chosen: float = 0.0
    """Mean of r(y_w) over the pairs of the last step."""
    rejected: float = 0.0
    """Mean of r(y_l) over the pairs of the last step."""
    running: float = 0.0
    """Mean of r(y) over both responses of the pairs of all steps so far."""


@dataclass(frozen=True)
class Extras:
    """What sums and lengths do not tell. Each is computed only for an objective that names it in ``needs``."""

    shared: Shared | None = None
    weights: "Tensor | None" = None
    """How much the pair looks like the policy's own samples, shape (batch,), without a gradient; see ``logps``."""
    ratios: Ratios | None = None


NO_EXTRAS = Extras()


@dataclass(frozen=True)
class Batch:
    """Pairs and settings; tensors have shape (batch,) and mean what the package's docstring says."""

    policy_chosen_logps: "Tensor"
    policy_rejected_logps: "Tensor"
    ref_chosen_logps: "Tensor"
    ref_rejected_logps: "Tensor"
    chosen_lengths: "Tensor"
    rejected_lengths: "Tensor"
    beta: float
    alpha: float
    lambda_: float
    gamma: float
    label_smoothing: float
    extras: Extras = NO_EXTRAS

    @property
    def s_theta(self) -> "Tensor":
        """The policy's margin."""
        return self.policy_chosen_logps - self.policy_rejected_logps

    @property
    def s_ref(self) -> "Tensor":
        """The reference's margin."""
        return self.ref_chosen_logps - self.ref_rejected_logps

    @property
    def delta(self) -> "Tensor":
        """Margin of the implicit rewards, before beta."""
        return self.s_theta - self.s_ref

    @property
    def chosen_ratio(self) -> "Tensor":
        """r(y_w)."""
        return self.policy_chosen_logps - self.ref_chosen_logps

    @property
    def rejected_ratio(self) -> "Tensor":
        """r(y_l)."""
        return self.policy_rejected_logps - self.ref_rejected_logps


def given(value: Value | None) -> Value:
    """An extra that the objective's line of the table names, so that it is there."""
    assert value is not None
    return value
