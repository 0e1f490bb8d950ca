"""Processes around this one that the kernel killed because their memory cgroup was full, as it counts them.

Slurm puts each task in a cgroup and calls a job OUT_OF_MEMORY when that count rose. A process that outlives another one, an
engine's or a loader's, learns from it what the other died of: the exception that it gets says nothing of memory.
"""

from contextlib import suppress
from pathlib import Path

_OWN = Path("/proc/self/cgroup")
_MOUNTED = Path("/sys/fs/cgroup")


def memory_kills(own: Path = _OWN, mounted: Path = _MOUNTED) -> int:
    """How many the kernel has killed so far in this process's cgroup, of either version; 0 where that cannot be told."""
    groups = [line.split(":", 2) for line in _text(own).splitlines() if line.count(":") >= 2]
    for _, controllers, path in groups:
        if "memory" in controllers.split(","):
            return _count(mounted / "memory", path, "memory.oom_control")
    for _, controllers, path in groups:
        if not controllers:
            return _count(mounted, path, "memory.events")
    return 0


def _count(root: Path, path: str, name: str) -> int:
    # A container may see its own cgroup as the root, by whatever path the machine outside calls it.
    for folder in (root / path.strip("/"), root):
        for line in _text(folder / name).splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill" and value.strip().isdecimal():
                return int(value)
    return 0


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""
