"""The scheduler is asked seldom, sooner for a reason, and never too often."""

import itertools

from aipo_hpc.pace import Pace


def asked_at(pace: Pace, seconds: int, urgent: bool) -> list[int]:
    """The seconds at which it asks, if it may every second."""
    times = []
    for now in range(seconds):
        if pace.allows(float(now), urgent):
            pace.asked(float(now))
            times.append(now)
    return times


def test_without_a_reason_it_asks_once_in_an_interval() -> None:
    assert asked_at(Pace(20.0), 61, urgent=False) == [0, 20, 40, 60]


def test_with_a_reason_it_asks_sooner_until_the_bucket_is_empty() -> None:
    times = asked_at(Pace(20.0), 60, urgent=True)
    assert times[:5] == [0, 3, 6, 9, 12]
    assert all(later - earlier >= 3 for earlier, later in itertools.pairwise(times))


def test_over_an_hour_of_reasons_it_asks_little_more_often_than_the_interval() -> None:
    assert len(asked_at(Pace(20.0), 3600, urgent=True)) <= 3600 / 20 + 6


def test_an_interval_of_zero_asks_always() -> None:
    assert asked_at(Pace(0.0), 4, urgent=False) == [0, 1, 2, 3]
