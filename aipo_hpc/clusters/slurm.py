"""Slurm as a cluster: arrays through submitit, one squeue per query, sacct only for what squeue has forgotten.

Client commands: one scontrol and one sbatch --test-only per distinct shape at the start; then one sbatch per submission and
one squeue per query, however many shards there are; one more squeue when some that may have had steps have newly failed.
"""

import getpass
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import submitit
from submitit.core.job_environment import JobEnvironment

from aipo_hpc.clusters import Dependency, Limits, Submission, TaskState
from aipo_hpc.clusters.envelope import MAX_REQUEUES, SubmititEnvelope, envelopes, notice
from aipo_hpc.clusters.slurm_answers import is_ours, parse_sacct, parse_squeue, parse_steps, with_starved_step
from aipo_hpc.errors import ClusterError, NoRoom, SubmitRefused

if TYPE_CHECKING:
    from aipo_hpc.graph import Graph, Job
    from aipo_hpc.recipe import SlurmConfig
    from aipo_hpc.resources import Resources
    from aipo_hpc.store import Run

_TIMEOUT = 120.0
"""Seconds after which a client command counts as not answered."""

_PASSING = (
    "unable to contact slurm controller",
    "timed out",
    "temporarily",
    "try again",
    "connection refused",
    "rate limit",
    "socket",
)
"""Words of answers that may be different the next time."""

_FULL = re.compile(
    r"(Assoc|QOS)\w*Submit\w*Limit|temporarily unable to accept job|Resource temporarily unavailable", re.IGNORECASE
)
"""Answers that say that this user, or everybody, has too many jobs waiting and running already."""

_SACCT_FIELDS = "JobName,JobID,Submit,State,Elapsed,NodeList,ExitCode"

_NOT_SBATCHS = frozenset({"setup", "stderr_to_stdout"})
"""What submitit does by itself; the rest of its parameters of a job's shape are sbatch's options."""


