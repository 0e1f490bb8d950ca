"""Language models as judges: what is read from replies, how it is averaged, and a real model that is asked."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from aipo_hpc.engines import Completion, Request
from aipo_hpc.rankers import NO_CANDIDATES, TOO_LONG, UNPARSABLE, from_texts, judge, load_ranker, pairwise_judge
from aipo_hpc.rankers.config import JudgeConfig, RankerConfig
from aipo_hpc.rankers.replies import Asker, conversation
from aipo_hpc.rows import Message

ROWS = from_texts(["why is snow white", "name a fish"], [["it is cold", "light", "it is cold"], ["a red fish", "no"]])
CONFIG = JudgeConfig(engine="transformers", dtype="float32", num_samples=2, max_tokens=8, max_prompt_tokens=1500)


# Points


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Fine.\nScore: 4", 4),
        ("score: 3.5", 3.5),
        ("**Score:** 5", 5),
        ("Score: 4/5", 4),
        ("Score: <2>", 2),
        ("Score (out of 5): 3", 3),
        ("SCORE = 0 points", 0),
        ("Score: 1 for the first criterion, so in the end\nScore: 2.", 2),
        ("The final score is 4.", 4),
        ("Score: 6", None),
        ("Score: -1", None),
        ("Score: 45", None),
        ("Score: 4/10", None),
        ("Score: four", None),
        ("4", None),
        ("Underscore 3", None),
        ("", None),
    ],
)
def test_the_last_score_of_a_reply_counts_if_it_is_from_0_to_5(reply: str, score: float | None) -> None:
    assert judge.parse(reply) == score


def test_a_candidates_score_is_the_mean_of_its_readable_replies() -> None:
    texts = ["good", "bad", "good"]
    ranking = judge.average(texts, {"good": [4.0, None, 5.0], "bad": [1.0, 1.0, 2.5]}, {"good": False, "bad": True})
    assert ranking.scores == (4.5, 1.5, 4.5)
    assert ranking.ranks == (1, 3, 1)
    assert ranking.truncated == (False, True, False)
    assert (ranking.replies, ranking.unparsable) == (6, 1)


def test_a_candidate_without_a_readable_reply_leaves_its_prompt_unranked() -> None:
    ranking = judge.average(["a", "b"], {"a": [4.0, 5.0], "b": [None, None]}, {"a": False, "b": False})
    assert (ranking.error, ranking.scores, ranking.replies, ranking.unparsable) == (UNPARSABLE, (), 4, 2)


def test_braces_in_a_text_are_put_as_they_are() -> None:
    put = judge.RUBRIC.format(request="{x}", response="{response} {0}")
    assert "<request>\n{x}\n</request>" in put and "<response>\n{response} {0}\n</response>" in put


def test_a_conversation_of_several_turns_names_who_speaks() -> None:
    assert conversation([Message("user", "hi")]) == "hi"
    assert conversation([Message("system", "be kind"), Message("user", "hi")]) == "[system]\nbe kind\n\n[user]\nhi"


# Pairs


@pytest.mark.parametrize(
    ("reply", "side"),
    [
        ("Verdict: A", "A"),
        ("I first thought Verdict: A.\nVerdict: B", "B"),
        ("**Verdict:** [[B]]", "B"),
        ("verdict: Response A", "A"),
        ("Verdict: tie", "tie"),
        ("Verdict: a Tie", "tie"),
        ("Verdict: Both", None),
        ("A", None),
        ("", None),
    ],
)
def test_the_last_verdict_of_a_reply_counts(reply: str, side: str | None) -> None:
    assert pairwise_judge.parse(reply) == side


def test_one_wins_that_wins_in_both_places() -> None:
    settle = pairwise_judge.settle
    assert (settle("A", "B"), settle("B", "A"), settle("tie", "tie")) == (1, -1, 0)
    assert settle("A", "A") == settle("B", "B") == settle("A", "tie") == settle("tie", "A") == 0
    assert settle(None, "A") is settle("A", None) is None


def test_scores_are_the_mean_over_the_others_of_win_tie_and_loss() -> None:
    verdicts = {
        (0, 1): ["A", "A"], (1, 0): ["B", "B"],  # 0 beats 1 twice
        (0, 2): ["A", "A"], (2, 0): ["A", "B"],  # whoever comes first, then 0 wins: 3 / 4
        (1, 2): ["tie", "A"], (2, 1): ["tie", None],  # a tie, and one that cannot be read
    }  # fmt: skip
    ranking = pairwise_judge.tally([0, 1, 2], verdicts, (False,) * 3)  # type: ignore[arg-type]
    assert ranking.scores == ((1 + 0.75) / 2, (0 + 0.5) / 2, (0.25 + 0.5) / 2)
    assert ranking.ranks == (1, 3, 2)
    assert (ranking.replies, ranking.unparsable, ranking.ties, ranking.contradictions) == (12, 1, 1, 1)


def test_equal_candidates_tie_and_an_unreadable_pair_counts_for_neither() -> None:
    verdicts = {(0, 1): ["A"], (1, 0): ["B"], (0, 2): ["A"], (2, 0): [None], (1, 2): [None], (2, 1): [None]}
    ranking = pairwise_judge.tally([0, 1, 0], {key: verdicts[key] for key in ((0, 1), (1, 0))}, (False,) * 3)  # type: ignore[arg-type]
    assert ranking.scores == ((1 + 0.5) / 2, 0.0, (1 + 0.5) / 2)
    nothing = pairwise_judge.tally([0, 1, 2], verdicts, (False,) * 3)  # type: ignore[arg-type]
    assert (nothing.error, nothing.unparsable) == (UNPARSABLE, 3)
    assert pairwise_judge.tally([0], {}, (False,)).scores == (0.5,)
    assert pairwise_judge.tally([0, 0], {}, (False, False)).ranks == (1, 1)


# A real model


def asker(model: Path, **changes: object) -> Asker:
    return Asker(replace(CONFIG, **changes), str(model), seed=3)  # type: ignore[arg-type]


def test_each_reply_has_a_seed_of_its_own_that_says_what_it_is_for(tiny_model: Path) -> None:
    asked: list[Request] = []
    one = asker(tiny_model)
    generate = one._engine.generate

    def spy(requests: Sequence[Sequence[Request]]) -> Iterator[Completion]:
        asked.extend(request for prompt in requests for request in prompt)
        return generate(requests)

    one._engine.generate = spy  # type: ignore[method-assign]
    judge.Judge(one).rank(ROWS)
    assert len(asked) == 2 * 4, "equal candidates are judged once"
    first = [request.seed for request in asked]
    assert len(set(first)) == 8
    judge.Judge(one).rank(ROWS[::-1])
    assert Counter(request.seed for request in asked[8:]) == Counter(first), "not on the order of prompts"
    other = Asker(CONFIG, str(tiny_model), seed=4)
    question = other.question("0", "0", lambda texts: texts[0], ["x"])
    assert not isinstance(question, str)
    assert other._seed_of(question, 0) not in first


def test_replies_do_not_depend_on_the_other_questions(tiny_model: Path) -> None:
    one = asker(tiny_model)
    texts = ["what is rain", "explain snow and fire", "x"]
    questions = [one.question("p", str(n), lambda texts: texts[0], [text]) for n, text in enumerate(texts)]
    together = one.replies(questions)  # type: ignore[arg-type]
    assert [one.replies([question])[0] for question in questions] == together  # type: ignore[list-item]
    assert len({reply for each in together for reply in each}) > 3
    assert one.replies([]) == []


def test_greedy_replies_are_asked_for_once(tiny_model: Path) -> None:
    one = asker(tiny_model, temperature=0.0, num_samples=5)
    question = one.question("p", "0", lambda texts: texts[0], ["x"])
    assert [len(each) for each in one.replies([question])] == [1]  # type: ignore[list-item]


def test_a_random_model_judges_without_sense_and_without_harm(tiny_model: Path) -> None:
    for name, replies in (("judge", 8), ("pairwise_judge", 8)):
        ranker = load_ranker(RankerConfig(name, judge=CONFIG), {"ranker": str(tiny_model)})
        rankings = ranker.rank([*ROWS, *from_texts(["none", "why " * 2000], [[], ["a", "b"]])])
        assert [ranking.error for ranking in rankings] == [UNPARSABLE, UNPARSABLE, NO_CANDIDATES, TOO_LONG]
        assert sum(ranking.replies for ranking in rankings) == replies
        assert sum(ranking.unparsable for ranking in rankings) == replies


def test_what_a_model_says_becomes_scores(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model's replies, read as if it spoke of points: by the number of letters in them."""
    monkeypatch.setattr(judge, "parse", lambda reply: float(len(reply) % 6))
    one = asker(tiny_model)
    rankings = judge.Judge(one).rank(ROWS)
    again = judge.Judge(asker(tiny_model)).rank(ROWS)
    assert rankings == again
    assert rankings[0].scores[0] == rankings[0].scores[2]
    sides = {0: "A", 1: "B", 2: "tie"}
    monkeypatch.setattr(pairwise_judge, "parse", lambda reply: sides[len(reply) % 3])
    pairs = pairwise_judge.PairwiseJudge(one).rank(ROWS)
    assert all(
        ranking.error is None and len(ranking.scores) == len(row.candidates)
        for ranking, row in zip(pairs, ROWS, strict=True)
    )


def test_a_long_response_is_cut_and_said_to_be(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "parse", lambda reply: 1.0)
    monkeypatch.setattr(judge, "RUBRIC", "judge {request} {response} now")
    one = asker(tiny_model, max_prompt_tokens=60)
    (ranking,) = judge.Judge(one).rank(from_texts(["why"], [["short", "snow and rain " * 100]]))
    assert ranking.truncated == (False, True)
    monkeypatch.setattr(pairwise_judge, "parse", lambda reply: "tie")
    monkeypatch.setattr(pairwise_judge, "PROMPT", "compare {request} {first} {second} now")
    (pair,) = pairwise_judge.PairwiseJudge(one).rank(from_texts(["why"], [["short", "snow and rain " * 100]]))
    assert (pair.truncated, pair.ties) == ((False, True), 1)
