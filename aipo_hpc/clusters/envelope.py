"""What submitit pickles: an envelope (a run folder, a job, a shard), never settings or data."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submitit.helpers import DelayedSubmission

from aipo_hpc import leaving
from aipo_hpc.resources import Resources
from aipo_hpc.worker import Envelope

if TYPE_CHECKING:
    from aipo_hpc.clusters import Submission
    from aipo_hpc.graph import Job
    from aipo_hpc.store import Run

MAX_REQUEUES = 10_000
"""submitit's own bound is 3, however much each of them got done; whether it was much is for the driver to judge."""
_LONGEST_NOTICE = 120
_SHARE_OF_NOTICE = 2 / 3


def notice(resources: Resources, more_time: float = 1.0) -> int:
    """How many seconds before its time limit a task is asked to leave: a quarter of its time, two minutes at most."""
    return min(_LONGEST_NOTICE, int(resources.time * more_time * 60 / 4))


@dataclass(frozen=True)
class SubmititEnvelope(Envelope):
    """Runs the shard under submitit; asked to leave before the time limit, it saves and has itself sent again.

    SIGUSR2 (near the time limit; where the site sends it, before preemption): stop where little is lost, then requeue;
    where that takes too long, requeue at once. SIGTERM (the end is near, and whoever sent it has decided what comes then:
    requeue or cancel): save, and go on for as long as there is.
    """

    notice: int = _LONGEST_NOTICE
    """Seconds between the signal and the end."""

    def __call__(self) -> None:
        """Called by submitit on the node, once per process of the task."""
        requeue: Callable[[int, Any], None] = signal.getsignal(signal.SIGUSR2)  # type: ignore[assignment]

        def leave(signum: int, frame: object) -> None:
            leaving.ask(leaving.STOP)
            signal.setitimer(signal.ITIMER_REAL, self.notice * _SHARE_OF_NOTICE)

        signal.signal(signal.SIGUSR2, leave)
        signal.signal(signal.SIGALRM, lambda signum, frame: requeue(signal.SIGUSR2, frame))
        signal.signal(signal.SIGTERM, lambda signum, frame: leaving.ask(leaving.SAVE))
        try:
            self.run()
        except leaving.Left as left:
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(left, flush=True)
            # submitit's handler: the first process of a gang requeues and exits, the others return and are ended by that.
            requeue(signal.SIGUSR2, None)

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


def envelopes(run: "Run", job: "Job", submission: "Submission") -> list[SubmititEnvelope]:
    """One per shard of the submission."""
    assert job.resources is not None
    batch_divisor, seconds = submission.adjustment.batch, notice(job.resources, submission.adjustment.time)
    path, name, fence = str(run.path), submission.name, submission.fence
    return [
        SubmititEnvelope(path, job.name, shard, name, index, fence, batch_divisor, submission.extra, notice=seconds)
        for index, shard in enumerate(submission.shards)
    ]
