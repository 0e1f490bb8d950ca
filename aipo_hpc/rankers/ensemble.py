"""Several rankers that decide together; what each of them says is kept.

rank_average   score = (n + 1) / 2 - mean over the members of the candidate's rank among n, ties sharing the middle rank
majority       score = mean over the other candidates of 1, 0.5 or 0: most members prefer it, as many as not, fewer

Both look at the order of each member's scores alone, since scores of different rankers have no common scale. A prompt that
one member cannot rank is one that the ensemble cannot rank: prompts would otherwise be judged by different rankers.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from aipo_hpc.rankers import Ranker, Ranking, failed, ranks_of
from aipo_hpc.rows import Responses


class Ensemble:
    """Named rankers, all of them loaded."""

    def __init__(self, members: Mapping[str, Ranker], combine: str) -> None:
        self._members = members
        self._combine = {"rank_average": rank_average, "majority": majority}[combine]
        self.prompts_per_call = max(member.prompts_per_call for member in members.values())

    def rank(self, rows: Sequence[Responses]) -> list[Ranking]:
        """Let every member rank all rows, and combine prompt by prompt."""
        said = {name: member.rank(rows) for name, member in self._members.items()}
        return [
            self._decide({name: rankings[number] for name, rankings in said.items()}) for number in range(len(rows))
        ]

    def _decide(self, members: Mapping[str, Ranking]) -> Ranking:
        for name, ranking in members.items():
            if ranking.error is not None:
                return failed(f"{name}: {ranking.error}", members=members)
        scores = self._combine([ranking.scores for ranking in members.values()])
        return Ranking(
            tuple(scores),
            ranks_of(scores),
            tuple(map(any, zip(*(ranking.truncated for ranking in members.values()), strict=True))),
            prompt_truncated=any(ranking.prompt_truncated for ranking in members.values()),
            members=members,
        )


def rank_average(scores: Sequence[Sequence[float]]) -> list[float]:
    """Combine the members' scores by mean rank, turned so that higher is better and the scores of a prompt add up to 0."""
    middle = (len(scores[0]) + 1) / 2
    ranks = [middle_ranks(each) for each in scores]
    return [middle - fmean(each[position] for each in ranks) for position in range(len(scores[0]))]


def middle_ranks(scores: Sequence[float]) -> list[float]:
    """Ranks from 1, the best; those who tie share the mean of the ranks that they take."""
    return [
        1 + sum(other > score for other in scores) + (sum(other == score for other in scores) - 1) / 2
        for score in scores
    ]


def majority(scores: Sequence[Sequence[float]]) -> list[float]:
    """Combine the members' scores by their votes on each pair of candidates; a member that ties two does not vote."""
    number = len(scores[0])

    def points(i: int, j: int) -> float:
        votes = sum((each[i] > each[j]) - (each[i] < each[j]) for each in scores)
        return 1.0 if votes > 0 else 0.5 if votes == 0 else 0.0

    if number == 1:
        return [0.5]
    return [fmean(points(i, j) for j in range(number) if j != i) for i in range(number)]
