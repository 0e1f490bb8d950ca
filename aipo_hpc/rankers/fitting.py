"""Responses cut so that the conversation they stand in fits into what a ranker reads: the template around them stays whole."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fit(
    tokenizer: "PreTrainedTokenizerBase",
    encode: Callable[[Sequence[str]], list[int]],
    texts: Sequence[str],
    limit: int,
) -> tuple[list[int], tuple[bool, ...]] | None:
    """Return the ids that ``encode`` makes of ``texts``, at most ``limit``, and which of the texts were cut for that.

    The ends of the longest texts go first, so that what is left of each is alike in length. None if there is no room for
    any of them.
    """
    ids = encode(texts)
    if len(ids) <= limit:
        return ids, (False,) * len(texts)
    tokens = [[int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    lengths = [len(each) for each in tokens]
    room = sum(lengths)
    while True:
        # Cut text may take more tokens than it was cut to, so the room shrinks until all is well.
        room -= len(ids) - limit
        longest = share(lengths, room)
        if longest < 1:
            return None
        cut = tuple(length > longest for length in lengths)
        kept = [
            str(tokenizer.decode(each[:longest])) if is_cut else text
            for text, each, is_cut in zip(texts, tokens, cut, strict=True)
        ]
        ids = encode(kept)
        if len(ids) <= limit:
            return ids, cut


def share(lengths: Sequence[int], room: int) -> int:
    """The most that each may take so that all together take no more than ``room``: who needs less leaves it to the others."""
    if sum(lengths) <= room:
        return max(lengths, default=0)
    longest = 0
    waiting = sorted(lengths)
    while waiting:
        longest = room // len(waiting)
        if waiting[0] > longest:
            break
        room -= waiting.pop(0)
    return longest
