"""The memory cgroup of one sandbox: every cgroup that its slurmds make for their jobs is below it.

slurmd makes slurm_<node> at CgroupMountpoint/memory, and each sandbox has nodes of the same names. So its
CgroupMountpoint is a folder of its own, <dir>/cgroup, in which memory is a link to a group of its own.
"""

import contextlib
import hashlib
from pathlib import Path

from _sandbox.errors import SandboxError
from _sandbox.process import wait_until

_HIERARCHY = Path("/sys/fs/cgroup/memory")
_SWAP_LIMIT = "memory.memsw.limit_in_bytes"


def group(root: Path) -> Path:
    """The sandbox's group; found again without a record, so it is never lost."""
    return _HIERARCHY / f"slurm-sandbox-{hashlib.sha256(str(root).encode()).hexdigest()[:12]}"


def make(root: Path) -> None:
    """Make the group and the link to it; a machine where that cannot be is told what it lacks."""
    own = group(root)
    try:
        if not (_HIERARCHY / "memory.oom_control").exists():
            raise FileNotFoundError(f"there is no {_HIERARCHY}/memory.oom_control")
        own.mkdir(exist_ok=True)
        if "oom_kill " not in (own / "memory.oom_control").read_text():
            raise FileNotFoundError("the kernel counts no processes killed for memory, it is older than 4.13")
    except OSError as error:
        remove(root)
        raise SandboxError(
            f"memory limits cannot be enforced here: {error}. --enforce-memory needs a machine with the memory controller "
            f"of cgroup version 1 at {_HIERARCHY}, in which root may make groups; start without it, or elsewhere"
        ) from error
    (root / "cgroup" / "memory").symlink_to(own)


def limits_swap(root: Path) -> bool:
    """Whether this kernel can limit a group's swap too."""
    return (group(root) / _SWAP_LIMIT).exists()


def remove(root: Path) -> None:
    """Remove the group with all that slurmd left in it; no process may be in it any more."""
    own = group(root)
    # The kernel takes a moment to see that the last process has gone.
    if not wait_until(lambda: _removed(own), 10):
        raise SandboxError(f"{own} cannot be removed; end the processes in its cgroup.procs files, then run stop again")


def _removed(own: Path) -> bool:
    for each in sorted((path for path in own.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            each.rmdir()
    with contextlib.suppress(OSError):
        own.rmdir()
    return not own.exists()
