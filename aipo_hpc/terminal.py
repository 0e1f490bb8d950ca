"""What the user sees of a run while it goes on: lines for what happens, and a table of jobs."""

import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from aipo_hpc.decision import Decision, View
from aipo_hpc.graph import Graph
from aipo_hpc.plan import next_retry
from aipo_hpc.sentinel import Sentinel
from aipo_hpc.store import Run


class Screen:
    """A live table on a terminal; elsewhere a line whenever something changed."""

    def __init__(self, graph: Graph, run: Run) -> None:
        self._graph = graph
        self._run = run
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._started = time.monotonic()
        self._shown: set[tuple[str, int]] = set()

    def __enter__(self) -> "Screen":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, line: str) -> None:
        """One thing that happened, with the seconds since the start."""
        self._console.print(f"[{time.monotonic() - self._started:6.1f} s] {line}", markup=False)

    def show(self, decision: Decision, view: View) -> None:
        """How things stand."""
        for name, job in self._graph.jobs.items():
            key = (name, len(view.done[name]))
            if key not in self._shown and key[1] == job.num_shards:
                self.tell(f"{name}: done, {_summary(self._run.job(name).done(self._graph.fingerprints[name]))}")
            self._shown.add(key)
        if self._live is not None:
            table = job_table(self._graph, self._run, decision.alive)
            self._live.update(table, refresh=True)


def job_table(graph: Graph, run: Run, alive: Mapping[str, Mapping[int, bool]]) -> Table:
    """One row per job."""
    table = Table("job", "shards", "done", "running", "waiting", "failed attempts", "rows", "seconds", box=None)
    for name, job in graph.jobs.items():
        done = run.job(name).done(graph.fingerprints[name])
        pruned = any(map(run.job(name).pruned, done.values()))
        living = alive.get(name, {})
        running = sum(living.values())
        missing = set(range(job.num_shards)) - set(done) - set(living)
        failed = len(run.job(name).failures())
        table.add_row(
            name,
            str(job.num_shards),
            f"{len(done)}{' (model deleted)' if pruned else ''}",
            str(running or ""),
            " ".join(filter(None, (str(len(living) - running or ""), next_retry(job, run, missing)))),
            str(failed or ""),
            str(sum(sentinel.rows for sentinel in done.values())) if done else "",
            f"{sum(sentinel.ended - sentinel.started for sentinel in done.values()):.1f}" if done else "",
        )
    return table


def _summary(done: Mapping[int, Sentinel]) -> str:
    rows = sum(sentinel.rows for sentinel in done.values())
    seconds = max((sentinel.ended for sentinel in done.values()), default=0.0) - min(
        (sentinel.started for sentinel in done.values()), default=0.0
    )
    return f"{rows} rows in {seconds:.1f} s"


def print_table(table: Table) -> None:
    """Print a table on standard output, in full width where that is not a terminal."""
    width = None if sys.stdout.isatty() else max(int(os.environ.get("COLUMNS", "0")), 200)
    Console(highlight=False, width=width).print(table)
