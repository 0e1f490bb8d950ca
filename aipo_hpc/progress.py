"""Work kept inside a shard: finished rows are appended as they finish, so a killed attempt costs only what was in flight.

    <attempt>/progress.jsonl   one finished row per line, in order of finishing; a torn last line is not believed
    <attempt>/rows.parquet     written once at the end, in the order of the shard's prompts

A row is known by its first field, the id of a prompt or of a call. A new attempt first takes over the lines of all earlier
attempts at its shard, the first finished row of an id wins; because the final file has its own order, it does not depend on
how often the work was interrupted.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Generic

from aipo_hpc.durable import full_disk_named
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
        self._advance: Callable[[], None] = task.advance
        self._advanced = False
        self._rows: dict[str, Row] = {}
        self._read_up_to: dict[Path, int] = {}
        for folder in (*task.earlier, task.out):
            for row in self._news(folder):
                self._rows.setdefault(_key(row), row)
        self.num_taken_over = len(self._rows)
        self.num_shared = 0
        """Rows that other attempts have made since this one began."""
        self._synced = time.monotonic()
        path = task.out / PROGRESS
        with full_disk_named(path):
            again = path.exists()
            self._file = path.open("a", encoding="utf-8")
            if again:
                # The same attempt, begun a second time by hand: its first try may have left a torn line.
                self._file.write("\n")
            for row in self._rows.values():
                self._write(row)

    def __enter__(self) -> "Progress[Row]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with full_disk_named(self._out / PROGRESS):
            try:
                self.sync()
            finally:
                self._file.close()

    def __contains__(self, prompt_id: object) -> bool:
        return prompt_id in self._rows

    def append(self, row: Row) -> None:
        """Keep a finished row; durable within two seconds."""
        with full_disk_named(self._out / PROGRESS):
            self._write(row)
            self._file.flush()  # outlives this process, if not the node
            if not self._advanced:
                self._advance()
                self._advanced = True
            if time.monotonic() - self._synced > _SECONDS_BETWEEN_FSYNCS:
                self.sync()
        self._rows[_key(row)] = row

    @property
    def counts(self) -> dict[str, float]:
        """What a sentinel tells of it."""
        return {"shared": self.num_shared} if self.num_shared else {}

    def take_over(self, folders: Iterable[Path]) -> None:
        """Keep the rows that attempts with these folders have finished since the last look."""
        new = {_key(row): row for folder in folders for row in self._news(folder)}
        new = {key: row for key, row in new.items() if key not in self._rows}
        with full_disk_named(self._out / PROGRESS):
            for row in new.values():
                self._write(row)
        self._rows |= new
        self.num_shared += len(new)

    def sync(self) -> None:
        """Make all rows durable, which also shows them to other nodes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def finish(self, prompt_ids: Iterable[str]) -> tuple[str, ...]:
        """Write the rows of ``prompt_ids``, in that order, and return the name of the file in the attempt's folder."""
        with full_disk_named(self._out / ROWS):
            write_rows(self._out / ROWS, [self._rows[prompt_id] for prompt_id in prompt_ids], self._kind)
        return (ROWS,)

    def rows(self, prompt_ids: Iterable[str]) -> Iterator[Row]:
        """Yield the finished rows of ``prompt_ids``, in that order."""
        for prompt_id in prompt_ids:
            yield self._rows[prompt_id]

    def _write(self, row: Row) -> None:
        self._file.write(json.dumps(to_plain(row), ensure_ascii=False, separators=(",", ":")) + "\n")

    def _news(self, folder: Path) -> Iterator[Row]:
        """Yield the rows of an attempt that were not read before; a line that a kill cut off is not one."""
        path = folder / PROGRESS
        if not path.exists():
            return
        with path.open("rb") as lines:
            lines.seek(self._read_up_to.get(path, 0))
            for line in lines:
                if not line.endswith(b"\n"):
                    return
                self._read_up_to[path] = self._read_up_to.get(path, 0) + len(line)
                with suppress(ValueError, TypeError, KeyError):
                    yield from_plain(json.loads(line.decode(errors="replace")), self._kind)


def _key(row: Any) -> str:
    """What a row is known by: its first field."""
    key: str = getattr(row, dataclasses.fields(row)[0].name)
    return key
