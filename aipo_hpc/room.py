"""How much may be sent at once, where a cluster has no queue or its scheduler takes only so many jobs."""

from collections.abc import Iterable
from dataclasses import replace

from aipo_hpc.clusters import Limits
from aipo_hpc.decision import Submit
from aipo_hpc.graph import Job


class Room:
    """What is left: cores and GPUs where the cluster has no queue of its own, jobs where the scheduler takes only so many."""

    def __init__(self, limits: Limits, num_shards: int | None, alive: Iterable[Job]) -> None:
        """``alive``: the job of each element that waits or runs."""
        self._limits = limits
        self._cpus, self._gpus = limits.cpus or 0, limits.gpus or 0
        self._num_shards = num_shards
        self.held = False
        for job in alive:
            self._take(job)

    def fit(self, job: Job, send: Submit) -> list[Submit]:
        """As much of the submission as fits now; the rest comes again at a later look."""
        if self._num_shards is not None and len(send.shards) > self._num_shards:
            self.held = True
            # Element by element works only between arrays of the same shards.
            if self._num_shards == 0 or any(dependency.kind == "aftercorr" for dependency in send.after):
                return []
            send = replace(send, shards=send.shards[: self._num_shards])
        if self._limits.cpus is not None:
            cpus, gpus = self._needs(job)
            if cpus > self._cpus or gpus > self._gpus:
                return []
            self._take(job)
        if self._num_shards is not None:
            self._num_shards -= len(send.shards)
        return [send]

    def _take(self, job: Job) -> None:
        cpus, gpus = self._needs(job)
        self._cpus -= cpus
        self._gpus -= gpus

    def _needs(self, job: Job) -> tuple[int, int]:
        """What one shard needs; more cores than the machine has are asked for as all of them."""
        assert job.resources is not None
        cpus = job.resources.cpus_per_task * job.resources.tasks_per_node
        return min(cpus, self._limits.cpus or 0), job.resources.gpus_per_node
