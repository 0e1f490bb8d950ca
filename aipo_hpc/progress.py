"""Work kept inside a shard: finished rows are appended as they finish, so a killed attempt costs only what was in flight.

    <attempt>/progress.jsonl   one finished row per line, in order of finishing; a torn last line is not believed
    <attempt>/rows.parquet     written once at the end, in the order of the shard's prompts

A new attempt first takes over the lines of all earlier attempts at its shard, the first finished row of a prompt wins;
because the final file has its own order, it does not depend on how often the work was interrupted.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic

from aipo_hpc.rows import Row, from_plain, to_plain, write_rows
from aipo_hpc.task import Task

PROGRESS = "progress.jsonl"
ROWS = "rows.parquet"
_SECONDS_BETWEEN_FSYNCS = 2.0


class Progress(Generic[Row]):
    """The finished rows of one shard. Use as a context manager; ``finish`` writes the shard's Parquet file."""

    def __init__(self, task: Task, kind: type[Row]) -> None:
        self._kind = kind
        self._out = task.out
        self._rows: dict[str, Row] = {}
        for folder in task.earlier:
            for row in _read(folder / PROGRESS, kind):
                self._rows.setdefault(_key(row), row)
        self.num_taken_over = len(self._rows)
        self._synced = time.monotonic()
        self._file = (task.out / PROGRESS).open("a", encoding="utf-8")
        for row in self._rows.values():
            self._write(row)

    def __enter__(self) -> "Progress[Row]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sync()
        self._file.close()

    def __contains__(self, prompt_id: str) -> bool:
        return prompt_id in self._rows

    def append(self, row: Row) -> None:
        """Keep a finished row; durable within two seconds."""
        self._rows[_key(row)] = row
        self._write(row)
        if time.monotonic() - self._synced > _SECONDS_BETWEEN_FSYNCS:
            self._sync()

    def finish(self, prompt_ids: Iterable[str]) -> tuple[str, ...]:
        """Write the rows of ``prompt_ids``, in that order, and return the name of the file in the attempt's folder."""
        write_rows(self._out / ROWS, [self._rows[prompt_id] for prompt_id in prompt_ids], self._kind)
        return (ROWS,)

    def rows(self, prompt_ids: Iterable[str]) -> Iterator[Row]:
        """Yield the finished rows of ``prompt_ids``, in that order."""
        for prompt_id in prompt_ids:
            yield self._rows[prompt_id]

    def _write(self, row: Row) -> None:
        self._file.write(json.dumps(to_plain(row), ensure_ascii=False, separators=(",", ":")) + "\n")

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def _key(row: Any) -> str:
    key: str = row.prompt_id
    return key


def _read(path: Path, kind: type[Row]) -> Iterator[Row]:
    """Yield the whole lines of a progress file; whatever follows the last newline was cut off by a kill."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.endswith("\n"):
                return
            try:
                yield from_plain(json.loads(line), kind)
            except (ValueError, TypeError, KeyError):
                return
