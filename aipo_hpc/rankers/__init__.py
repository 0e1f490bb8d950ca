"""Rankers order the candidates of a prompt. One file each; this is what they have in common."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from aipo_hpc.errors import RecipeError

NO_CANDIDATES = "there are no candidates to rank"
NOT_FINITE = "the ranker returned a score that is not finite"
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


class Ranker(Protocol):
    """Ranks a batch of prompts; the verdict on a prompt does not depend on what else is in the batch."""

    def rank(self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[Ranking]:
        """Return one ranking per prompt. A bad prompt gets a Ranking with an error, never an exception."""
        ...


def load_ranker(
    name: str,
    model_name_or_path: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    tokens_per_batch: int | None = None,
) -> Ranker:
    """Load the ranker called ``name`` from a folder or the model hub; see ``PairRM.load`` for the other arguments.

    Raises:
        RecipeError: no ranker of that name, or the package it needs is not installed.
        DataError: the checkpoint cannot be used.
    """
    check_ranker(name)
    load = _RANKERS[name]
    return load(model_name_or_path, revision=revision, dtype=dtype, tokens_per_batch=tokens_per_batch)


def check_ranker(name: str) -> None:
    """Make sure that there is a ranker called ``name``, without importing it; raises RecipeError."""
    if name not in _RANKERS:
        close = difflib.get_close_matches(name, _RANKERS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise RecipeError(f"unknown ranker {name!r}; {hint}known: {', '.join(_RANKERS)}")


class _Load(Protocol):
    def __call__(
        self, model_name_or_path: str, *, revision: str | None, dtype: str, tokens_per_batch: int | None
    ) -> Ranker: ...


def _pairrm(model_name_or_path: str, *, revision: str | None, dtype: str, tokens_per_batch: int | None) -> Ranker:
    from aipo_hpc.rankers.pairrm import PairRM

    return PairRM.load(model_name_or_path, revision=revision, dtype=dtype, tokens_per_batch=tokens_per_batch)


def _llm_blender(model_name_or_path: str, *, revision: str | None, dtype: str, tokens_per_batch: int | None) -> Ranker:
    from aipo_hpc.rankers.llm_blender import LLMBlender

    return LLMBlender.load(model_name_or_path, revision=revision, dtype=dtype)


_RANKERS: dict[str, _Load] = {"pairrm": _pairrm, "llm_blender": _llm_blender}
