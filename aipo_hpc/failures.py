"""Classes of failure: what each means, how often it is tolerated for one shard, and what the user is told."""

from collections.abc import Mapping
from dataclasses import dataclass

from aipo_hpc.durable import FULL
from aipo_hpc.errors import DiskFull, InputNotVisible, UserError


@dataclass(frozen=True)
class Kind:
    """``tolerated``: so many failures of this kind are retried per shard and launch, the next one ends the shard."""

    tolerated: int
    advice: str


KINDS: Mapping[str, Kind] = {
    "user_error": Kind(0, "mend what the message says, then type the same command again"),
    "disk_full": Kind(0, "free space, then type the same command again"),
    "error": Kind(2, "read the traceback in the log"),
    "killed": Kind(3, "it died without a word (signal, crash): read the end of its log"),
    "out_of_memory": Kind(2, "raise the stage's resources.mem_gb, or lower its batch or tokens_per_batch"),
    "timeout": Kind(10, "raise the stage's resources.time, or num_shards in a new run directory"),
    "node_failure": Kind(20, "the node went away; name it in slurm.exclude if it does so again"),
    "preempted": Kind(100, "use a partition or QOS that is not preempted"),
    "cancelled": Kind(3, "somebody cancelled it; type the same command again to go on"),
    "input_not_visible": Kind(5, "the shared file system does not show a finished input on that node"),
    "dependency": Kind(1000, "its input failed"),
    "no_sentinel": Kind(2, "it ended well but left no proof of its work: is run_dir shared between all nodes?"),
    "lost": Kind(3, "the scheduler does not know it any more"),
}


def classify(error: BaseException) -> str:
    """The class of an exception that ended a worker."""
    if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in FULL):
        return "disk_full"
    if isinstance(error, InputNotVisible):
        return "input_not_visible"
    if isinstance(error, UserError):
        return "user_error"
    named = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or "OutOfMemoryError" in named or "out of memory" in named.lower():
        return "out_of_memory"
    return "error"
