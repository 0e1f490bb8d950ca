"""Sequences of similar length together: little is spent on padding, and no batch is larger than was allowed."""

from collections.abc import Iterator, Sequence


def token_batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield the indices of ``lengths`` in batches of at most that many tokens with padding, or of a single sequence.

    Longest first, so that memory for the largest batch is asked for at the start; equal lengths in their order, so that
    every batch is a function of the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        end = start + max(1, tokens_per_batch // max(1, lengths[order[start]]))
        yield order[start:end]
        start = end
