"""Objectives that judge each response of a pair by itself. ``objectives`` explains the symbols.

They have neither a margin gamma nor label smoothing.
"""

from typing import TYPE_CHECKING

from aipo_hpc.objectives.batch import Batch, given

if TYPE_CHECKING:
    from torch import Tensor


def kto_pair(b: Batch) -> "Tensor":
    """KTO on pairs: each response against the policy's divergence from the reference on the other kind of response.

        (1 - sigma(beta * (r(y_w) - KL_l)) + 1 - sigma(beta * (KL_w - r(y_l)))) / 2,   KL = max(0, mean r), no gradient

    Ethayarajh et al. 2024 (arXiv 2402.01306), equation 7, where the divergence is estimated on the batch. Here it is the
    mean over the pairs of the optimizer step before (``Ratios``).
    """
    ratios = given(b.extras.ratios)
    chosen_kl, rejected_kl = max(ratios.chosen, 0.0), max(ratios.rejected, 0.0)
    # 1 - sigma(z) is sigma(-z), and exact where sigma(z) rounds to 1.
    chosen_loss = (-b.beta * (b.chosen_ratio - rejected_kl)).sigmoid()
    rejected_loss = (-b.beta * (chosen_kl - b.rejected_ratio)).sigmoid()
    return (chosen_loss + rejected_loss) / 2


def bco_pair(b: Batch) -> "Tensor":
    """BCO: a classifier that tells chosen from rejected responses by their reward, relative to the mean reward.

        -log sigma(beta * r(y_w) - shift) - log sigma(-(beta * r(y_l) - shift)),   shift = running mean of beta * r(y)

    Jung et al. 2024 (arXiv 2404.04656), binary classifier optimization with reward shift. The mean runs over both responses
    of the pairs of all optimizer steps so far (``Ratios``).
    """
    from torch.nn.functional import logsigmoid

    shift = b.beta * given(b.extras.ratios).running
    return -logsigmoid(b.beta * b.chosen_ratio - shift) - logsigmoid(-(b.beta * b.rejected_ratio - shift))


def sppo_hard(b: Batch) -> "Tensor":
    """SPPO with win probabilities of 1 and 0: each log-ratio is drawn to plus or minus 1 / (2 beta).

        (r(y_w) - 1 / (2 beta)) ** 2 + (r(y_l) + 1 / (2 beta)) ** 2

    Wu et al. 2024 (arXiv 2405.00675), equation 4.7, where 1 / beta is called eta.
    """
    target = 1 / (2 * b.beta)
    return (b.chosen_ratio - target) ** 2 + (b.rejected_ratio + target) ** 2


def nca_pair(b: Batch) -> "Tensor":
    """NCA on pairs: the chosen response's reward is also held down, so that its likelihood is not lost.

        -log sigma(beta * r(y_w)) - (log sigma(-beta * r(y_w)) + log sigma(-beta * r(y_l))) / 2

    Chen et al. 2024 (arXiv 2402.05369), noise contrastive alignment with a preference pair.
    """
    from torch.nn.functional import logsigmoid

    chosen, rejected = b.beta * b.chosen_ratio, b.beta * b.rejected_ratio
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2
