"""Which pairs are unfit for training, and why: pure functions of a pair, or of all of them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from aipo_hpc.rows import Pair

_URL = re.compile(r"https?://|www\.\w", re.IGNORECASE)


@dataclass(frozen=True)
class Filters:
    """What makes a pair unfit. See ``PairsConfig``, which extends this."""

    max_prompt_tokens: int = 512
    """Longest prompt in tokens, chat template included."""
    max_response_tokens: int = 2016
    """Longest response in tokens (the paper: max_length - max_prompt_length - 32 = 2560 - 512 - 32)."""
    drop_url_in_chosen: bool = True
    """Drop pairs whose chosen response has a URL."""
    drop_url_in_rejected: bool = False
    """Drop pairs whose rejected response has a URL."""
    drop_truncated_chosen: bool = False
    """Drop pairs whose chosen response was cut off at generate.max_tokens."""
    drop_truncated_rejected: bool = False
    """Drop pairs whose rejected response was cut off at generate.max_tokens."""
    max_similarity: float = 1.0
    """Drop pairs of responses that are more alike than this, from 0 to 1: twice the words in common over all words."""
    min_margin: float = 0.0
    """Drop pairs whose scores differ by less."""
    min_margin_quantile: float = 0.0
    """Drop this share of the pairs that are left, those whose scores differ least."""


def unfit(pair: Pair, filters: Filters) -> str | None:
    """The reason to drop a pair by its texts, response lengths and scores, or None."""
    chosen, rejected = pair.chosen, pair.rejected
    if not chosen.response.strip():
        return "empty_chosen"
    if max(chosen.num_tokens, rejected.num_tokens) > filters.max_response_tokens:
        return "response_too_long"
    if filters.drop_truncated_chosen and chosen.finish_reason == "length":
        return "truncated_chosen"
    if filters.drop_truncated_rejected and rejected.finish_reason == "length":
        return "truncated_rejected"
    if filters.drop_url_in_chosen and _URL.search(chosen.response):
        return "url_in_chosen"
    if filters.drop_url_in_rejected and _URL.search(rejected.response):
        return "url_in_rejected"
    if pair.chosen_score - pair.rejected_score < filters.min_margin:
        return "small_margin"
    if filters.max_similarity < 1 and more_alike(chosen.response, rejected.response, filters.max_similarity):
        return "near_identical"
    return None


def more_alike(one: str, other: str, similarity: float) -> bool:
    """Whether two texts, as sequences of words, are more alike than ``similarity``; cheap upper bounds go first."""
    matcher = SequenceMatcher(None, one.split(), other.split(), autojunk=False)
    return (
        matcher.real_quick_ratio() > similarity and matcher.quick_ratio() > similarity and matcher.ratio() > similarity
    )


def smallest_margins(pairs: Sequence[Pair], quantile: float) -> set[int]:
    """Positions of that share of the pairs, rounded down, whose scores differ least; of equal ones the later go first."""
    margins = [pair.chosen_score - pair.rejected_score for pair in pairs]
    number = math.floor(quantile * len(pairs) + 1e-9)
    return set(sorted(range(len(pairs)), key=lambda position: (margins[position], -position))[:number])
