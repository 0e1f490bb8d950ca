"""What submitit pickles: a worker's envelope (a run folder, a job, a shard), never settings or data."""

from submitit.helpers import DelayedSubmission

from aipo_hpc.worker import Envelope


class SubmititEnvelope(Envelope):
    """Runs the shard under submitit; asked to leave (time limit, preemption), it has itself sent again."""

    def __call__(self) -> None:
        """Called by submitit on the node, once per process of the task."""
        self.run()

    def checkpoint(self) -> DelayedSubmission:
        """What to requeue: the same envelope; the new attempt continues inside the shard from what is on disk."""
        return DelayedSubmission(self)
