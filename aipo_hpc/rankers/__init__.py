"""Rankers order the candidates of a prompt. One file each; this is what they have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Ranking:
    """The verdict on one prompt's candidates, in their order.

    ``scores``: higher is better. ``ranks``: 1 + the number of strictly better scores, so ties share the better rank.
    ``truncated``: the ranker did not see all of that candidate. ``error``: why this prompt could not be ranked
    (then scores and ranks are empty).
    """

    scores: tuple[float, ...]
    ranks: tuple[int, ...]
    truncated: tuple[bool, ...]
    error: str | None = None


class Ranker(Protocol):
    """Ranks a batch of prompts; the verdict on a prompt does not depend on what else is in the batch."""

    def rank(self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[Ranking]:
        """Return one ranking per prompt. A bad prompt gets a Ranking with an error, never an exception."""
        ...
