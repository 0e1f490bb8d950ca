"""How many shards are sent at once where a scheduler takes only so many of a user's jobs."""

from aipo_hpc.allowance import Allowance


def test_all_is_sent_until_it_is_refused_then_half_and_after_one_nothing_for_a_while() -> None:
    allowance = Allowance(wait=20.0)
    assert allowance.at(100.0) is None
    tried = []
    number = 9
    while number:
        tried.append(number)
        allowance.refused(number, now=100.0)
        number = allowance.at(100.0) or 0
    assert tried == [9, 4, 2, 1]
    assert (allowance.at(119.0), allowance.at(120.0)) == (0, 1)


def test_what_is_accepted_doubles_what_is_tried_next() -> None:
    allowance = Allowance(wait=20.0)
    allowance.accepted(1000)
    assert allowance.at(0.0) is None, "a scheduler that never refused is not held back"
    allowance.refused(1000, now=0.0)
    for number in (3, 6):
        allowance.refused(7, now=0.0)
        allowance.accepted(number)
        assert allowance.at(20.0) == max(3, 2 * number)


def test_a_room_that_was_just_filled_is_left_alone_for_a_while() -> None:
    allowance = Allowance(wait=20.0)
    allowance.refused(8, now=0.0)
    allowance.accepted(4)
    allowance.refused(8, now=1.0)
    assert (allowance.at(20.0), allowance.at(21.0)) == (0, 4)
