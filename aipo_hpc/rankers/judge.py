"""A language model as a judge that gives points: 0 to 5, added up from five criteria, averaged over several replies.

The additive scale is that of Self-Rewarding Language Models (Yuan et al. 2024, arXiv 2401.10020), in words of our own. With
the policy as the model it judges itself. A reply without a readable score counts as unparsable; a candidate none of whose
replies can be read makes its prompt one that could not be ranked.
"""

import re
from collections.abc import Sequence
from statistics import fmean

from aipo_hpc.rankers import NO_CANDIDATES, UNPARSABLE, Ranking, failed, ranks_of
from aipo_hpc.rankers.config import SingleConfig
from aipo_hpc.rankers.replies import Asker, Question, conversation
from aipo_hpc.rows import Responses

RUBRIC = """\
Judge how well a response answers a user. It starts with 0 points and earns up to 5, one for each of these that holds:
1. It has to do with the request and says something of use about it, even if incomplete or partly beside the point.
2. It covers a good part of what was asked, even if it does not settle it.
3. It answers the essential parts of the request in a way that helps the user.
4. It is written from an assistant's point of view, to the user, complete, well ordered and easy to follow.
5. It is made for exactly this request, shows expert knowledge, and has nothing that is superfluous.

<request>
{request}
</request>

<response>
{response}
</response>

Explain your judgement in at most 100 words. Then end with one line that says nothing but "Score: " and the sum of the \
points, a whole number from 0 to 5."""
HIGHEST = 5.0

_SCORE = re.compile(
    r"\bscore\b(?:\s*\([^)\n]*\))?[^0-9\n]{0,12}?(-?\d+(?:\.\d+)?)(?!\d|\.\d|\s*/\s*(?!5\b)\d)", re.IGNORECASE
)


def load(config: SingleConfig, model: str, seed: int) -> "Judge":
    """Load the judge that the settings name."""
    return Judge(Asker(config.judge, model, config.revision, seed))


class Judge:
    """Scores candidates one by one; equal ones are judged once."""

    prompts_per_call = 256

    def __init__(self, asker: Asker) -> None:
        self._asker = asker

    def rank(self, rows: Sequence[Responses]) -> list[Ranking]:
        """Score each candidate; a prompt that cannot be ranked gets a Ranking with an error."""
        asked = [self._ask(row) for row in rows]
        questions = [question for each in asked if not isinstance(each, str) for question in each.values()]
        replies = iter(self._asker.replies(questions))
        rankings = []
        for row, each in zip(rows, asked, strict=True):
            if isinstance(each, str):
                rankings.append(failed(each))
                continue
            texts = [candidate.response for candidate in row.candidates]
            scores = {text: [parse(reply) for reply in next(replies)] for text in each}
            cut = {text: question.truncated[0] for text, question in each.items()}
            rankings.append(average(texts, scores, cut))
        return rankings

    def _ask(self, row: Responses) -> dict[str, Question] | str:
        """A question for each different response, or why the prompt cannot be judged."""
        if not row.candidates:
            return NO_CANDIDATES
        questions: dict[str, Question] = {}
        for number, candidate in enumerate(row.candidates):
            if candidate.response in questions:
                continue
            request = conversation(row.messages)
            question = self._asker.question(
                row.prompt_id,
                str(number),
                lambda texts, request=request: RUBRIC.format(request=request, response=texts[0]),  # type: ignore[misc]
                [candidate.response],
            )
            if isinstance(question, str):
                return question
            questions[candidate.response] = question
        return questions


def parse(reply: str) -> float | None:
    """The score that a reply ends with, or None: there is none, or none from 0 to 5."""
    found = _SCORE.findall(reply)
    score = float(found[-1]) if found else -1.0
    return score if 0 <= score <= HIGHEST else None


def average(texts: Sequence[str], scores: dict[str, list[float | None]], cut: dict[str, bool]) -> Ranking:
    """The ranking by the mean of each text's readable scores."""
    replies = sum(map(len, scores.values()))
    readable = {text: [score for score in each if score is not None] for text, each in scores.items()}
    unparsable = replies - sum(map(len, readable.values()))
    if not all(readable.values()):
        return failed(UNPARSABLE, replies=replies, unparsable=unparsable)
    means = tuple(fmean(readable[text]) for text in texts)
    truncated = tuple(cut[text] for text in texts)
    return Ranking(means, ranks_of(means), truncated, replies=replies, unparsable=unparsable)
