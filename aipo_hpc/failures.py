"""Classes of failure: what each means, how often it is tolerated, how long to wait, what to change before trying again.

Everything here is derived from the recorded failures of one launch; failures of earlier launches are forgiven. An attempt
that got further before it failed (it finished a prompt, saved a checkpoint, narrowed down which prompt kills its worker)
costs nothing: counted are failures of one kind and one shard since the shard last got further.
"""

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from aipo_hpc.adjustment import Adjustment
from aipo_hpc.durable import FULL
from aipo_hpc.errors import DiskFull, InputNotVisible, UserError
from aipo_hpc.sentinel import Failure

LONGEST_BACKOFF = 600.0
"""Seconds that a shard waits at most before it is tried again."""
FAST = 120.0
"""Seconds within which an attempt must have failed to speak against the node that it ran on."""
_BLACK_HOLE_SHARDS = 3
_NODE_FAILURES = 2
_ONE_NODE_FAILURE = 60.0
_MORE_MEMORY, _MORE_TIME, _SMALLER_BATCH, _STEPS = 1.5, 2.0, 2, 2


@dataclass(frozen=True)
class Kind:
    """``tolerated``: so many failures of this kind are retried per shard and launch, the next one ends the shard.

    ``backoff``: seconds until the first retry; they double with each further failure.
    """

    tolerated: int
    advice: str
    backoff: float = 0.0


KINDS: Mapping[str, Kind] = {
    "user_error": Kind(0, "mend what the message says, then type the same command again"),
    "disk_full": Kind(0, "free space, then type the same command again"),
    "error": Kind(2, "read the traceback in the log", 2),
    "killed": Kind(3, "it died without a word (signal, crash): read the end of its log", 2),
    "out_of_memory": Kind(2, "raise the stage's resources.mem_gb, or lower its batch or tokens_per_batch", 2),
    "timeout": Kind(3, "raise the stage's resources.time, or num_shards in a new run directory"),
    "node_failure": Kind(20, "the node went away; name it in slurm.exclude if it does so again", 5),
    "preempted": Kind(100, "use a partition or QOS that is not preempted"),
    "cancelled": Kind(3, "somebody cancelled it; type the same command again to go on", 5),
    "input_not_visible": Kind(5, "the shared file system does not show a finished input on that node"),
    "damaged": Kind(3, "its finished files were altered or removed: does something else write to the run directory?"),
    "dependency": Kind(1000, "its input failed"),
    "no_sentinel": Kind(2, "it ended well but left no proof of its work: is run_dir shared between all nodes?", 5),
    "lost": Kind(3, "the scheduler does not know it any more", 5),
}

_NODES_FAULT = frozenset({"user_error", "disk_full", "error", "killed", "input_not_visible", "no_sentinel"})
"""What a node with a broken driver, disk or mount makes of every shard that is sent to it."""


@dataclass(frozen=True)
class Standing:
    """How a shard stands after its failures."""

    last: Failure
    counts: Mapping[str, int]
    """Failures by kind since the shard last got further."""
    retry_at: float
    adjustment: Adjustment

    @property
    def given_up(self) -> bool:
        """Whether it failed more often than is tolerated."""
        return any(number > KINDS[kind].tolerated for kind, number in self.counts.items())


def classify(error: BaseException, starved: bool = False) -> str:
    """The class of an exception that ended a worker.

    ``starved``: the kernel killed another process of the task for want of memory meanwhile.
    """
    if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in FULL):
        return "disk_full"
    if isinstance(error, InputNotVisible):
        return "input_not_visible"
    if isinstance(error, UserError):
        return "user_error"
    named = f"{type(error).__name__}: {error}"
    if starved or isinstance(error, MemoryError) or any(sign in named.lower() for sign in _NO_MEMORY):
        return "out_of_memory"
    if any(sign in named for sign in _ANOTHER_PROCESS_DIED):
        return "killed"
    return "error"


def blames_another(error: BaseException) -> bool:
    """Whether all that an exception says is that another process has gone, of a gang's for example."""
    return any(sign in f"{type(error).__name__}: {error}" for sign in _CONNECTION_LOST)


_NO_MEMORY = ("outofmemoryerror", "out of memory", "can't allocate memory", "cannot allocate memory")

_CONNECTION_LOST = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError")
"""gloo's words, and the system's; NCCL's for "a network error or a remote process exiting prematurely"."""

_ANOTHER_PROCESS_DIED = ("EngineDeadError", "AcceleratorError", "CUDA error", *_CONNECTION_LOST)
"""An engine's process, the GPU's context, or another process of a gang: all that this one sees of a crash."""


