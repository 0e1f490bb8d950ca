"""The length-controlled win rate, on verdicts whose answer is known."""

import math
import random
from statistics import stdev

import pytest

from aipo_hpc.length_control import length_controlled


def two_groups(longer: tuple[int, int], shorter: tuple[int, int], by: int = 100) -> tuple[list[float], list[float]]:
    """Verdicts (wins, losses) on answers that are longer and on as many that are shorter, all by the same number."""
    wins = [1.0] * longer[0] + [0.0] * longer[1] + [1.0] * shorter[0] + [0.0] * shorter[1]
    return wins, [float(by)] * sum(longer) + [float(-by)] * sum(shorter)


def test_with_two_differences_it_lies_half_way_between_their_log_odds():
    # Longer answers win 90 of 100 (odds 9), shorter ones 50 of 100 (odds 1): at no difference the odds are 3.
    found = length_controlled(*two_groups((90, 10), (50, 50)))
    assert found is not None
    assert found.win_rate == pytest.approx(0.75, abs=1e-7)
    # The model is saturated, so var(a) = (1/(n p q) of the one + of the other) / 4; times (pq)^2 at 0.75, and n / (n - 2).
    variance = (1 / (100 * 0.9 * 0.1) + 1 / (100 * 0.5 * 0.5)) / 4 * 200 / 198
    assert found.standard_error == pytest.approx(0.75 * 0.25 * math.sqrt(variance), rel=1e-6)
    print(f"plain 0.700, length-controlled {found.win_rate:.3f} ± {found.standard_error:.3f}, slope {found.slope:.2f}")
    assert found.slope == pytest.approx(math.log(3) / math.tanh(math.sqrt(199 / 200)), rel=1e-6)


def test_a_judge_that_looks_at_length_alone_gives_half():
    found = length_controlled(*two_groups((80, 20), (20, 80)))
    assert found is not None and found.win_rate == pytest.approx(0.5, abs=1e-9)
    more_often_longer = length_controlled(*two_groups((240, 60), (20, 80)))
    assert more_often_longer is not None
    print(f"plain {260 / 400}, length-controlled {more_often_longer.win_rate:.3f}")
    assert abs(more_often_longer.win_rate - 0.5) < 2 * more_often_longer.standard_error
    assert more_often_longer.slope > 0


def test_a_judge_that_does_not_look_at_length_gives_the_plain_win_rate_and_its_error():
    wins = [1.0] * 6 + [0.5] * 2 + [0.0] * 2
    found = length_controlled(wins, [0.0] * 10)
    assert found is not None
    assert found.win_rate == pytest.approx(0.7, abs=1e-7)
    assert found.standard_error == pytest.approx(stdev(wins) / math.sqrt(10), rel=1e-6)
    assert found.slope == 0


@pytest.mark.parametrize("differences", [[0.0] * 6, [0.0] * 5 + [7.0], [-3.0, 2.0, 0.0, 8.0, -9.0, 1.0]])
def test_ties_alone_are_half_and_half(differences):
    found = length_controlled([0.5] * 6, differences)
    assert found is not None and (found.win_rate, found.standard_error, found.slope) == (0.5, 0.0, 0.0)


def test_few_verdicts_of_any_kind_are_fitted_or_refused_and_never_an_error():
    draw = random.Random(5)
    fitted = 0
    for _ in range(300):
        number, ties = draw.choice([3, 4, 6, 16]), draw.choice([0.1, 0.5, 0.9])
        wins = [0.5 if draw.random() < ties else draw.choice([0.0, 1.0]) for _ in range(number)]
        differences = [0 if win == 0.5 and draw.random() < 0.7 else draw.randint(-50, 50) for win in wins]
        found = length_controlled(wins, differences)
        if found is not None:
            fitted += 1
            assert 0 < found.win_rate < 1 and 0 <= found.standard_error < 1
    print(f"{fitted} of 300 small sets of verdicts determine a rate")
    assert fitted > 100


def test_a_tie_is_half_a_win_and_half_a_loss():
    # The same verdicts twice, with each tie of the first told as a win and a loss in the second.
    tied, differences = [1.0, 0.0, 0.5, 0.5, 1.0, 0.0], [10.0, -5.0, 3.0, -20.0, -8.0, 12.0]
    split = [verdict for win in tied for verdict in ((1.0, 0.0) if win == 0.5 else (win, win))]
    one = length_controlled(tied, differences)
    other = length_controlled(split, [each for each in differences for _ in range(2)])
    # The standard deviation divides by n - 1, and n differs: that scales the slope's unit, not the fit, by 5 %.
    assert one is not None and other is not None
    assert one.win_rate == pytest.approx(other.win_rate, abs=0.005)


def test_swapping_the_sides_gives_the_complement():
    draw = random.Random(3)
    wins = [draw.choice([0.0, 0.5, 1.0]) for _ in range(60)]
    differences = [draw.gauss(20, 100) for _ in wins]
    mine = length_controlled(wins, differences)
    theirs = length_controlled([1 - win for win in wins], [-each for each in differences])
    assert mine is not None and theirs is not None
    assert mine.win_rate + theirs.win_rate == pytest.approx(1, abs=1e-9)
    assert mine.standard_error == pytest.approx(theirs.standard_error, rel=1e-6)


def test_the_same_verdicts_give_the_same_bits():
    wins, differences = two_groups((30, 12), (9, 21), by=33)
    assert length_controlled(wins, differences) == length_controlled(wins, differences)


def test_the_error_is_what_repeated_draws_show():
    draw = random.Random(11)
    lengths = [draw.gauss(150, 400) for _ in range(300)]
    spread = stdev(lengths)
    odds = [1 / (1 + math.exp(-(0.4 + 1.2 * math.tanh(each / spread)))) for each in lengths]
    fits = [length_controlled([float(draw.random() < p) for p in odds], lengths) for _ in range(200)]
    rates = [fit.win_rate for fit in fits if fit is not None]
    told = [fit.standard_error for fit in fits if fit is not None]
    truth = 1 / (1 + math.exp(-0.4))
    print(f"truth {truth:.4f}; mean of 200 fits {sum(rates) / 200:.4f}, spread {stdev(rates):.4f}, told {told[0]:.4f}")
    assert sum(rates) / len(rates) == pytest.approx(truth, abs=0.01)
    assert stdev(rates) == pytest.approx(sum(told) / len(told), rel=0.15)


@pytest.mark.parametrize(
    ("wins", "differences"),
    [
        ([1.0, 0.0], [1.0, -1.0]),  # too few
        ([1.0] * 5, [1.0, 2.0, -3.0, 4.0, 5.0]),  # no loss: at every length the winner is the same
        ([0.0] * 5, [1.0, 2.0, -3.0, 4.0, 5.0]),
        ([1.0, 1.0, 0.0, 0.0], [5.0, 3.0, 1.0, -2.0]),  # a threshold of the difference tells all verdicts
        ([0.0, 0.0, 1.0, 1.0], [5.0, 3.0, 1.0, -2.0]),
        ([1.0, 0.0, 1.0, 0.0], [25.0, 50.0, 30.0, 26.0]),  # all longer: what holds at no difference was never seen
        ([1.0, 0.0, 1.0, 0.5], [-7.0, -7.0, -7.0, -7.0]),
    ],
)
def test_verdicts_that_do_not_determine_it_give_no_figure(wins, differences):
    assert length_controlled(wins, differences) is None
