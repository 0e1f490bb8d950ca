"""What rankers have in common: names, settings, batches, cut texts, and how an ensemble decides."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_tokenizer_folder

from aipo_hpc.chat import load_tokenizer, prompt_ids
from aipo_hpc.errors import RecipeError
from aipo_hpc.rankers import Ranking, failed, from_texts, ranks_of
from aipo_hpc.rankers.batching import token_batches
from aipo_hpc.rankers.config import (
    JudgeConfig,
    MemberConfig,
    RankerConfig,
    check_models,
    check_ranker,
    models,
    without_models,
)
from aipo_hpc.rankers.ensemble import Ensemble, majority, middle_ranks, rank_average
from aipo_hpc.rankers.fitting import fit, share
from aipo_hpc.rows import Message, Responses
from aipo_hpc.settings import content, everything, from_plain

PAIR = (MemberConfig("pairrm", "a"), MemberConfig("judge", "policy"))
ENSEMBLE = RankerConfig("ensemble", members=PAIR)


# Settings


def test_an_unknown_ranker_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(
        RecipeError, match=r"rank.ranker='pair_rm': unknown ranker; did you mean 'pairrm'\? known: pairrm, "
    ):
        check_ranker(RankerConfig(ranker="pair_rm"))
    with pytest.raises(RecipeError, match=r"evaluate\.ranker='gpt': unknown ranker; known"):
        check_ranker(RankerConfig(ranker="gpt"), "evaluate")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (RankerConfig("ensemble"), "with 0 members: give rank.members of at least two"),
        (
            replace(ENSEMBLE, combine="sum"),
            "rank.combine='sum': no such way to combine; there are rank_average, majority",
        ),
        (replace(ENSEMBLE, members=(*PAIR, PAIR[0])), r"rank.members\[0\]: two members are called 'pairrm'"),
        (replace(ENSEMBLE, members=(*PAIR, MemberConfig("ensemble"))), r"rank.members\[2\].ranker='ensemble': unknown"),
        (
            replace(ENSEMBLE, members=(*PAIR, MemberConfig("judge", name="a/b"))),
            r"members\[2\].name='a/b': use letters",
        ),
        (RankerConfig("judge", judge=JudgeConfig(engine="vlm")), "rank.judge.engine='vlm': no such engine"),
        (RankerConfig("judge", judge=JudgeConfig(num_samples=0)), "rank.judge.num_samples=0: must be at least 1"),
        (RankerConfig(tokens_per_batch=0), "rank.tokens_per_batch=0: give a positive number or None"),
        (RankerConfig(max_length=0), "rank.max_length=0: give a positive number or None"),
    ],
)
def test_settings_that_make_no_sense_are_named(config: RankerConfig, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check_ranker(config)


def test_every_ranker_needs_a_model_and_only_a_judge_may_be_the_policy() -> None:
    check_models(RankerConfig("judge", "policy"))
    check_models(ENSEMBLE)
    with pytest.raises(RecipeError, match=r"rank\.model_name_or_path is not set"):
        check_models(RankerConfig())
    with pytest.raises(RecipeError, match=r"of rank's ranker\.pairrm is not set"):
        check_models(replace(ENSEMBLE, members=(MemberConfig(), PAIR[1])))
    with pytest.raises(RecipeError, match="'policy': a policy can be a judge or pairwise_judge, not a pairrm"):
        check_models(RankerConfig("pairrm", "policy"))


def test_a_model_is_an_input_named_after_its_ranker() -> None:
    assert set(models(RankerConfig("pairrm", "a"))) == {"ranker"}
    named = replace(ENSEMBLE, members=(*PAIR, MemberConfig("judge", "b", name="second")))
    assert {name: each.model_name_or_path for name, each in models(named).items()} == {
        "ranker.pairrm": "a",
        "ranker.judge": "policy",
        "ranker.second": "b",
    }


def test_where_a_model_lies_and_what_a_ranker_does_not_read_is_no_content() -> None:
    asked = JudgeConfig(temperature=0.1)

    def same(one: RankerConfig, other: RankerConfig) -> bool:
        return bool(content(without_models(one)) == content(without_models(other)))

    assert same(RankerConfig("pairrm", "a"), RankerConfig("pairrm", "b", revision="c", judge=asked, combine="majority"))
    assert not same(RankerConfig("judge"), RankerConfig("judge", judge=asked))
    assert not same(ENSEMBLE, replace(ENSEMBLE, combine="majority"))
    assert not same(ENSEMBLE, replace(ENSEMBLE, members=(PAIR[0], replace(PAIR[1], judge=asked))))
    assert same(ENSEMBLE, replace(ENSEMBLE, members=(replace(PAIR[0], model_name_or_path="z"), PAIR[1])))


def test_settings_with_members_survive_json() -> None:
    assert from_plain(RankerConfig, everything(ENSEMBLE)) == ENSEMBLE


# Batches


def test_batches_hold_at_most_so_many_tokens_with_padding_longest_first() -> None:
    lengths = [3, 9, 5, 5, 1, 12]
    batches = list(token_batches(lengths, 12))
    assert batches == [[5], [1], [2, 3], [0, 4]]
    assert list(token_batches(lengths, 1)) == [[5], [1], [2], [3], [0], [4]]
    assert list(token_batches(lengths, 1000)) == [[5, 1, 2, 3, 0, 4]]
    assert list(token_batches([], 5)) == []


# Texts that are too long


@pytest.mark.parametrize(
    ("lengths", "room", "expected"),
    [([5, 5], 20, 5), ([10, 2], 8, 6), ([10, 10], 9, 4), ([10, 10, 1], 9, 4), ([3], 0, 0), ([3], -2, -2), ([], 3, 0)],
)
def test_room_is_shared_and_who_needs_less_leaves_it_to_the_others(
    lengths: list[int], room: int, expected: int
) -> None:
    assert share(lengths, room) == expected


def test_the_longest_texts_are_cut_until_the_conversation_fits(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer_folder(tmp_path)))

    def encode(texts: Sequence[str]) -> list[int]:
        return prompt_ids(tokenizer, [Message("user", f"compare {texts[0]} with {texts[1]} now")])

    short, long = "a red fish", "what is rain and snow " * 30
    whole = fit(tokenizer, encode, [short, short], 1000)
    assert whole == (encode([short, short]), (False, False))
    for limit in (30, 40, 57, 90):
        fitted = fit(tokenizer, encode, [short, long], limit)
        assert fitted is not None
        ids, cut = fitted
        assert cut == (False, True)
        assert limit - 3 <= len(ids) <= limit
        assert tokenizer.decode(ids).endswith("now</s>\n<|assistant|>\n")
    for odd in ("\N{GRINNING FACE}" * 200, "\N{SNOWMAN} " * 200):
        fitted = fit(tokenizer, encode, [odd, odd], 60)
        assert fitted is not None and len(fitted[0]) <= 60 and fitted[1] == (True, True)
    assert fit(tokenizer, encode, [short, long], len(encode(["", ""])) - 2) is None


# Ensembles


def test_ranks_in_the_middle_are_shared_by_those_who_tie() -> None:
    assert middle_ranks([3.0, 1.0, 2.0]) == [1, 3, 2]
    assert middle_ranks([1.0, 1.0, 5.0, 1.0]) == [3, 3, 1, 3]


def test_the_rank_average_is_the_mean_of_the_members_ranks() -> None:
    # Ranks: 1 2 3, 2 1 3, 1.5 1.5 3; means: 1.5, 1.5, 3; the middle is 2.
    assert rank_average([[9, 5, 1], [0.1, 0.2, 0.0], [7, 7, 6]]) == [0.5, 0.5, -1.0]


def test_the_majority_decides_pair_by_pair() -> None:
    # First over second: 1 of 3 against 2; first over third: 2 to 1; second over third: 1 to 0, two tie them.
    assert majority([[3, 2, 2], [1, 2, 2], [2, 3, 1]]) == [0.5, 1.0, 0.0]
    assert majority([[1, 0], [0, 1]]) == [0.5, 0.5]
    assert majority([[4.0]]) == [0.5]


class Fixed:
    """Says what it was made to say."""

    def __init__(self, prompts_per_call: int, *rankings: Ranking) -> None:
        self.prompts_per_call = prompts_per_call
        self._rankings = rankings

    def rank(self, rows: Sequence[Responses]) -> list[Ranking]:
        return list(self._rankings)


def said(*scores: float, truncated: bool = False) -> Ranking:
    return Ranking(scores, ranks_of(scores), (truncated,) * len(scores))


def test_an_ensemble_keeps_what_each_member_said_and_reports_a_member_that_failed() -> None:
    rows = from_texts(["p", "q"], [["a", "b"], ["a", "b"]])
    one, two = Fixed(16, said(2, 1), said(2, 1)), Fixed(64, said(0.1, 0.7, truncated=True), failed("no"))
    three = Fixed(8, said(-5, -9), said(0, 1))
    ensemble = Ensemble({"one": one, "two": two, "three": three}, "majority")
    assert ensemble.prompts_per_call == 64
    good, bad = ensemble.rank(rows)
    assert (good.scores, good.ranks, good.truncated) == ((1.0, 0.0), (1, 2), (True, True))
    assert {name: each.scores for name, each in good.members.items()} == {
        "one": (2, 1),
        "two": (0.1, 0.7),
        "three": (-5, -9),
    }
    assert bad.error == "two: no"
    assert bad.members["three"].scores == (0, 1)