def deaths(failures: Iterable[Failure], shard: int, attempts: Sequence[str]) -> set[str]:
    """Those of the attempts at a shard that may have been ended by what they did.

    They crashed, ran out of memory, or ran out of time without getting further.
    """
    found: set[str] = set()
    for failure in failures:
        hung = failure.kind == "timeout" and not failure.progressed
        if failure.shard != shard or not (hung or failure.kind in ("killed", "out_of_memory")):
            continue
        # The scheduler names no attempt: of those that a requeued task made, the last one died.
        element = failure.attempt.rpartition(".")[0]
        siblings = sorted((name for name in attempts if name.rpartition(".")[0] == element), key=_restarts)
        found |= set(siblings[-1:]) if failure.by_driver else {failure.attempt}
    return found


def _restarts(attempt: str) -> int:
    digits = attempt.rpartition(".r")[2]
    return int(digits) if digits.isdecimal() else -1


def standings(failures: Iterable[Failure], fence: int, bad: Container[str] = ()) -> dict[int, Standing]:
    """How the shards of a job stand after the failures of this launch, by shard.

    Failures are given oldest first. One on a ``bad`` node is not held against the shard.
    """
    found: dict[int, list[Failure]] = {}
    attempts: set[tuple[int, str]] = set()
    for failure in failures:
        if failure.fence < fence or failure.extra or (failure.shard, failure.attempt) in attempts:
            continue
        attempts.add((failure.shard, failure.attempt))
        if failure.node in bad and failure.kind in _NODES_FAULT:
            continue
        found.setdefault(failure.shard, []).append(failure)
    return {shard: _standing(each) for shard, each in found.items()}


def _standing(failures: Sequence[Failure]) -> Standing:
    counts: Counter[str] = Counter()
    for failure in failures:
        if failure.progressed and KINDS[failure.kind].tolerated > 0:
            counts.clear()
        else:
            counts[failure.kind] += 1
    last = failures[-1]
    return Standing(last, counts, last.time + backoff(last.kind, counts[last.kind]), _adjustment(failures))


def backoff(kind: str, count: int) -> float:
    """Seconds until a shard is tried again after its ``count``-th failure of this kind without getting further."""
    return 0.0 if count == 0 else min(KINDS[kind].backoff * 2.0 ** min(count - 1, 20), LONGEST_BACKOFF)


def _adjustment(failures: Sequence[Failure]) -> Adjustment:
    out_of_memory = min(sum(failure.kind == "out_of_memory" for failure in failures), _STEPS)
    too_slow = min(sum(failure.kind == "timeout" and not failure.progressed for failure in failures), _STEPS)
    blind = {failure.node for failure in failures if failure.kind == "input_not_visible" and _is_one(failure.node)}
    return Adjustment(
        memory=_MORE_MEMORY**out_of_memory,
        time=_MORE_TIME**too_slow,
        batch=_SMALLER_BATCH**out_of_memory,
        exclude=tuple(sorted(blind)),
    )


def bad_nodes(
    failures: Mapping[str, Sequence[Failure]], good: Mapping[str, AbstractSet[str]], fence: int
) -> dict[str, str]:
    """Nodes to keep off for the rest of this launch, each with the reason.

    A node that failed twice; and a black hole: one on which several shards of a job failed as soon as they had begun, while
    on no other node one did, and shards of the job are done or running elsewhere (``good``: nodes by job).
    """
    bad: dict[str, str] = {}
    went_away: dict[str, list[float]] = {}
    for job, recorded in failures.items():
        fast: dict[str, set[int]] = {}
        for failure in recorded:
            if failure.fence < fence or not _is_one(failure.node):
                continue
            if failure.kind == "node_failure":
                went_away.setdefault(failure.node, []).append(failure.time)
            elif failure.kind in _NODES_FAULT and not failure.progressed and _was_fast(failure):
                fast.setdefault(failure.node, set()).add(failure.shard)
        for node, shards in fast.items():
            if len(shards) >= _BLACK_HOLE_SHARDS and len(fast) == 1 and good.get(job, frozenset()) - {node}:
                bad[node] = f"{len(shards)} shards of {job} failed there as soon as they had begun, and none elsewhere"
    for node, times in went_away.items():
        if (number := _separate(times)) >= _NODE_FAILURES:
            bad[node] = f"it failed {number} times"
    return bad


def _was_fast(failure: Failure) -> bool:
    return failure.seconds is not None and failure.seconds < FAST


def _separate(times: Sequence[float]) -> int:
    """How many events these are: a node that fails once ends all that ran there at about the same time."""
    number, last = 0, -math.inf
    for time in sorted(times):
        if time - last > _ONE_NODE_FAILURE:
            number, last = number + 1, time
    return number


def _is_one(node: str) -> bool:
    """Whether this names one node: of several that a gang had, it is not known which one failed."""
    return bool(node) and not set(node) & set(",[ ")
