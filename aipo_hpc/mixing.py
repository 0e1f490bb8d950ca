"""Pairs from elsewhere put beside an iteration's own: how many and which, and what they are called. Pure functions."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from aipo_hpc.rows import Pair
from aipo_hpc.seeds import derived_seed

KEEPS = ("random", "keep_start", "keep_end")

Item = TypeVar("Item")


def take(items: Sequence[Item], ratio: float, keep: str, seed: int | str) -> list[Item]:
    """That share of the items, rounded, in their order: a random part of them, the first or the last ones."""
    number = math.floor(ratio * len(items) + 0.5)
    if keep == "keep_start":
        return list(items[:number])
    if keep == "keep_end":
        return list(items[len(items) - number :])
    drawn = sorted(range(len(items)), key=lambda position: (derived_seed(seed, position), position))[:number]
    return [items[position] for position in sorted(drawn)]


def renamed(pair: Pair, source: str) -> Pair:
    """A pair of another iteration, under an id that no pair of this one has."""
    return replace(pair, prompt_id=f"{pair.prompt_id}@{source}", source=source)
