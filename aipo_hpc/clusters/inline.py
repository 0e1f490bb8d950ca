"""Shards run in this process, at once, when they are submitted: for tests, debugging and tiny runs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from aipo_hpc import worker
from aipo_hpc.clusters import Limits, Submission, TaskState

if TYPE_CHECKING:
    from aipo_hpc.graph import Graph, Job
    from aipo_hpc.store import Run


class InlineCluster:
    """The cluster that is this process."""

    limits = Limits(dependencies=False, max_array_size=1, settle=0.0, query_interval=0.0)

    def check(self, graph: "Graph") -> None:
        """Anything runs here, somehow."""

    def submit(self, run: "Run", job: "Job", submission: Submission, after: Sequence[Submission]) -> str:
        """Run the shards; a failed one has recorded its failure, and the caller goes on."""
        for index, shard in enumerate(submission.shards):
            envelope = worker.Envelope(
                str(run.path),
                job.name,
                shard,
                submission.name,
                index,
                submission.fence,
                submission.adjustment.batch,
                submission.extra,
            )
            try:
                envelope.run()
            except Exception:  # noqa: BLE001, S112 - recorded by the worker; a driver survives its tasks
                continue
        return submission.name

    def states(self, submissions: Sequence[Submission]) -> Mapping[str, Mapping[int, TaskState]]:
        """Everything submitted is over."""
        return {
            submission.name: {index: TaskState(alive=False) for index in range(len(submission.shards))}
            for submission in submissions
        }

    def cancel(self, submissions: Sequence[Submission]) -> None:
        """Nothing is ever left to cancel."""
