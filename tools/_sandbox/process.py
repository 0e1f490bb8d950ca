"""Processes that can be named again safely: started, found and stopped.

A pid alone may belong to somebody else by the time it is used, so a record
holds the boot, the pid and the start time, and a signal goes through a pidfd
whose start time was compared first. A record is written by the new process
itself before it becomes the daemon, so no daemon is ever without one, even
when its starter is killed half way.
"""

import contextlib
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from _sandbox.errors import SandboxError

# Every process of a sandbox carries its folder here, so orphans can be found without a record.
MARK = "SLURM_SANDBOX"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RECORD_AND_EXEC = (
    f'record=$1; shift; cat {_BOOT_ID} /proc/$$/stat > "$record.new" && mv "$record.new" "$record" && exec "$@"'
)


def wait_until(check: Callable[[], bool], seconds: float) -> bool:
    """Poll ``check`` until it holds or ``seconds`` have passed; say whether it held."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.03)
    return True


def _start_time_and_state(stat: str) -> tuple[str, str]:
    # The command name in field 2 may hold spaces and brackets; fields count from after its last bracket.
    fields = stat.rpartition(")")[2].split()
    return fields[19], fields[0]


@dataclass(frozen=True)
class Process:
    pid: int
    start_time: str
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """The process that has this pid now."""
        try:
            start_time, _ = _start_time_and_state(Path(f"/proc/{pid}/stat").read_text())
        except (OSError, IndexError):
            return None
        return cls(pid, start_time, _BOOT_ID.read_text().strip())

    @classmethod
    def recorded(cls, record: Path) -> "Process | None":
        try:
            boot_id, stat = record.read_text().splitlines()[:2]
            return cls(int(stat.split()[0]), _start_time_and_state(stat)[0], boot_id)
        except (OSError, ValueError, IndexError):
            return None  # no record, or the machine went down while it was written: nothing runs

    def alive(self) -> bool:
        try:
            start_time, state = _start_time_and_state(Path(f"/proc/{self.pid}/stat").read_text())
        except (OSError, IndexError):
            return False
        # A zombie has ended; whether it is reaped depends on the machine's init.
        return start_time == self.start_time and state not in "ZX" and _BOOT_ID.read_text().strip() == self.boot_id

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process and never to a later one with the same pid."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive():
                signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            pass
        finally:
            os.close(descriptor)


def launch(argv: list[str], record: Path, log: Path, environment: dict[str, str]) -> Process:
    """Start ``argv`` in a session of its own, its output in ``log``, its identity in ``record``."""
    record.unlink(missing_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            ["/bin/sh", "-c", _RECORD_AND_EXEC, "sh", str(record), *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    wait_until(lambda: record.exists() or child.poll() is not None, 10)
    if not (process := Process.recorded(record)):
        raise SandboxError(f"could not start {argv[0]}; see {log}")
    return process


def stop(processes: Iterable[Process], grace: float) -> None:
    """SIGTERM, at most ``grace`` seconds of patience, SIGKILL."""
    left = [process for process in processes if process.alive()]
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        for process in left:
            process.signal(number)
        wait_until(functools.partial(_all_ended, left), patience)
        left = [process for process in left if process.alive()]
    if left:
        pids = ", ".join(str(process.pid) for process in left)
        raise SandboxError(f"pids {pids} outlived SIGKILL (blocked in the kernel?); look at /proc/<pid>/stack")


def _all_ended(processes: list[Process]) -> bool:
    return not any(process.alive() for process in processes)


def marked(folder: Path, conf: Path, node: str | None = None) -> list[Process]:
    """Every process of this sandbox, or only those which its jobs run on one node.

    The daemons and their children carry MARK. A job's processes have the
    environment of whoever submitted it, but slurmstepd adds SLURMD_NODENAME;
    with SLURM_CONF it tells them from the user's own shell, which has only the latter.
    """
    own = _own_ancestry()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in own:
            continue
        process = Process.of(int(entry.name))
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            logs = _step_logs(entry, folder)
        except OSError:
            continue  # it has ended
        nodes = [item.partition(b"=")[2].decode() for item in environment if item.startswith(b"SLURMD_NODENAME=")]
        if f"SLURM_CONF={conf}".encode() not in environment:
            nodes = []
        of_node = node in nodes or f"steps-{node}.log" in logs
        of_any = bool(nodes or logs) or f"{MARK}={folder}".encode() in environment
        if process and (of_node if node else of_any):
            found.append(process)
    return found


def _step_logs(entry: Path, folder: Path) -> set[str]:
    """The sandbox's step logs which a slurmstepd holds open; its title overwrites its environment."""
    if not (entry / "comm").read_text().startswith("slurmstepd"):
        return set()
    names = set()
    for descriptor in (entry / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed since it was listed
            target = Path(os.readlink(descriptor))
            if target.parent == folder / "logs":
                names.add(target.name)
    return names


def _own_ancestry() -> set[int]:
    """This process and its parents: a job that stops its own sandbox must live to finish it."""
    pids, pid = set(), os.getpid()
    while pid > 0 and pid not in pids:
        pids.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            break
    return pids
