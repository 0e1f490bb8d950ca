"""From texts to the token ids of comparisons: what is cut, what is replaced, where the prefix tokens stand.

A prompt is cut to ``source_maxlength`` tokens, each of its candidates to ``candidate_maxlength`` plus half of what the
prompt leaves over; the closing [SEP] is kept. The budget is that of the prompt alone, never of its batch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from aipo_hpc.rankers.pairrm_folder import (
    CANDIDATE1_PREFIX,
    CANDIDATE2_PREFIX,
    CANDIDATE_PREFIX,
    CLS,
    PAD,
    PREFIXES,
    SEP,
    SOURCE_PREFIX,
)

Comparison = tuple[list[int], list[int], list[int]]
"""Token ids of a prompt and of two candidates, each [CLS] prefix text [SEP]."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_RESERVED = re.compile("|".join(map(re.escape, (SEP, *PREFIXES))))


@dataclass(frozen=True)
class Encoded:
    """A prompt and its candidates as token ids, equal candidates once."""

    source: list[int]
    different: list[list[int]]
    which: list[int]
    """For each candidate the index of its ids in ``different``."""
    truncated: tuple[bool, ...]
    """Which candidates were cut."""
    prompt_truncated: bool


def clean_text(text: str) -> str:
    """Make a text safe to stand between the ranker's own tokens.

    The separator and the prefix tokens become spaces, so that no candidate can pose as another part of the comparison;
    lone surrogates, which UTF-8 cannot hold, become U+FFFD.
    """
    return _RESERVED.sub(" ", _LONE_SURROGATE.sub("\ufffd", text))


class PairTokens:
    """Encodes prompts and candidates with a checkpoint's tokenizer. Lengths count tokens, specials included."""

    def __init__(self, tokenizer: Tokenizer, source_maxlength: int, candidate_maxlength: int) -> None:
        self.tokenizer = tokenizer
        self.source_maxlength = source_maxlength
        self.candidate_maxlength = candidate_maxlength
        found = {token: tokenizer.token_to_id(token) for token in (*PREFIXES, CLS, SEP, PAD)}
        self._ids = {token: number for token, number in found.items() if number is not None}
        assert self._ids.keys() == found.keys(), "pairrm_folder.check_tokenizer comes first"

    def encode(self, prompt: str, candidates: Sequence[str]) -> Encoded:
        """Encode a prompt and its candidates (none is allowed) within their budgets."""
        source, prompt_truncated = self._part(SOURCE_PREFIX, prompt, self.source_maxlength)
        budget = self.candidate_maxlength + (self.source_maxlength - len(source)) // 2
        parts = [self._part(CANDIDATE_PREFIX, text, budget) for text in candidates]
        index: dict[tuple[int, ...], int] = {}
        which = [index.setdefault(tuple(ids), len(index)) for ids, _ in parts]
        truncated = tuple(cut for _, cut in parts)
        return Encoded(source, [list(ids) for ids in index], which, truncated, prompt_truncated)

    def batch(self, rows: Sequence[Comparison]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Concatenate and pad: token ids (B, L), padding (B, L) or None without, positions of the prefix tokens (B, 3).

        In each row the generic prefix of the first candidate becomes <|candidate1|>, of the second <|candidate2|>.
        """
        lengths = torch.tensor([sum(map(len, row)) for row in rows])
        longest = int(lengths.max())
        input_ids = torch.full((len(rows), longest), self._ids[PAD])
        for line, (source, first, second) in zip(input_ids, rows, strict=True):
            ids = torch.tensor(source + first + second)
            line[: len(ids)] = ids
        prefixes = torch.tensor([(1, len(row[0]) + 1, len(row[0]) + len(row[1]) + 1) for row in rows])
        tokens = torch.tensor([self._ids[token] for token in (SOURCE_PREFIX, CANDIDATE1_PREFIX, CANDIDATE2_PREFIX)])
        input_ids.scatter_(1, prefixes, tokens.expand(len(rows), 3))
        padding = torch.arange(longest) >= lengths[:, None]
        return input_ids, (padding if bool(padding.any()) else None), prefixes

    def _part(self, prefix: str, text: str, max_length: int) -> tuple[list[int], bool]:
        ids = self.tokenizer.encode(prefix + clean_text(text), add_special_tokens=False).ids
        kept = ids[: max_length - 2]
        return [self._ids[CLS], *kept, self._ids[SEP]], len(kept) < len(ids)
