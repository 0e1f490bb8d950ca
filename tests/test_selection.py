"""Which candidates become a pair and which pairs are unfit, against cases worked out by hand."""

import pytest

from aipo_hpc.errors import RecipeError
from aipo_hpc.filters import Filters, more_alike, smallest_margins, unfit
from aipo_hpc.rows import Candidate, Message, Pair, Ranked
from aipo_hpc.selection import adjusted, choose
from aipo_hpc.stages.pairs import PairsConfig

TALK = [Message("user", "why")]


def ranked(scores: list[float], lengths: list[int] | None = None, prompt_id: str = "p") -> Ranked:
    sizes = lengths or [10] * len(scores)
    candidates = [Candidate(f"answer {number}", "stop", size) for number, size in enumerate(sizes)]
    ranks = [1 + sum(other > score for other in scores) for score in scores]
    return Ranked(prompt_id, "why", TALK, candidates, scores, ranks, [False] * len(scores))


def picked(found: Pair | str) -> tuple[str, str]:
    assert isinstance(found, Pair)
    return found.chosen.response.removeprefix("answer "), found.rejected.response.removeprefix("answer ")


def pair(
    chosen: str = "yes", rejected: str = "no", margin: float = 1.0, finish: tuple[str, str] = ("stop", "stop")
) -> Pair:
    return Pair("p", "why", TALK, Candidate(chosen, finish[0], 5), Candidate(rejected, finish[1], 5), margin, 0.0)


def test_the_best_goes_against_the_worst_or_the_next_best() -> None:
    row = ranked([1.0, 4.0, 3.0, 4.0, 1.0])
    assert picked(choose(row)) == ("1", "0")
    assert picked(choose(row, "max_second")) == ("1", "2"), "who ties with the best is not the second"
    assert choose(ranked([2.0, 2.0]), "max_second") == choose(ranked([2.0, 2.0]), "best_random") == "tie"


def test_a_random_rejected_one_is_worse_drawn_by_seed_and_prompt_alone() -> None:
    rows = [ranked([3.0, 2.0, 1.0, 3.0], prompt_id=f"p{number}") for number in range(200)]
    drawn = [picked(choose(row, "best_random", seed="7/0")) for row in rows]
    assert {chosen for chosen, _ in drawn} == {"0"}
    assert 60 < sum(rejected == "1" for _, rejected in drawn) < 140 and {each for _, each in drawn} == {"1", "2"}
    assert drawn[::-1] == [picked(choose(row, "best_random", seed="7/0")) for row in rows[::-1]]
    assert drawn != [picked(choose(row, "best_random", seed="7/1")) for row in rows]


def test_a_length_rule_changes_who_is_best_and_the_scores_that_the_pair_carries() -> None:
    row = ranked([5.0, 4.0, 1.0], [100, 20, 10])
    assert adjusted(row.scores, row.candidates, "penalized", 0.05) == [0.0, 3.0, 0.5]
    assert adjusted(row.scores, row.candidates, "normalized", 0.0) == [0.04, 0.15, 0.0]
    for rule, worst in (("penalized", "0"), ("normalized", "2")):
        found = choose(row, "best_worst", rule, 0.05)
        assert picked(found) == ("1", worst)
        assert isinstance(found, Pair) and found.chosen_score > found.rejected_score
    empty = ranked([1.0, 0.0], [0, 5])
    assert adjusted(empty.scores, empty.candidates, "normalized", 0.0) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("found", "filters", "reason"),
    [
        (pair(finish=("length", "stop")), Filters(), None),
        (pair(finish=("length", "stop")), Filters(drop_truncated_chosen=True), "truncated_chosen"),
        (pair(finish=("stop", "length")), Filters(drop_truncated_chosen=True), None),
        (pair(finish=("stop", "length")), Filters(drop_truncated_rejected=True), "truncated_rejected"),
        (pair(margin=0.4), Filters(min_margin=0.5), "small_margin"),
        (pair(margin=0.5), Filters(min_margin=0.5), None),
        (pair("a b c d", "a b c e"), Filters(max_similarity=0.7), "near_identical"),
        (pair("a b c d", "a b c e"), Filters(max_similarity=0.75), None),
    ],
)
def test_pairs_are_dropped_for_a_reason(found: Pair, filters: Filters, reason: str | None) -> None:
    assert unfit(found, filters) == reason


def test_texts_are_alike_by_the_words_that_they_share_in_order() -> None:
    # 3 words in common of 4 and 4: 2 * 3 / 8.
    assert more_alike("a b c d", "a b c e", 0.74) and not more_alike("a b c d", "a b c e", 0.75)
    assert not more_alike("a b c d", "d c b a", 0.3), "the same words in another order"


def test_the_smallest_margins_go_first() -> None:
    pairs = [pair(margin=margin) for margin in (3.0, 1.0, 2.0, 1.0, 5.0)]
    assert smallest_margins(pairs, 0.0) == set()
    assert smallest_margins(pairs, 0.2) == {3}
    assert smallest_margins(pairs, 0.6) == {1, 2, 3}
    assert smallest_margins([], 0.5) == set()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("selection", "random", "pairs.selection='random': no such selection; choose one of best_worst, best_random"),
        ("length_rule", "short", "pairs.length_rule='short': no such rule; choose one of none, penalized"),
        ("max_similarity", 1.5, "pairs.max_similarity=1.5: must be from 0 to 1"),
        ("min_margin", -1.0, "pairs.min_margin=-1.0: must be 0 or more"),
        ("min_margin_quantile", 1.0, "pairs.min_margin_quantile=1.0: must be from 0 to below 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(field: str, value: object, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        PairsConfig(**{field: value})  # type: ignore[arg-type]
