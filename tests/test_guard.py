"""The guard: its values worked out by hand, its thresholds, and what it says."""

import pytest

from aipo_hpc.errors import GuardStop, RecipeError
from aipo_hpc.guard import ADVICE, BELOW, Finding, GuardConfig, Tally, agreement, check, enforce
from aipo_hpc.rows import Candidate, Message, Pair, Ranked

TALK = [Message("user", "why")]


def row(texts: str, finish: str = "", error: str | None = None) -> Ranked:
    """A prompt with a candidate per letter; those at the positions named in ``finish`` were cut off."""
    candidates = [Candidate(text, "length" if str(at) in finish else "stop", 5) for at, text in enumerate(texts)]
    return Ranked("p", "why", TALK, candidates, [], [], [], error)


def pair(chosen: int, rejected: int) -> Pair:
    return Pair("p", "why", TALK, Candidate("a", "stop", chosen), Candidate("b", "stop", rejected), 1.0, 0.0)


def test_the_values_are_those_counted_by_hand() -> None:
    tally = Tally()
    for each in (
        row("abcd", finish="03"),
        row("aaab"),
        row("ab", error="scores are not finite"),
        row("", error="none"),
    ):
        tally.add(each)
    values = tally.values([pair(30, 10), pair(6, 14)], ties=1)
    print(values)
    assert values == {
        "length_gap": (18 - 12) / 12,
        "tie_rate": 1 / 2,  # two prompts were ranked
        "truncation_rate": 2 / 10,
        "duplicate_rate": 2 / 10,  # two repeat the first "a"
        "share_kept": 2 / 4,
    }


def test_agreement_is_the_share_of_pairs_whose_chosen_response_the_reference_finds_likelier() -> None:
    assert agreement([-1.0, -5.0, -2.0, -9.0], [-2.0, -4.0, -2.0, -9.5]) == 2.5 / 4


@pytest.mark.parametrize("name", ADVICE)
def test_each_value_warns_and_stops_on_its_side_of_its_thresholds_and_not_at_them(name: str) -> None:
    warn, stop = (0.4, 0.2) if name in BELOW else (0.2, 0.4)
    config = GuardConfig(**{f"warn_{name}": warn, f"stop_{name}": stop})
    beyond = -0.01 if name in BELOW else 0.01
    assert check({name: warn}, config) == []
    assert check({name: warn + beyond}, config) == [Finding(name, warn + beyond, warn, False)]
    assert check({name: stop}, config) == [Finding(name, stop, warn, False)]
    assert check({name: stop + beyond}, config) == [Finding(name, stop + beyond, stop, True)]
    assert check({name: stop + beyond}, GuardConfig(**{f"warn_{name}": None})) == []


def test_only_findings_that_stop_end_the_run_with_all_of_them_and_what_to_do() -> None:
    warns = Finding("tie_rate", 0.6, 0.5, False)
    enforce([], "iter-01/pairs")
    enforce([warns], "iter-01/pairs")
    stops = [warns, Finding("share_kept", 0.1, 0.2, True), Finding("length_gap", 0.9, 0.8, True)]
    with pytest.raises(GuardStop) as raised:
        enforce(stops, "iter-01/pairs")
    message = str(raised.value)
    print(message)
    assert message.startswith(
        "iter-01/pairs: the guard stopped the run: share_kept 0.100 is below guard.stop_share_kept=0.2; "
        "length_gap 0.900 is above guard.stop_length_gap=0.8."
    )
    assert "guard.stop_share_kept=... guard.stop_length_gap=..." in message and "type the same command again" in message
    assert "loosen the filters" in message and "raise train.alpha" in message and "tie_rate" not in message


@pytest.mark.parametrize(
    ("thresholds", "words"),
    [
        ({"warn_tie_rate": 0.5, "stop_tie_rate": 0.4}, "guard.stop_tie_rate=0.4 comes before .* must be higher"),
        ({"warn_share_kept": 0.3, "stop_share_kept": 0.4}, "guard.stop_share_kept=0.4 comes before .* must be lower"),
    ],
)
def test_a_stop_threshold_that_comes_before_the_warning_is_refused(thresholds: dict[str, float], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        GuardConfig(**thresholds)
