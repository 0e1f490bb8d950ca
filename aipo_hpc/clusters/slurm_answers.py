"""What squeue and sacct answer, read as states of our elements: the one place that knows Slurm's words."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from aipo_hpc.clusters import Submission, TaskState

_OVER = {
    "COMPLETED": None,
    "FAILED": "killed",
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "OUT_OF_MEMORY": "out_of_memory",
    "NODE_FAIL": "node_failure",
    "BOOT_FAIL": "node_failure",
    "PREEMPTED": "preempted",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
}
"""States of Slurm in which a job is over, as classes of failure."""

_OUT_OF_MEMORY = 125
"""The signal by which Slurm says so in a step's exit code; no process gets it."""

_SKEW = 300.0
"""Seconds by which the clocks of the scheduler and of this machine may differ."""


def parse_squeue(text: str, wanted: Mapping[str, Submission]) -> dict[str, dict[int, TaskState]]:
    """Read lines of ``name|job id|submit time|array index|state|time used|nodes|reason``."""
    states: dict[str, dict[int, TaskState]] = {}
    for line in text.splitlines():
        fields = line.strip().split("|", 7)
        if len(fields) < 8 or not is_ours(wanted.get(fields[0]), fields[1], fields[2]):
            continue
        name, _, _, index, state, used, nodes, reason = fields
        told = task_state(state, seconds(used), wanted[name], reason, nodes)
        _tell(states.setdefault(name, {}), expand(index), told, wanted[name])
    return states


def parse_sacct(text: str, wanted: Mapping[str, Submission]) -> dict[str, dict[int, TaskState]]:
    """Read lines of ``name|job id|submit time|state|elapsed|nodes|exit code``, of jobs and of their steps.

    Ids of waiting elements may be folded: 12_[3-5]. A step is 12_3.batch or 12_3.0.
    """
    states: dict[str, dict[int, TaskState]] = {}
    lines = [fields for line in text.splitlines() if len(fields := line.strip().split("|")) >= 7]
    steps = [(fields[1].partition(".")[0], fields[3]) for fields in lines if "." in fields[1]]
    starving = {job_id for job_id, state in steps if state == "OUT_OF_MEMORY"}
    for name, job_id, submitted, state, elapsed, nodes, exit_code, *_ in lines:
        array, _, element = job_id.partition("_")
        if "." in job_id or not is_ours(wanted.get(name), array, submitted):
            continue
        told = task_state(state, seconds(elapsed), wanted[name], f"exit code {exit_code}", nodes)
        if job_id in starving:
            told = with_starved_step(told)
        _tell(states.setdefault(name, {}), expand(element), told, wanted[name])
    return states


def parse_steps(text: str) -> set[tuple[str, int]]:
    """Read lines of ``job id, array index, highest exit code of a step``: the elements of which a step ran out of memory.

    The only element of a submission, which is no array, has index 0.
    """
    lines = [fields for line in text.splitlines() if len(fields := line.split()) == 3]
    return {(job_id, index) for job_id, element, code in lines if starved(code) for index in expand(element) or [0]}


def starved(exit_code: str) -> bool:
    """Whether a step's exit code, as squeue writes it (253, or 0:125), is the one that means out of memory."""
    status, _, signal = exit_code.rpartition(":")
    return signal.isdecimal() and int(signal) & 0x7F == _OUT_OF_MEMORY and status in ("", "0")


def with_starved_step(state: TaskState) -> TaskState:
    """The state of an element of which a step ran out of memory: the job's own state does not tell."""
    if state.kind != "killed":
        return state
    return replace(state, kind="out_of_memory", detail=f"{state.detail}; a step of it OUT_OF_MEMORY")


def _tell(states: dict[int, TaskState], indices: Sequence[int], told: TaskState, submission: Submission) -> None:
    """Note the state of elements. A line without an index is of a job that is no array, or of an array as a whole.

    Slurm keeps the latter of one that was cancelled before it began: it speaks for what has no line of its own.
    """
    states.update(dict.fromkeys(indices, told))
    if not indices:
        for index in range(len(submission.shards)):
            states.setdefault(index, told)


def is_ours(submission: Submission | None, job_id: str, submitted: str) -> bool:
    """Whether a job of a submission's name is that submission: by its id, or, where that is not known, by its time.

    Ids are used again, and a copied run directory makes the same names again.
    """
    if submission is None or submission.id is not None:
        return submission is not None and submission.id == job_id
    try:
        return time.mktime(time.strptime(submitted, "%Y-%m-%dT%H:%M:%S")) >= submission.time - _SKEW
    except ValueError:
        return True


def expand(element: str) -> list[int]:
    """Indices of a folded array id: ``[3-5,8%2]`` is 3, 4, 5, 8 and ``[1-7:3]`` is 1, 4, 7."""
    indices: list[int] = []
    for part in element.strip("[]").split("%")[0].split(","):
        if folded := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            first, last, step = folded.groups()
            indices += range(int(first), int(last or first) + 1, int(step or 1))
    return indices


def seconds(used: str) -> int:
    """Slurm's ``[days-][hours:]minutes:seconds`` in seconds; 0 for what is not a time."""
    days, _, clock = used.rpartition("-")
    parts = [days or "0", *["0"] * (2 - clock.count(":")), *clock.split(":")]
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        return 0
    return ((int(parts[0]) * 24 + int(parts[1])) * 60 + int(parts[2])) * 60 + int(parts[3])


def task_state(state: str, ran: int, submission: Submission, detail: str, nodes: str) -> TaskState:
    """What a state of Slurm means to us, after it ``ran`` seconds; one that is not known as over counts as alive."""
    word = state.partition(" ")[0].rstrip("+")
    node = "" if nodes == "None assigned" else nodes
    if word not in _OVER:
        return TaskState(alive=True, running=word in ("RUNNING", "COMPLETING"), node=node, seconds=ran)
    kind = _OVER[word]
    if kind == "cancelled" and ran == 0 and any(dependency.kind != "afterany" for dependency in submission.after):
        kind = "dependency"
    return TaskState(alive=False, kind=kind, detail=f"Slurm: {state}, {detail}", node=node, seconds=ran)
