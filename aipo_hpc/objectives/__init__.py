"""Preference objectives: pure functions from log-probabilities of a batch of pairs to one loss per pair.

    objective("aipo")(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
                      chosen_lengths, rejected_lengths, beta=..., alpha=..., lambda_=..., gamma=..., label_smoothing=...)

All six tensors have shape (batch,). Log-probabilities are sums over the response's tokens, in nats, and lengths are
counts of those tokens; both include the end-of-sequence token where the response has one. In the formulas

    y_w, y_l   chosen and rejected response                 s_theta = log pi(y_w|x) - log pi(y_l|x)
    |y|        length of y in tokens                        s_ref   = log ref(y_w|x) - log ref(y_l|x)
    sigma      the logistic function                        delta   = s_theta - s_ref
    eps        label_smoothing                              r(y)    = log pi(y|x) - log ref(y|x)

    S(z) = -(1 - eps) log sigma(z) - eps log sigma(-z),   eps: the probability that a pair is labelled the wrong way round

A formula that needs more than sums and lengths says so in the table (``needs``), and the trainer computes only what is
needed (``batch.Extras`` tells what there is). To add an objective, write its function of a ``Batch`` in ``margins.py``,
``responses.py`` or a file of its own, and give it a line of ``OBJECTIVES``, the only list of them. Reading that list
does not import torch.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aipo_hpc.errors import RecipeError
from aipo_hpc.objectives import margins, responses
from aipo_hpc.objectives.batch import NO_EXTRAS, Batch, Extras

if TYPE_CHECKING:
    from torch import Tensor

Formula = Callable[[Batch], "Tensor"]


@dataclass(frozen=True)
class Objective:
    """A line of the table: the formula, and what is to be known about it."""

    formula: Formula
    uses: tuple[str, ...] = ()
    """Settings that the formula mentions besides beta."""
    needs: tuple[str, ...] = ()
    """Fields of ``Extras`` that it reads."""
    alpha: tuple[float, float] = (-1.0, float("inf"))
    """Between which values alpha makes sense, where it is used."""
    regularization: Mapping[str, Formula] = field(default_factory=dict)
    """Parts of the loss that are logged by themselves, as ``regularization/<name>``."""

    def __call__(
        self,
        policy_chosen_logps: "Tensor",
        policy_rejected_logps: "Tensor",
        ref_chosen_logps: "Tensor",
        ref_rejected_logps: "Tensor",
        chosen_lengths: "Tensor",
        rejected_lengths: "Tensor",
        *,
        beta: float,
        alpha: float,
        lambda_: float,
        gamma: float,
        label_smoothing: float,
        extras: Extras = NO_EXTRAS,
    ) -> "Tensor":
        """Per-pair losses, shape (batch,): the one signature of all; each ignores what its formula does not mention."""
        missing = [name for name in self.needs if getattr(extras, name) is None]
        if missing:
            raise TypeError(f"{self.formula.__name__} needs extras: {', '.join(missing)}")
        logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
        return self.formula(
            Batch(*logps, chosen_lengths, rejected_lengths, beta, alpha, lambda_, gamma, label_smoothing, extras)
        )


def objective(name: str) -> Objective:
    """Return the objective called ``name``. Raises RecipeError for a name that is not in ``OBJECTIVES``."""
    if name not in OBJECTIVES:
        close = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"loss_type={name!r} is not an objective.{hint} Objectives are {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]


_SMOOTH = ("gamma", "label_smoothing")
_ALPHA = {"alpha": margins.alpha_term}
_NLL = {"nll": margins.likelihood_term}

OBJECTIVES: Mapping[str, Objective] = {
    "aipo": Objective(margins.aipo, ("alpha", "lambda_", *_SMOOTH), regularization=_ALPHA | _NLL),
    "alpha_dpo": Objective(margins.alpha_dpo, ("alpha", *_SMOOTH), regularization=_ALPHA),
    "sigmoid": Objective(margins.sigmoid, _SMOOTH),
    "nll_loss": Objective(margins.nll_loss, ("lambda_", *_SMOOTH), regularization=_NLL),
    "simpo": Objective(margins.simpo, _SMOOTH),
    "sigmoid_norm": Objective(margins.sigmoid_norm, _SMOOTH),
    "robust": Objective(margins.robust, _SMOOTH),
    "hinge": Objective(margins.hinge, ("gamma",)),
    "ipo": Objective(margins.ipo, ("gamma",)),
    "r_dpo": Objective(
        margins.r_dpo, ("alpha", *_SMOOTH), alpha=(0, 0.05), regularization={"alpha": margins.length_term}
    ),
    "ld_dpo": Objective(
        margins.ld_dpo, ("alpha", *_SMOOTH), ("shared",), alpha=(0, 1), regularization={"alpha": margins.tail_term}
    ),
    "wpo": Objective(margins.wpo, _SMOOTH, ("weights",)),
    "kto_pair": Objective(responses.kto_pair, needs=("ratios",)),
    "bco_pair": Objective(responses.bco_pair, needs=("ratios",)),
    "sppo_hard": Objective(responses.sppo_hard),
    "nca_pair": Objective(responses.nca_pair),
}
