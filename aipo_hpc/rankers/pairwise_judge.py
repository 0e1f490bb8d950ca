"""A language model as a judge between two responses, asked in both orders, since judges favour a position.

Every pair of different candidates is judged twice, places swapped (Zheng et al. 2023, arXiv 2306.05685), ``num_samples``
times. One that wins in both orders wins, anything else is a tie; a candidate's score is the mean over the others of 1 for a
win, 0.5 for a tie and 0 for a loss. A pair of which no reply can be read counts for neither.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Literal

from aipo_hpc.rankers import NO_CANDIDATES, UNPARSABLE, Ranking, failed, ranks_of
from aipo_hpc.rankers.config import SingleConfig
from aipo_hpc.rankers.replies import Asker, Question, conversation
from aipo_hpc.rows import Responses

PROMPT = """\
Two assistants answered the same request. Decide which response serves the user better: is it correct, does it do what was \
asked, is it clear and complete? A longer response is not better for its length, nor is one better for coming first.

<request>
{request}
</request>

<response A>
{first}
</response A>

<response B>
{second}
</response B>

Compare them in at most 100 words. Then end with one line that says nothing but "Verdict: A", "Verdict: B" or, if neither is \
better, "Verdict: tie"."""

Side = Literal["A", "B", "tie"]
_VERDICT = re.compile(r"(?i:verdict)\W{0,10}(?:(?i:response|answer|assistant|a)\s+)?(A|B|(?i:tie))\b")


def load(config: SingleConfig, model: str, seed: int) -> "PairwiseJudge":
    """Load the judge that the settings name."""
    return PairwiseJudge(Asker(config.judge, model, config.revision, seed))


@dataclass(frozen=True)
class Asked:
    """The questions about one prompt: for each two of its different texts, which comes first as A and which as B."""

    texts: list[str]
    questions: dict[tuple[int, int], Question]


class PairwiseJudge:
    """Compares all pairs of candidates; equal ones tie without being asked about."""

    prompts_per_call = 64

    def __init__(self, asker: Asker) -> None:
        self._asker = asker

    def rank(self, rows: Sequence[Responses]) -> list[Ranking]:
        """Compare each prompt's candidates; a prompt that cannot be ranked gets a Ranking with an error."""
        asked = [self._ask(row) for row in rows]
        questions = [question for each in asked if not isinstance(each, str) for question in each.questions.values()]
        replies = iter(self._asker.replies(questions))
        rankings = []
        for row, each in zip(rows, asked, strict=True):
            if isinstance(each, str):
                rankings.append(failed(each))
                continue
            verdicts = {pair: [parse(reply) for reply in next(replies)] for pair in each.questions}
            which = [each.texts.index(candidate.response) for candidate in row.candidates]
            rankings.append(tally(which, verdicts, cut(each, which)))
        return rankings

    def _ask(self, row: Responses) -> Asked | str:
        if not row.candidates:
            return NO_CANDIDATES
        texts = list(dict.fromkeys(candidate.response for candidate in row.candidates))
        request = conversation(row.messages)
        questions: dict[tuple[int, int], Question] = {}
        for i, j in combinations(range(len(texts)), 2):
            for first, second in ((i, j), (j, i)):
                question = self._asker.question(
                    row.prompt_id,
                    f"{first}-{second}",
                    lambda two: PROMPT.format(request=request, first=two[0], second=two[1]),
                    [texts[first], texts[second]],
                )
                if isinstance(question, str):
                    return question
                questions[first, second] = question
        return Asked(texts, questions)


def parse(reply: str) -> Side | None:
    """The verdict that a reply ends with, or None if there is none."""
    found = _VERDICT.findall(reply)
    if not found:
        return None
    return "A" if found[-1] == "A" else "B" if found[-1] == "B" else "tie"


def settle(first: Side | None, swapped: Side | None) -> float | None:
    """By how much one wins that is A in the first verdict and B in the swapped one: 1, 0, -1; None if one is unreadable."""
    if first is None or swapped is None:
        return None
    one = {"A": 1.0, "B": -1.0, "tie": 0.0}[first]
    two = {"A": -1.0, "B": 1.0, "tie": 0.0}[swapped]
    return one if one == two else 0.0


def cut(asked: Asked, which: Sequence[int]) -> tuple[bool, ...]:
    """Which candidates were cut in any of the questions."""
    seen = {text: False for text in range(len(asked.texts))}
    for pair, question in asked.questions.items():
        for text, truncated in zip(pair, question.truncated, strict=True):
            seen[text] |= truncated
    return tuple(seen[text] for text in which)


def tally(
    which: Sequence[int], verdicts: Mapping[tuple[int, int], Sequence[Side | None]], truncated: tuple[bool, ...]
) -> Ranking:
    """The ranking that verdicts make. ``which``: for each candidate its text; ``verdicts[i, j]``: with text i as A, j as B."""
    replies = [verdict for each in verdicts.values() for verdict in each]
    unparsable = sum(verdict is None for verdict in replies)
    points: dict[tuple[int, int], float] = {}
    ties = contradictions = 0
    for (i, j), first in verdicts.items():
        if i > j:
            continue
        both = list(zip(first, verdicts[j, i], strict=True))
        contradictions += sum(one == two and one in ("A", "B") for one, two in both)
        settled = [value for one, two in both if (value := settle(one, two)) is not None]
        if not settled:
            continue
        ties += sum(settled) == 0
        points[i, j] = (fmean(settled) + 1) / 2
        points[j, i] = 1 - points[i, j]
    scores = []
    for position, text in enumerate(which):
        others = [other for place, other in enumerate(which) if place != position]
        against = [0.5 if other == text else points.get((text, other)) for other in others]
        known = [value for value in against if value is not None]
        if others and not known:
            return failed(
                UNPARSABLE, replies=len(replies), unparsable=unparsable, ties=ties, contradictions=contradictions
            )
        scores.append(fmean(known) if known else 0.5)
    return Ranking(
        tuple(scores),
        ranks_of(scores),
        truncated,
        replies=len(replies),
        unparsable=unparsable,
        ties=ties,
        contradictions=contradictions,
    )
