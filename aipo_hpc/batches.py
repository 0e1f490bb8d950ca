"""Which pairs make up which optimizer step: a function of the seed and the data, of nothing else.

    epochs          every pass over the pairs is its own permutation; the passes follow each other as one stream
    global batch    the next ``global_batch_size`` pairs of the stream, the last one possibly fewer
    micro-batch     the global batch sorted by length, dealt out in equal parts to processes and forward passes

Neither the number of processes nor the size of a micro-batch changes which pairs share a step, and the mean over a step
is the mean over its pairs: a last batch that cannot be dealt out evenly is filled up with slots of weight 0.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from aipo_hpc.logps import collate
from aipo_hpc.rows import TrainRow

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_shared_logps", "ref_rejected_shared_logps")
FLOAT_COLUMNS = (*REFERENCE_COLUMNS, "weights")


@dataclass(frozen=True)
class TokenisedRow:
    """A TrainRow in a tenth of the memory: token ids as int32 tensors of shape (tokens,)."""

    prompt_ids: torch.Tensor
    chosen_ids: torch.Tensor
    rejected_ids: torch.Tensor
    ref_logps: tuple[float, ...]
    """The row's columns called ``REFERENCE_COLUMNS``."""

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def compact(rows: Iterable[TrainRow]) -> list[TokenisedRow]:
    """Rows as they are kept in memory during training."""
    return [
        TokenisedRow(
            torch.tensor(row.prompt_ids, dtype=torch.int32),
            torch.tensor(row.chosen_ids, dtype=torch.int32),
            torch.tensor(row.rejected_ids, dtype=torch.int32),
            tuple(getattr(row, name) for name in REFERENCE_COLUMNS),
        )
        for row in rows
    ]


def global_batches(num_pairs: int, num_train_epochs: float, global_batch_size: int, seed: str) -> list[list[int]]:
    """The pairs, by index, of each optimizer step; at least one step of at least one pair."""
    num_visits = max(1, round(num_pairs * num_train_epochs))
    stream: list[int] = []
    epoch = 0
    while len(stream) < num_visits:
        permutation = list(range(num_pairs))
        random.Random(f"{seed}/{epoch}").shuffle(permutation)
        stream += permutation
        epoch += 1
    return [stream[at : min(at + global_batch_size, num_visits)] for at in range(0, num_visits, global_batch_size)]


class Slots(Dataset[tuple[TokenisedRow, float]]):
    """All steps as one sequence of (row, weight), to be read in order by all processes, a micro-batch each in turn.

    Weights are 1, or in a last batch that was filled up: slots / pairs for a pair and 0 for a filler, so that the mean
    over equal micro-batches is the mean over pairs.
    """

    def __init__(self, rows: Sequence[TokenisedRow], batches: Sequence[Sequence[int]], slots_per_forward: int) -> None:
        self._rows = rows
        self._slots: list[tuple[int, float]] = []
        for batch in batches:
            # Longest first: a step that does not fit into memory fails at its beginning.
            pairs = sorted(batch, key=lambda index: (-rows[index].length, index))
            num_slots = -(-len(pairs) // slots_per_forward) * slots_per_forward
            self._slots += [(index, num_slots / len(pairs)) for index in pairs]
            self._slots += [(pairs[-1], 0.0)] * (num_slots - len(pairs))

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, slot: int) -> tuple[TokenisedRow, float]:
        index, weight = self._slots[slot]
        return self._rows[index], weight


def collate_slots(slots: Sequence[tuple[TokenisedRow, float]]) -> dict[str, Any]:
    """``logps.collate`` of B slots, and ``FLOAT_COLUMNS`` as fp32 tensors of shape (B,)."""
    rows = [row for row, _ in slots]
    columns = (*zip(*(row.ref_logps for row in rows), strict=True), [weight for _, weight in slots])
    floats = {
        name: torch.tensor(column, dtype=torch.float32) for name, column in zip(FLOAT_COLUMNS, columns, strict=True)
    }
    return {**collate(rows), **floats}  # type: ignore[arg-type]
