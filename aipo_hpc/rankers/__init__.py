"""Rankers order the candidates of a prompt. One file each, a line each in ``config.RANKERS``; this is what they have in common.

A ranker's file has ``load(config: SingleConfig, model: str, seed: int) -> Ranker``. An ensemble is made of such rankers.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from aipo_hpc.rankers.config import ENSEMBLE, RANKERS, RankerConfig, SingleConfig, check_ranker
from aipo_hpc.rows import Candidate, Message, Responses

NO_CANDIDATES = "there are no candidates to rank"
NOT_FINITE = "the ranker returned a score that is not finite"
UNPARSABLE = "no reply of the judge could be read"
TOO_LONG = "the conversation alone is longer than the ranker reads"
"""What ``Ranking.error`` says of a prompt that every ranker treats alike."""


@dataclass(frozen=True)
class Ranking:
    """The verdict on one prompt's candidates, in their order.

    ``scores``: higher is better. ``ranks``: 1 + the number of strictly better scores, so ties share the better rank.
    ``truncated``: the ranker did not see all of that candidate. ``error``: why this prompt could not be ranked
    (then scores and ranks are empty). ``prompt_truncated``: the ranker did not see all of the prompt.
    """

    scores: tuple[float, ...]
    ranks: tuple[int, ...]
    truncated: tuple[bool, ...]
    error: str | None = None
    prompt_truncated: bool = False
    replies: int = 0
    """Of a judge: replies that were sampled."""
    unparsable: int = 0
    """... of which no verdict could be read."""
    ties: int = 0
    """Of a pairwise judge: pairs of candidates that came out equal."""
    contradictions: int = 0
    """... replies that changed sides when the two candidates changed places."""
    members: Mapping[str, "Ranking"] = field(default_factory=dict)
    """Of an ensemble: what each member says."""


class Ranker(Protocol):
    """Ranks prompts; the verdict on a prompt does not depend on what else is asked, but for floating-point noise."""

    prompts_per_call: int
    """Prompts that it is best given at once: enough to keep it busy, few enough to lose little to a kill."""

    def rank(self, rows: Sequence[Responses]) -> list[Ranking]:
        """Return one ranking per row. A bad prompt gets a Ranking with an error, never an exception."""
        ...


def failed(error: str, **known: Any) -> Ranking:
    """The ranking of a prompt that could not be ranked."""
    return Ranking((), (), (), error=error, **known)


def ranks_of(scores: Sequence[float]) -> tuple[int, ...]:
    """1 + the number of strictly better scores, for each."""
    return tuple(1 + sum(other > score for other in scores) for score in scores)


def from_texts(prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[Responses]:
    """Bare prompts and answers as rows to rank, for those who have no more than the texts."""
    return [
        Responses(str(number), prompt, [Message("user", prompt)], [Candidate(text, "stop", 0) for text in texts])
        for number, (prompt, texts) in enumerate(zip(prompts, candidates, strict=True))
    ]


def load_ranker(config: RankerConfig, models: Mapping[str, str], seed: int = 0) -> Ranker:
    """Load the ranker that ``config`` names; ``models`` maps the names of ``config.models`` to folders or ids on the hub.

    Raises:
        RecipeError: an unknown ranker, or the package it needs is not installed.
        DataError: the model cannot be used.
    """
    check_ranker(config)
    if config.ranker != ENSEMBLE:
        return _load(config, models["ranker"], seed)
    from aipo_hpc.rankers.ensemble import Ensemble

    loaded = {member.label: _load(member, models[f"ranker.{member.label}"], seed) for member in config.members}
    return Ensemble(loaded, config.combine)


def _load(config: SingleConfig, model: str, seed: int) -> Ranker:
    ranker: Ranker = importlib.import_module(RANKERS[config.ranker].module).load(config, model, seed)
    return ranker
