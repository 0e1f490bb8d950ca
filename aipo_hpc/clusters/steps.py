"""The steps of a chain as Slurm jobs: one name for all steps of a run, by which they are found, counted and cancelled."""

import getpass
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import submitit

from aipo_hpc.clusters.envelope import StepEnvelope
from aipo_hpc.clusters.slurm import SlurmCluster, outside_any_job, refusal, site_parameters
from aipo_hpc.errors import ClusterError

if TYPE_CHECKING:
    from aipo_hpc.recipe import SlurmConfig
    from aipo_hpc.store import Run

_MANY = 1000
"""How often a step may be requeued because its time was over."""

_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_LIVING = (*_WAITING, "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")


@dataclass(frozen=True)
class LivingStep:
    """A step that waits or runs; ``what`` are Slurm's state and reason."""

    id: str
    state: str
    what: str


class Steps:
    """The steps of one run on Slurm."""

    def __init__(self, cluster: SlurmCluster, config: "SlurmConfig", run_id: str) -> None:
        self._cluster = cluster
        self._config = config
        self.name = f"aipo-{run_id}-step"

    def living(self, but: str | None = None) -> list[LivingStep]:
        """The steps that wait or run, apart from the one with the id ``but``."""
        shown = self._cluster.client(
            ["squeue", f"--user={getpass.getuser()}", f"--name={self.name}", "--noheader", "--format=%A|%T|%r"]
        )
        lines = [line.strip().split("|", 2) for line in shown.splitlines() if line.count("|") >= 2]
        return [
            LivingStep(identifier, state, f"{state}, {reason}" if reason != "None" else state)
            for identifier, state, reason in lines
            if state in _LIVING and identifier != but
        ]

    def send(self, run: "Run", after: Sequence[str], delay: float) -> str:
        """Submit a step that runs as soon as one of the dependencies holds, not before ``delay`` seconds; returns its id.

        Raises NoRoom, SubmitRefused or ClusterError as the submission of shards does.
        """
        resources = self._config.driver
        folder = run.chain
        folder.mkdir(mode=0o700, exist_ok=True)
        executor = submitit.SlurmExecutor(folder=folder, python=self._config.python, max_num_timeout=_MANY)
        additional = {**self._config.sbatch_args, "begin": f"now+{max(1, round(delay))}"}
        if after:
            additional["dependency"] = "?".join(after)
        parameters = {
            **site_parameters(self._config, resources),
            "srun_args": list(self._config.srun_args),
            "job_name": self.name,
            "comment": f"{self.name.removesuffix('-step')} step",
            # The signal that has it requeued before its time is over.
            "signal_delay_s": min(90, resources.time * 15),
            "additional_parameters": additional,
        }
        executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
        self._cluster.num_commands += 1
        try:
            with outside_any_job():
                return str(executor.submit(StepEnvelope(str(run.path))).job_id)
        except submitit.core.utils.FailedSubmissionError as error:
            raise ClusterError(f"next step: sbatch gave no job id: {error}") from error
        except submitit.core.utils.FailedJobError as error:
            raise refusal("next step", str(error).strip()) from error

    def cancel(self, *, waiting_only: bool = False) -> int:
        """Cancel the steps that wait, or all that live; returns how many."""
        found = [step for step in self.living() if not waiting_only or step.state in _WAITING]
        if found:
            self._cluster.client(["scancel", *(step.id for step in found)])
        return len(found)
