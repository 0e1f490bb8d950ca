"""The batches of a shard as blocks, of which an attempt does those that it claims, and then what nobody else does.

A block is one or more whole batches, so what is batched together does not depend on who does it.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from aipo_hpc import leaving
from aipo_hpc.progress import Progress
from aipo_hpc.suspects import Suspects
from aipo_hpc.task import Task

MOST = 64
"""Blocks of a shard at most: a claim costs the file system two requests."""
_PAUSE = 1.0
"""Seconds between two looks at what other attempts have done."""


class Blocks:
    """The work of one attempt at a shard."""

    def __init__(
        self, task: Task, batches: Sequence[Sequence[str]], progress: Progress[Any], suspects: Suspects
    ) -> None:
        """``batches``: ids of what is done together, the same in all attempts, finished ones included.

        An attempt whose batches are others does all the rest by itself. Raises NothingLeft in an extra attempt that comes too
        late to do anything.
        """
        size = max(1, -(-len(batches) // MOST))
        self._blocks = [batches[start : start + size] for start in range(0, len(batches), size)]
        self._progress = progress
        self._suspects = suspects
        self._claims = task.claims
        self._where = f"{task.job} shard {task.shard}"
        self._mine: list[int] = []
        if self._claims is not None and not self._claims.open(len(self._blocks)):
            self._claims = None
        if self._claims is not None and self._claims.extra and not self._claims.any_free(self._open()):
            self._claims.leave()

    def rounds(self) -> Iterator[Iterator[list[str]]]:
        """Yield rounds of batches, one to be begun after the other: suspects last, each group alone.

        A batch is claimed when it is asked for, so ask for it when it is begun. Raises NothingLeft when the rest of the
        shard is for others.
        """
        while any(self._is_open(block) for block in range(len(self._blocks))):
            yield self._batches()
            mine = [batch for block in self._mine for batch in self._blocks[block]]
            for group in self._suspects.groups(mine, self._progress):
                yield iter([group])
            if self._claims is None or any(self._is_open(block) for block in self._mine):
                return
            if self._claims.extra:
                self._progress.sync()
                self._claims.leave()
            while (waiting := self._open()) and not self._claims.any_free(waiting):
                if self._claims.shard_is_done():
                    self._claims.leave()
                leaving.here(self._where)
                time.sleep(_PAUSE)
                self._take_over()

    def _batches(self) -> Iterator[list[str]]:
        while (block := self._take()) is not None:
            yield from self._suspects.usual(self._blocks[block], self._progress)

    def _take(self) -> int | None:
        """The next block that is this attempt's to do; None: there is none for now."""
        self._progress.sync()  # others may wait for the rows of the last one
        while wanted := self._open():
            if self._claims is None:
                self._mine.append(wanted[0])
                return wanted[0]
            taken = self._claims.take(wanted)
            if taken is None:
                return None
            block, again = taken
            self._mine.append(block)
            if again:
                self._take_over()
            if self._is_open(block):
                return block
        return None

    def _open(self) -> list[int]:
        """Unfinished blocks that are not this attempt's."""
        return [block for block in range(len(self._blocks)) if block not in self._mine and self._is_open(block)]

    def _is_open(self, block: int) -> bool:
        return any(each not in self._progress for batch in self._blocks[block] for each in batch)

    def _take_over(self) -> None:
        assert self._claims is not None
        self._progress.take_over(self._claims.others())
