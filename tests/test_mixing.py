"""Pairs from elsewhere: how many and which are taken, what they are called, and which settings are refused."""

from typing import Any

import pytest

from aipo_hpc.errors import RecipeError
from aipo_hpc.mixing import renamed, take
from aipo_hpc.rows import Candidate, Message, Pair
from aipo_hpc.stages.pairs import MixConfig, PairsConfig


def test_the_first_the_last_or_a_random_share_is_taken_in_its_order() -> None:
    items = list(range(10))
    assert take(items, 0.3, "keep_start", 0) == [0, 1, 2]
    assert take(items, 0.3, "keep_end", 0) == [7, 8, 9]
    assert take(items, 0.25, "keep_start", 0) == [0, 1, 2], "2.5 is rounded up"
    assert take(items, 0.04, "keep_end", 0) == [], "0.4 is rounded down"
    drawn = take(items, 0.3, "random", "7/1/x")
    assert len(drawn) == 3 and drawn == sorted(drawn)
    assert drawn == take(items, 0.3, "random", "7/1/x") and drawn != take(items, 0.3, "random", "7/2/x")
    assert take(items, 1.0, "random", 0) == items


def test_a_random_share_takes_every_item_about_as_often() -> None:
    times = [0] * 10
    for seed in range(1000):
        for item in take(range(10), 0.3, "random", seed):
            times[item] += 1
    print(f"of 1000 draws of 3 in 10, each was in {min(times)} to {max(times)}")
    assert sum(times) == 3000 and min(times) > 240 and max(times) < 360


def test_a_pair_of_an_earlier_iteration_has_another_id_and_its_source() -> None:
    pair = Pair("p", "why", [Message("user", "why")], Candidate("a", "stop", 2), Candidate("b", "stop", 2), 1.0, 0.0)
    moved = renamed(pair, "iter-00")
    assert (moved.prompt_id, moved.source) == ("p@iter-00", "iter-00")
    assert (moved.messages, moved.chosen, moved.rejected) == (pair.messages, pair.chosen, pair.rejected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MixConfig(ratio=0.0), "ratio=0.0: must be above 0 and at most 1"),
        (lambda: MixConfig(keep="middle"), "keep='middle': choose one of random, keep_start, keep_end"),
        (lambda: PairsConfig(mix=(MixConfig(), MixConfig())), "each dataset needs a name"),
        (lambda: PairsConfig(mix=(MixConfig(name="own"),)), "each dataset needs a name"),
        (lambda: PairsConfig(mix=(MixConfig(name="iter-00"),)), "each dataset needs a name"),
        (lambda: PairsConfig(accumulate=(0.5, 1.5)), "each share must be above 0"),
        (lambda: PairsConfig(decontaminate_ngram=0), "pairs.decontaminate_ngram=0: must be 1 or more"),
        (lambda: PairsConfig(decontaminate_overlap=0.0), "pairs.decontaminate_overlap=0.0: must be above 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(make: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make()
