"""Preference objectives: pure functions from log-probabilities of a batch of pairs to one loss per pair.

    objective("aipo")(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
                      chosen_lengths, rejected_lengths, beta=..., alpha=..., lambda_=..., gamma=..., label_smoothing=...)

All six tensors have shape (batch,). Log-probabilities are sums over the response's tokens, in nats, and lengths are
counts of those tokens; both include the end-of-sequence token where the response has one. In the formulas below

    y_w, y_l   chosen and rejected response                 s_theta = log pi(y_w|x) - log pi(y_l|x)
    |y|        length of y in tokens                        s_ref   = log ref(y_w|x) - log ref(y_l|x)
    sigma      the logistic function                        eps     = label_smoothing

and every preference term is  S(z) = -(1 - eps) log sigma(z) - eps log sigma(-z),  where eps is the probability that a
pair is labelled the wrong way round (0: plain -log sigma). ``OBJECTIVES`` is the only list of them; reading it does not
import torch.
"""

import difflib
from typing import TYPE_CHECKING, Protocol

from aipo_hpc.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor


class Objective(Protocol):
    """The one signature all objectives share; each ignores what its formula does not mention."""

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
    ) -> "Tensor":
        """Per-pair losses, shape (batch,)."""
        ...


def objective(name: str) -> Objective:
    """Return the objective called ``name``. Raises RecipeError for a name that is not in ``OBJECTIVES``."""
    if name not in OBJECTIVES:
        close = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"loss_type={name!r} is not an objective.{hint} Objectives are {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]


def aipo(
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
) -> "Tensor":
    """AIPO: the margin asked for grows with the reference's own, and the chosen response's likelihood is kept up.

        S(beta * (s_theta - (1 + alpha) * s_ref - gamma)) - lambda / |y_w| * log pi(y_w|x)

    alpha = lambda = gamma = 0 is DPO. Shen et al. 2024 (arXiv 2409.08845), the agreement-aware objective, where the
    reference is the model of the iteration before; gamma is the constant margin of the authors' implementation.
    """
    s_theta = policy_chosen_logps - policy_rejected_logps
    s_ref = ref_chosen_logps - ref_rejected_logps
    preference = _preference(beta * (s_theta - (1 + alpha) * s_ref - gamma), label_smoothing)
    return preference - lambda_ * policy_chosen_logps / chosen_lengths


def alpha_dpo(
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
) -> "Tensor":
    """AIPO without the likelihood term.

        S(beta * (s_theta - (1 + alpha) * s_ref - gamma))

    Shen et al. 2024 (arXiv 2409.08845), where it is called alpha-DPO (another paper gives that name to another loss).
    """
    s_theta = policy_chosen_logps - policy_rejected_logps
    s_ref = ref_chosen_logps - ref_rejected_logps
    return _preference(beta * (s_theta - (1 + alpha) * s_ref - gamma), label_smoothing)


def sigmoid(
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
) -> "Tensor":
    """DPO.

        S(beta * (s_theta - s_ref - gamma))

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7; label smoothing as in their conservative DPO.
    """
    s_theta = policy_chosen_logps - policy_rejected_logps
    s_ref = ref_chosen_logps - ref_rejected_logps
    return _preference(beta * (s_theta - s_ref - gamma), label_smoothing)


def nll_loss(
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
) -> "Tensor":
    """DPO + NLL: DPO and the chosen response's likelihood per token.

        S(beta * (s_theta - s_ref - gamma)) - lambda / |y_w| * log pi(y_w|x)

    Pang et al. 2024 (arXiv 2404.19733), equation 1; a baseline of Shen et al. 2024 (with lambda = 0.2).
    """
    s_theta = policy_chosen_logps - policy_rejected_logps
    s_ref = ref_chosen_logps - ref_rejected_logps
    preference = _preference(beta * (s_theta - s_ref - gamma), label_smoothing)
    return preference - lambda_ * policy_chosen_logps / chosen_lengths


def simpo(
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
) -> "Tensor":
    """SimPO: likelihood per token as the reward, no reference. Note that gamma is not multiplied by beta here.

        S(beta * (log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|) - gamma)

    Meng et al. 2024 (arXiv 2405.14734), equation 6.
    """
    margin = policy_chosen_logps / chosen_lengths - policy_rejected_logps / rejected_lengths
    return _preference(beta * margin - gamma, label_smoothing)


def _preference(z: "Tensor", label_smoothing: float) -> "Tensor":
    """S(z) of the module's docstring, shape (batch,)."""
    from torch.nn.functional import logsigmoid

    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


OBJECTIVES: dict[str, Objective] = {
    "aipo": aipo,
    "alpha_dpo": alpha_dpo,
    "sigmoid": sigmoid,
    "nll_loss": nll_loss,
    "simpo": simpo,
}
