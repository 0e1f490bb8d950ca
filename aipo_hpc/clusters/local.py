"""This machine as a cluster: each shard a process of its own through submitit's local executor, as many as fit.

The processes outlive the driver: one that is started again finds them by pid and start time, and adopts them.
"""

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import submitit

from aipo_hpc.clusters import Limits, Submission, TaskState
from aipo_hpc.clusters.envelope import SubmititEnvelope
from aipo_hpc.errors import RecipeError
from aipo_hpc.processes import descendants, start_time

if TYPE_CHECKING:
    from aipo_hpc.graph import Graph, Job
    from aipo_hpc.store import Run


class LocalCluster:
    """One machine with all its cores and GPUs."""

    def __init__(self) -> None:
        self._gpus = visible_gpus()
        self._jobs: dict[str, submitit.Job[None]] = {}
        self.limits = Limits(
            dependencies=False,
            max_array_size=1,
            settle=1.0,
            query_interval=0.0,
            cpus=len(os.sched_getaffinity(0)),
            gpus=len(self._gpus),
        )
        self._held: dict[str, tuple[int, ...]] = {}

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
        free = [gpu for gpu in self._gpus if all(gpu not in held for held in self._held.values())]
        mine = tuple(free[: job.resources.gpus_per_node])
        folder = run.job(job.name).logs
        executor = submitit.LocalExecutor(folder=folder)
        executor.update_parameters(
            timeout_min=job.resources.time,
            tasks_per_node=job.resources.tasks_per_node,
            gpus_per_node=len(mine),
            visible_gpus=mine,
            stderr_to_stdout=True,
        )
        envelope = SubmititEnvelope(str(run.path), job.name, submission.shards[0], submission.name, 0, submission.fence)
        started = executor.submit(envelope)
        self._jobs[submission.name] = started
        self._held[submission.name] = mine
        pid = int(started.job_id)
        return f"{pid}:{start_time(pid)}:{','.join(map(str, mine))}"

    def states(self, submissions: Sequence[Submission]) -> Mapping[str, Mapping[int, TaskState]]:
        """A look at the processes."""
        states: dict[str, dict[int, TaskState]] = {}
        for submission in submissions:
            if submission.id is None:
                continue
            pid, started, gpus = submission.id.split(":")
            job = self._jobs.get(submission.name)
            alive = not job.done() if job is not None else start_time(int(pid)) == started
            if alive:
                self._held[submission.name] = tuple(int(gpu) for gpu in gpus.split(",") if gpu)
                states[submission.name] = {0: TaskState(alive=True, running=True)}
            else:
                self._held.pop(submission.name, None)
                states[submission.name] = {0: TaskState(alive=False, kind="killed", detail="its process ended")}
        return states

    def cancel(self, submissions: Sequence[Submission]) -> None:
        """End the processes of these submissions and their children."""
        for submission in submissions:
            if submission.id is None:
                continue
            pid, started, _ = submission.id.split(":")
            if start_time(int(pid)) != started:
                continue
            for process in (*descendants(int(pid)), int(pid)):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


def visible_gpus() -> tuple[int, ...]:
    """Numbers of the GPUs of this machine that CUDA_VISIBLE_DEVICES leaves to us."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return tuple(int(number) for number in listed.split(",") if number.strip().isdigit())
    return tuple(range(len(list(Path("/proc/driver/nvidia/gpus").glob("*")))))
