"""What submitit pickles: an envelope (a run folder, a job, a shard), never settings or data."""

import os
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class StepEnvelope:
    """One step of a chain; out of time, it has itself sent again and begins anew."""

    run_dir: str

    def __call__(self) -> None:
        """Called by submitit in the step's job."""
        from aipo_hpc.launch import step

        step(Path(self.run_dir), os.environ["SLURM_JOB_ID"])

    def checkpoint(self) -> DelayedSubmission:
        """What to requeue."""
        return DelayedSubmission(self)