class SlurmCluster:
    """The cluster whose client commands are on PATH (and that SLURM_CONF selects)."""

    def __init__(self, config: "SlurmConfig") -> None:
        self._config = config
        self.num_commands = 0
        self._steps: dict[tuple[str, int], bool] = {}
        """Of elements that failed, by submission's id and index: whether a step of them ran out of memory."""
        self._without_steps: set[str] = set()
        """Names of submissions whose elements are known to have no steps."""
        try:
            shown = self.client(["scontrol", "show", "config"])
        except ClusterError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise
            raise ClusterError(
                f"Slurm's controller does not answer `scontrol show config` (SLURM_CONF={os.environ.get('SLURM_CONF')}): "
                f"{error}\nLook with `scontrol ping`, or choose cluster=local; once it answers, type the same command again."
            ) from error
        # MaxArraySize bounds the index, which starts at 0; our arrays always do. 0 and 1 forbid arrays.
        bounds = re.findall(r"\b(?:MaxArraySize\s*=\s*|max_array_tasks=)(\d+)", shown) or ["1000"]
        self.limits = Limits(
            dependencies=True,
            max_array_size=max(1, min(map(int, bounds))),
            settle=15.0,
            query_interval=config.query_seconds,
        )

    def check(self, graph: "Graph") -> None:
        """Ask sbatch, without submitting, whether it would take each distinct shape of job; raises SubmitRefused."""
        shapes: dict[tuple[str, ...], str] = {}
        for job in graph.jobs.values():
            if job.resources is not None:
                shapes.setdefault(tuple(self._test_arguments(job.resources)), job.name)
        for arguments, name in shapes.items():
            try:
                self.client(["sbatch", "--test-only", *arguments, "--wrap=true"])
            except ClusterError as error:
                if _FULL.search(str(error)):
                    continue  # the limit on jobs; the shape itself is not refused
                if _passes(str(error)):
                    raise
                raise SubmitRefused(
                    f"{name}: Slurm would not take this job ({' '.join(arguments)}): {error}\n"
                    "Mend the stage's resources or the slurm.* fields; `sinfo` lists the partitions."
                ) from error

    def _test_arguments(self, resources: "Resources") -> list[str]:
        shape = site_parameters(self._config, resources)
        options = {name.replace("_", "-"): value for name, value in shape.items() if name not in _NOT_SBATCHS}
        options.update(self._config.sbatch_args)
        return [f"--{name}={value}" for name, value in options.items() if value is not None]

    def submit(self, run: "Run", job: "Job", submission: Submission, after: Sequence[Submission]) -> str:
        """One sbatch for all shards of the submission."""
        parameters = self._parameters(job, submission, after)
        python = self._config.python or shlex.quote(sys.executable)
        if not parameters["use_srun"]:
            python = f"exec {python}"  # Python takes the place of the batch shell, which gets Slurm's signal
            self._without_steps.add(submission.name)
        folder = run.job(job.name).logs
        executor = submitit.SlurmExecutor(folder=folder, python=python, max_num_timeout=MAX_REQUEUES)
        executor.update_parameters(**parameters)
        sent = envelopes(run, job, submission)
        self.num_commands += 1
        try:
            with outside_any_job():
                if len(sent) == 1:
                    return str(executor.submit(sent[0]).job_id)
                jobs = executor.map_array(SubmititEnvelope.__call__, sent)
            return str(jobs[0].job_id).split("_")[0]
        except submitit.core.utils.FailedSubmissionError as error:
            raise ClusterError(f"{job.name}: sbatch gave no job id: {error}") from error
        except submitit.core.utils.FailedJobError as error:
            raise refusal(job.name, str(error).strip()) from error

    def _parameters(self, job: "Job", submission: Submission, after: Sequence[Submission]) -> dict[str, object]:
        assert job.resources is not None
        resources, config, adjustment = job.resources, self._config, submission.adjustment
        exclude = [*([config.exclude] if config.exclude else []), *adjustment.exclude]
        additional = dict(config.sbatch_args)
        if after:
            sent = {each.name: each for each in after}
            additional["dependency"] = ",".join(dependency(each, sent[each.after]) for each in submission.after)
            additional["kill-on-invalid-dep"] = "yes"
        seconds, srun_args = notice(resources, adjustment.time), list(config.srun_args)
        if resources.nodes * resources.tasks_per_node > 1:
            # Since Slurm 22.05 a step does not take over the batch job's number of cores by itself.
            srun_args += ["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus_per_task}"]
        elif not srun_args:
            # One process needs no step of its own: one call of the controller less for every shard.
            additional.setdefault("signal", f"B:{JobEnvironment.USR_SIG}@{seconds}")
        parameters = {
            **site_parameters(config, resources),
            "mem": f"{int(resources.mem_gb * adjustment.memory * 1024)}MB" if resources.mem_gb else None,
            "time": math.ceil(resources.time * adjustment.time),
            "exclude": ",".join(exclude) or None,
            "job_name": submission.name,
            "comment": f"{run_label(submission)} {job.name}",
            "use_srun": bool(srun_args),
            "srun_args": srun_args,
            "signal_delay_s": seconds,
            "array_parallelism": resources.array_parallelism,
            "additional_parameters": additional,
        }
        return {name: value for name, value in parameters.items() if value is not None}

    def states(self, submissions: Sequence[Submission]) -> Mapping[str, Mapping[int, TaskState]]:
        """One squeue for all; sacct, bounded by the time of submission, for those that squeue does not list."""
        if not submissions:
            return {}
        wanted = {submission.name: submission for submission in submissions}
        states = parse_squeue(
            self.client(
                [
                    "squeue",
                    f"--user={getpass.getuser()}",
                    "--array",
                    "--noheader",
                    "--states=all",
                    "--format=%j|%F|%V|%K|%T|%M|%N|%r",
                ]
            ),
            wanted,
        )
        self._look_at_steps(states, wanted)
        forgotten = [
            submission for submission in submissions if len(states.get(submission.name, {})) < len(submission.shards)
        ]
        if forgotten:
            since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(min(each.time for each in forgotten) - 60))
            command = ["sacct", "--noheader", "--parsable2", f"--starttime={since}"]
            names = ",".join(submission.name for submission in forgotten)
            try:
                # With their steps: the highest exit code of those is sometimes recorded before the last one has ended.
                told = self.client([*command, f"--name={names}", f"--format={_SACCT_FIELDS}"])
            except ClusterError:
                return states  # no accounting here: what squeue forgot stays unknown
            for name, elements in parse_sacct(told, wanted).items():
                for index, state in elements.items():
                    states.setdefault(name, {}).setdefault(index, state)
        return states

    def _look_at_steps(self, states: dict[str, dict[int, TaskState]], wanted: Mapping[str, Submission]) -> None:
        """Have those that failed because one of their steps ran out of memory say so; each of them is asked about once.

        Slurm calls a job OUT_OF_MEMORY for its batch script alone. What srun started there, a gang, is a step.
        """
        of_interest = wanted.keys() - self._without_steps
        ids = {name: submission.id for name, submission in wanted.items() if submission.id and name in of_interest}
        failed = {
            (ids[name], index): (name, index)
            for name, elements in states.items()
            for index, state in elements.items()
            if state.kind == "killed" and name in ids
        }
        if new := failed.keys() - self._steps.keys():
            asked = ",".join(sorted({job_id for job_id, _ in new}))
            command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={asked}"]
            with suppress(ClusterError):  # where it cannot tell, what it has told already stands
                starved = parse_steps(self.client([*command, "--Format=ArrayJobID,ArrayTaskID,DerivedEC"]))
                self._steps.update({each: each in starved for each in new})
        for element, (name, index) in failed.items():
            if self._steps.get(element):
                states[name][index] = with_starved_step(states[name][index])

    def cancel(self, submissions: Sequence[Submission]) -> None:
        """One scancel of the ids that squeue tells for these names: scancel itself takes no more than one name."""
        if not submissions:
            return
        wanted = {submission.name: submission for submission in submissions}
        listed = self.client(["squeue", f"--user={getpass.getuser()}", "--noheader", "--format=%j|%F|%V"])
        lines = [fields for line in listed.splitlines() if len(fields := line.strip().split("|")) == 3]
        ids = sorted({job_id for name, job_id, since in lines if is_ours(wanted.get(name), job_id, since)})
        if ids:
            self.client(["scancel", *ids])

    def client(self, command: Sequence[str]) -> str:
        """What a client command prints. Raises ClusterError when it fails."""
        self.num_commands += 1
        try:
            with outside_any_job():
                done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        except FileNotFoundError as error:
            raise ClusterError(
                f"{command[0]}: not found. cluster=slurm needs Slurm's client commands on PATH; "
                "on a machine without Slurm use cluster=local."
            ) from error
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"{command[0]}: no answer within {_TIMEOUT:g} s") from error
        if done.returncode != 0:
            raise ClusterError((done.stderr or done.stdout).strip() or f"{command[0]}: exit code {done.returncode}")
        return done.stdout


