"""The sandbox, the run directory and what lies in them, as the gremlin sees them."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from _sandbox import process as processes
from _sandbox.process import Process

from _chaos.user import User
from aipo_hpc.errors import RunError
from aipo_hpc.graph import Graph
from aipo_hpc.record import read_graph
from aipo_hpc.sentinel import Sentinel
from aipo_hpc.store import Run

SANDBOX = Path(__file__).resolve().parent.parent / "slurm_sandbox"


@dataclass(frozen=True)
class Element:
    """A job or an element of an array, as squeue lists it."""

    id: str
    state: str
    name: str

    @property
    def array(self) -> str:
        return self.id.partition("_")[0]


@dataclass
class World:
    """Everything that faults may touch; nothing outside of it is."""

    sandbox: Path
    conf: Path
    run_dir: Path
    user: User
    small_disk: bool
    """Whether the run directory lies on a disk of its own that may be filled."""
    chained: bool = False
    """Whether the launch passes the run on to steps in the scheduler."""

    @property
    def environment(self) -> Mapping[str, str]:
        return self.user.environment

    def slurm(self, *argv: str) -> str | None:
        """What a client command of Slurm says; None if it fails, as it may with daemons down."""
        try:
            done = subprocess.run(
                argv, env=self.user.environment, capture_output=True, text=True, timeout=30, check=False
            )
        except subprocess.TimeoutExpired:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    def daemon(self, command: str, *arguments: str) -> bool:
        """Stop or start a daemon of the sandbox."""
        done = subprocess.run(
            [sys.executable, str(SANDBOX), command, f"--dir={self.sandbox}", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode == 0

    def elements(self, *states: str) -> list[Element]:
        """The run's jobs in these states."""
        listed = self.slurm("squeue", "--noheader", "--array", f"--states={','.join(states)}", "--format=%i|%T|%j")
        fields = [line.split("|") for line in (listed or "").splitlines()]
        return [Element(*each) for each in fields if len(each) == 3 and each[2].startswith("aipo-")]

    def runs(self, submission: str, index: int) -> bool:
        """Whether an element of a submission runs, and nobody has ended it."""
        ids = [element.id for element in self.elements("RUNNING") if element.name == submission]
        return any(each.partition("_")[2] in ("", str(index)) for each in ids)

    def nodes(self) -> list[str]:
        """Nodes that are up."""
        listed = self.slurm("sinfo", "--noheader", "--partition=main", "--Node", "--format=%N|%T") or ""
        fields = [line.strip().split("|") for line in listed.splitlines()]
        return sorted({each[0] for each in fields if each[1] in ("idle", "mixed", "allocated", "completing")})

    def workers(self, submission: str = "", index: int = 0, stage: str = "") -> list[list[Process]]:
        """The processes of running tasks, one list per process group: all, an element's, or a stage's."""
        groups: dict[int, list[Process]] = {}
        for process in processes.marked(self.sandbox, self.conf):
            with suppress(OSError):
                proc = Path(f"/proc/{process.pid}")
                said = proc.joinpath("cmdline").read_bytes()
                environment = dict(
                    line.partition(b"=")[::2] for line in proc.joinpath("environ").read_bytes().split(b"\0")
                )
                element = environment.get(b"SLURM_JOB_NAME"), environment.get(b"SLURM_ARRAY_TASK_ID", b"0")
                if submission and element != (submission.encode(), str(index).encode()):
                    continue
                if b"submitit" in said and f"/{stage}".encode() in said:
                    groups.setdefault(os.getpgid(process.pid), []).append(process)
        groups.pop(os.getpgrp(), None)
        return list(groups.values())

    @property
    def run(self) -> Run:
        """The run, with nothing remembered."""
        return Run(self.run_dir)

    def graph(self) -> Graph | None:
        try:
            return read_graph(self.run)
        except (RunError, OSError, ValueError):
            return None  # not there yet, or damaged by ourselves

    def finished(self) -> Iterator[tuple[str, Sentinel]]:
        """All finished shards, with their jobs' names."""
        graph, run = self.graph(), self.run
        for name in graph.jobs if graph is not None else ():
            assert graph is not None
            for _, sentinel in sorted(run.job(name).done(graph.fingerprints[name]).items()):
                yield name, sentinel

    def complete(self) -> bool:
        """Whether all of the run is done; a launch that stays with it says so itself, by ending well."""
        graph = self.graph()
        return not self.chained or (
            graph is not None and self.num_done() == sum(job.num_shards for job in graph.jobs.values())
        )

    def at_work(self) -> bool:
        """Whether a job of the run waits or runs; with the controller down that is not known, and assumed."""
        listed = self.slurm("squeue", "--noheader", "--format=%j")
        return listed is None or any(name.startswith("aipo-") for name in listed.split())

    def num_done(self) -> int:
        return sum(1 for _ in self.finished())
