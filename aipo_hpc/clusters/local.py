"""This machine as a cluster: each shard a process of its own through submitit's local executor, as many as fit.

The processes outlive the driver: one that is started again finds them by pid and start time, and adopts them.
"""

import math
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import submitit

from aipo_hpc.clusters import Limits, Submission, TaskState
from aipo_hpc.clusters.envelope import MAX_REQUEUES, envelopes
from aipo_hpc.errors import ClusterError, RecipeError
from aipo_hpc.processes import descendants, start_time

if TYPE_CHECKING:
    from aipo_hpc.graph import Graph, Job
    from aipo_hpc.store import Run


_LEAVING = 60.0
"""Seconds to wait for a task that has finished its shard to leave its GPUs."""


@dataclass(frozen=True)
class _Process:
    """A task's first process; ``started`` tells it from a later one of the same pid."""

    pid: int
    started: str
    gpus: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.pid}:{self.started}:{','.join(map(str, self.gpus))}"

    @staticmethod
    def parse(identifier: str | None) -> "_Process | None":
        """The process of an id of ours; None for the id of another cluster."""
        found = re.fullmatch(r"(\d+):(\w+):([\d,]*)", identifier or "")
        if found is None:
            return None
        pid, started, gpus = found.groups()
        return _Process(int(pid), started, tuple(int(gpu) for gpu in gpus.split(",") if gpu))


class LocalCluster:
    """One machine with all its cores and GPUs."""

    def __init__(self) -> None:
        self._gpus = visible_gpus()
        self._jobs: dict[str, submitit.Job[None]] = {}
        self._processes: dict[str, _Process] = {}
        self.limits = Limits(
            dependencies=False,
            max_array_size=1,
            settle=1.0,
            query_interval=0.0,
            cpus=len(os.sched_getaffinity(0)),
            gpus=len(self._gpus),
        )

    def check(self, graph: "Graph") -> None:
        """Raise RecipeError for a job that needs more nodes or GPUs than this machine has."""
        for job in graph.jobs.values():
            if job.resources is None:
                continue
            if job.resources.nodes > 1:
                raise RecipeError(
                    f"{job.name}: resources.nodes={job.resources.nodes}, but cluster=local is one machine. "
                    "Set it to 1, or use cluster=slurm."
                )
            if job.resources.gpus_per_node > len(self._gpus):
                raise RecipeError(
                    f"{job.name}: resources.gpus_per_node={job.resources.gpus_per_node}, but this machine has "
                    f"{len(self._gpus)} GPUs (CUDA_VISIBLE_DEVICES counts). Lower it, or use cluster=slurm."
                )

    def submit(self, run: "Run", job: "Job", submission: Submission, after: Sequence[Submission]) -> str:
        """Start the shard's processes; the id is ``pid:start time:GPUs``."""
        assert job.resources is not None and len(submission.shards) == 1
        mine = self._take_gpus(job.resources.gpus_per_node)
        folder = run.job(job.name).logs
        (envelope,) = envelopes(run, job, submission)
        executor = submitit.LocalExecutor(folder=folder, max_num_timeout=MAX_REQUEUES)
        executor.update_parameters(
            timeout_min=math.ceil(job.resources.time * submission.adjustment.time),
            tasks_per_node=job.resources.tasks_per_node,
            gpus_per_node=len(mine),
            visible_gpus=mine,
            signal_delay_s=envelope.notice,
            stderr_to_stdout=True,
        )
        started = executor.submit(envelope)
        self._jobs[submission.name] = started
        pid = int(started.job_id)
        process = _Process(pid, start_time(pid) or "gone", mine)
        self._processes[submission.name] = process
        return str(process)

    def _take_gpus(self, number: int) -> tuple[int, ...]:
        """That many GPUs that no task has. A task whose shard is done may still be leaving: it is waited for."""
        deadline = time.monotonic() + _LEAVING
        while True:
            self._processes = {name: process for name, process in self._processes.items() if self._lives(name, process)}
            held = {gpu for process in self._processes.values() for gpu in process.gpus}
            free = tuple(gpu for gpu in self._gpus if gpu not in held)
            if len(free) >= number:
                return free[:number]
            if time.monotonic() > deadline:
                pids = [process.pid for process in self._processes.values() if process.gpus]
                raise ClusterError(
                    f"{number} GPUs are needed, {len(free)} are free; processes {pids} do not leave theirs"
                )
            time.sleep(0.1)

    def _lives(self, name: str, process: _Process) -> bool:
        job = self._jobs.get(name)
        if job is None:
            return start_time(process.pid) == process.started
        if job.done():
            del self._jobs[name]
            return False
        return True

    def states(self, submissions: Sequence[Submission]) -> Mapping[str, Mapping[int, TaskState]]:
        """A look at the processes."""
        states: dict[str, dict[int, TaskState]] = {}
        for submission in submissions:
            process = _Process.parse(submission.id)
            if process is None:
                continue
            if self._lives(submission.name, process):
                self._processes[submission.name] = process
                states[submission.name] = {0: TaskState(alive=True, running=True)}
            else:
                states[submission.name] = {0: TaskState(alive=False, kind="killed", detail="its process ended")}
        return states

    def cancel(self, submissions: Sequence[Submission]) -> None:
        """End the processes of these submissions and their children."""
        for submission in submissions:
            process = _Process.parse(submission.id)
            if process is None or start_time(process.pid) != process.started:
                continue
            for pid in (*descendants(process.pid), process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def visible_gpus() -> tuple[int, ...]:
    """Numbers of the GPUs of this machine that CUDA_VISIBLE_DEVICES leaves to us."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return tuple(int(number) for number in listed.split(",") if number.strip().isdigit())
    return tuple(range(len(list(Path("/proc/driver/nvidia/gpus").glob("*")))))