def site_parameters(config: "SlurmConfig", resources: "Resources") -> dict[str, object]:
    """What submitit is told of a job's shape and of how the site wants its jobs; None: nothing to say."""
    return {
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "gpus_per_node": resources.gpus_per_node or None,
        "mem": f"{int(resources.mem_gb * 1024)}MB" if resources.mem_gb else None,
        "time": resources.time,
        "partition": resources.partition or config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "exclude": config.exclude,
        "setup": list(config.setup) or None,
        "stderr_to_stdout": True,
    }


def dependency(wanted: Dependency, on: Submission) -> str:
    """What sbatch is told of a dependency; the only element of a submission is a job of its own, not one of an array."""
    elements = [f"{on.id}_{index}" for index in wanted.indices] if len(on.shards) > 1 else []
    return ":".join([wanted.kind, *(elements or [str(on.id)])])


def run_label(submission: Submission) -> str:
    """What all submissions of a run have in common in their comments."""
    return submission.name.rsplit("-", 1)[0]


@contextmanager
def outside_any_job() -> Iterator[None]:
    """Without what Slurm says of the job that this process may run in: it would leak into those that it sends."""
    of_the_job = re.compile("SLURM_(?!(CONF|CONF_SERVER|CLUSTERS|JWT)$)")
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if of_the_job.match(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def refusal(name: str, message: str) -> ClusterError:
    """What an sbatch that gave no job means."""
    if _FULL.search(message):
        return NoRoom(f"{name}: Slurm has no room for it now: {message}")
    if _passes(message):
        return ClusterError(f"{name}: sbatch got no clear answer: {message}")
    return SubmitRefused(f"{name}: sbatch refused it: {message}\nMend the stage's resources or the slurm.* fields.")


def _passes(message: str) -> bool:
    return any(words in message.lower() for words in _PASSING)
