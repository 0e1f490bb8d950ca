"""The win rate that would be seen if both sides' answers were equally long.

A judge's taste for length is taken out as in AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475), in the simplest form:

    logit P(win) = a + b * tanh(d / s)        d: difference of the lengths in characters, s: its standard deviation

fitted to the verdicts by maximum likelihood (scikit-learn's logistic regression, not penalized; a tie is half a win and half a
loss) and read off at d = 0: the length-controlled win rate is sigmoid(a). Its standard error follows from that of a by the
delta method. The covariance is the sandwich estimate, since verdicts with ties are not Bernoulli draws; where all differences
are equal it gives the standard error of the plain win rate.

What AlpacaEval's own model has besides: a difficulty of each instruction, estimated over all models of its leaderboard, and a
penalty that draws b towards what was seen of models told to be brief or verbose. Both need verdicts on other models.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LengthControlled:
    """The fit. ``slope`` is b: above 0, the judge favoured longer answers."""

    win_rate: float
    standard_error: float
    slope: float


def length_controlled(wins: Sequence[float], differences: Sequence[float]) -> LengthControlled | None:
    """Fit verdicts (1, 0.5 or 0) to length differences (own minus other).

    None where the verdicts do not determine it: fewer than three; or all of them on answers that are longer (or all shorter)
    than the other's; or such that a threshold of the difference separates the wins from the losses, as it always does if
    there are only wins or only losses.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    won, difference = np.asarray(wins, dtype=float), np.asarray(differences, dtype=float)
    if len(won) < 3 or not difference.min() <= 0 <= difference.max():
        return None
    spread = difference.std(ddof=1)
    feature = np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)
    varies = bool(np.ptp(feature) > 0)
    of_wins, of_losses = feature[won > 0], feature[won < 1]
    if not len(of_wins) or not len(of_losses):
        return None
    if varies and (of_wins.min() >= of_losses.max() or of_losses.min() >= of_wins.max()):
        return None
    ones = np.ones_like(feature)
    design = np.column_stack([ones, feature] if varies else [ones])
    # A verdict of w counts w times as a win and 1 - w times as a loss.
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(
        np.concatenate([design, design]),
        np.repeat([1, 0], len(won)),
        sample_weight=np.concatenate([won, 1 - won]),
    )
    coefficients = model.coef_[0]
    expected = 1 / (1 + np.exp(-design @ coefficients))
    bread = np.linalg.inv(design.T @ (design * (expected * (1 - expected))[:, None]))
    scores = design * (won - expected)[:, None]
    number, fitted = design.shape
    covariance = bread @ (scores.T @ scores) @ bread * number / (number - fitted)
    rate = float(1 / (1 + np.exp(-coefficients[0])))
    return LengthControlled(
        win_rate=rate,
        standard_error=float(rate * (1 - rate) * np.sqrt(covariance[0, 0])),
        slope=float(coefficients[1]) if varies else 0.0,
    )
