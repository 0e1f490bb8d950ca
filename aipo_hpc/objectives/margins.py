"""Objectives of a pair's margin: they look at both responses together. ``objectives`` explains the symbols.

gamma is the constant margin that the authors of AIPO add to every objective here: it is asked for in nats, inside beta
(in SimPO outside beta, as in its paper).
"""

from typing import TYPE_CHECKING

from aipo_hpc.objectives.batch import Batch, given

if TYPE_CHECKING:
    from torch import Tensor


def aipo(b: Batch) -> "Tensor":
    """AIPO: the margin asked for grows with the reference's own, and the chosen response's likelihood is kept up.

        S(beta * (s_theta - (1 + alpha) * s_ref - gamma)) - lambda / |y_w| * log pi(y_w|x)

    alpha = lambda = gamma = 0 is DPO. Shen et al. 2024 (arXiv 2409.08845), the agreement-aware objective, where the
    reference is the model of the iteration before; gamma is the constant margin of the authors' implementation.
    """
    return alpha_dpo(b) + likelihood_term(b)


def alpha_dpo(b: Batch) -> "Tensor":
    """AIPO without the likelihood term.

        S(beta * (s_theta - (1 + alpha) * s_ref - gamma))

    Shen et al. 2024 (arXiv 2409.08845), where it is called alpha-DPO (another paper gives that name to another loss).
    """
    return _preference(b, b.beta * (b.delta - b.gamma) + alpha_term(b))


def sigmoid(b: Batch) -> "Tensor":
    """DPO.

        S(beta * (delta - gamma))

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7; label smoothing as in their conservative DPO.
    """
    return _preference(b, b.beta * (b.delta - b.gamma))


def nll_loss(b: Batch) -> "Tensor":
    """DPO + NLL: DPO and the chosen response's likelihood per token.

        S(beta * (delta - gamma)) - lambda / |y_w| * log pi(y_w|x)

    Pang et al. 2024 (arXiv 2404.19733), equation 1; a baseline of Shen et al. 2024 (with lambda = 0.2).
    """
    return sigmoid(b) + likelihood_term(b)


def simpo(b: Batch) -> "Tensor":
    """SimPO: likelihood per token as the reward, no reference. Note that gamma is not multiplied by beta here.

        S(beta * (log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|) - gamma)

    Meng et al. 2024 (arXiv 2405.14734), equation 6.
    """
    margin = b.policy_chosen_logps / b.chosen_lengths - b.policy_rejected_logps / b.rejected_lengths
    return _preference(b, b.beta * margin - b.gamma)


def sigmoid_norm(b: Batch) -> "Tensor":
    """Length-normalised DPO: implicit rewards per token.

        S(beta * (r(y_w) / |y_w| - r(y_l) / |y_l| - gamma))

    Lambert et al. 2024 (arXiv 2411.15124, Tulu 3), length-normalised DPO, with beta = 5 there.
    """
    margin = b.chosen_ratio / b.chosen_lengths - b.rejected_ratio / b.rejected_lengths
    return _preference(b, b.beta * (margin - b.gamma))


def robust(b: Batch) -> "Tensor":
    """Robust DPO: an unbiased estimate of DPO's loss when labels are flipped with probability eps.

        (-(1 - eps) log sigma(z) + eps log sigma(-z)) / (1 - 2 eps),   z = beta * (delta - gamma)

    Chowdhury et al. 2024 (arXiv 2403.00409), the robust DPO loss (rDPO).
    """
    from torch.nn.functional import logsigmoid

    z, eps = b.beta * (b.delta - b.gamma), b.label_smoothing
    return (-(1 - eps) * logsigmoid(z) + eps * logsigmoid(-z)) / (1 - 2 * eps)


def hinge(b: Batch) -> "Tensor":
    """Hinge loss on the margin of the implicit rewards.

        max(0, 1 - beta * (delta - gamma))

    Zhao et al. 2023 (arXiv 2305.10425, SLiC-HF), the calibration loss, on DPO's margin as in Liu et al. 2023
    (arXiv 2309.06657, RSO).
    """
    return (1 - b.beta * (b.delta - b.gamma)).relu()


def ipo(b: Batch) -> "Tensor":
    """IPO: the margin is drawn to 1 / (2 beta), from both sides. Sums over tokens, not means as in some libraries.

        (delta - gamma - 1 / (2 beta)) ** 2

    Azar et al. 2023 (arXiv 2310.12036), equation 17, where beta is called tau.
    """
    return (b.delta - b.gamma - 1 / (2 * b.beta)) ** 2


def r_dpo(b: Batch) -> "Tensor":
    """R-DPO: what length alone explains is taken out of the preference; alpha > 0 penalises length.

        S(beta * (delta - gamma) + alpha * (|y_w| - |y_l|))

    Park et al. 2024 (arXiv 2403.19159), the length-regularised objective. alpha is per token and small: 0.002 in Shen
    et al. 2024.
    """
    return _preference(b, b.beta * (b.delta - b.gamma) + length_term(b))


def ld_dpo(b: Batch) -> "Tensor":
    """LD-DPO: tokens of the longer response beyond the shorter one's length count alpha, the others 1.

        S(beta * (delta' - gamma)),   delta' = delta with log p(y) replaced by log p(y[:m]) + alpha * log p(y[m:]),
        m = min(|y_w|, |y_l|), for policy and reference

    Liu et al. 2024 (arXiv 2409.06411), the length-desensitised likelihood; alpha from 0 to 1, where 1 is DPO. Needs the
    log-probabilities of the shared length.
    """
    return _preference(b, b.beta * (b.delta - b.gamma) + tail_term(b))


def wpo(b: Batch) -> "Tensor":
    """WPO: DPO, each pair weighted by how likely the policy is to give its responses; corrects for off-policy data.

        w(y_w) w(y_l) S(beta * (delta - gamma)),   w(y) = exp(1/|y| * sum_t log(pi(y_t) / sum_v pi(v)^2)), no gradient

    Zhou et al. 2024 (arXiv 2406.11827), equation 2 with its sampled alignment. Needs the weights w(y_w) w(y_l).
    """
    return given(b.extras.weights) * sigmoid(b)


def alpha_term(b: Batch) -> "Tensor":
    """What alpha adds to the argument of S in AIPO: -beta * alpha * s_ref."""
    return -b.beta * b.alpha * b.s_ref


def likelihood_term(b: Batch) -> "Tensor":
    """What lambda adds to the loss: -lambda / |y_w| * log pi(y_w|x)."""
    return -b.lambda_ * b.policy_chosen_logps / b.chosen_lengths


def length_term(b: Batch) -> "Tensor":
    """What alpha adds to the argument of S in R-DPO: alpha * (|y_w| - |y_l|)."""
    return b.alpha * (b.chosen_lengths - b.rejected_lengths)


def tail_term(b: Batch) -> "Tensor":
    """What LD-DPO takes from the argument of S: -(1 - alpha) * beta * delta of the tokens beyond the shared length."""
    shared = given(b.extras.shared)
    shared_delta = (shared.policy_chosen - shared.policy_rejected) - (shared.ref_chosen - shared.ref_rejected)
    return -(1 - b.alpha) * b.beta * (b.delta - shared_delta)


def _preference(b: Batch, z: "Tensor") -> "Tensor":
    """S(z), shape (batch,)."""
    from torch.nn.functional import logsigmoid

    return -(1 - b.label_smoothing) * logsigmoid(z) - b.label_smoothing * logsigmoid(-z)
