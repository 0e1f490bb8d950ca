"""The folder of one sandbox: everything it writes is below it.

    <dir>/
      sandbox.json     settings, ports and the short folder, written before anything starts
      ready            present once a start went through; without it the next start begins afresh
      slurm.conf, gres.conf, cgroup.conf, slurmdbd.conf, accounts.sql, munge.key
      pids/<daemon>    boot id and /proc/<pid>/stat line of each daemon
      logs/<daemon>.log, logs/steps-<node>.log
      state/           slurmctld's state
      db/              MariaDB's data
      dev/nvidia[0-7]  the fake GPUs
      run/             sockets and the nodes' spools
      cgroup/memory    link to the sandbox's memory cgroup, where memory limits are enforced

A unix socket's path may have about 107 bytes. When <dir> is too long for that,
``run`` is a fresh short folder under /tmp, named in sandbox.json and removed by stop.
"""

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from _sandbox.errors import SandboxError

_LONGEST_SOCKET = len("/n999/n999_4294967295.4294967295.0")
_FILES = ("ready", "slurm.conf", "gres.conf", "cgroup.conf", "slurmdbd.conf", "accounts.sql", "munge.key", "munge.seed")
_FOLDERS = ("pids", "state", "db", "dev", "run", "cgroup", "logs")


@dataclass(frozen=True)
class Settings:
    nodes: int = 4
    accounting: bool = True
    enforce_limits: bool = False
    enforce_memory: bool = False
    max_array_size: int = 1001
    min_job_age: int = 300
    slurmd_timeout: int = 60

    @property
    def node_names(self) -> list[str]:
        return [f"n{i}" for i in range(1, self.nodes + 1)]

    @property
    def daemons(self) -> list[str]:
        """In the order they start."""
        accounting = ["mariadbd", "slurmdbd"] if self.accounting else []
        return ["munged", *accounting, "slurmctld", *self.node_names]


@dataclass(frozen=True)
class Folder:
    root: Path
    settings: Settings
    ports: dict[str, int]
    run: Path

    @property
    def conf(self) -> Path:
        return self.root / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        return self.run / "munge.socket"

    @property
    def ready(self) -> Path:
        return self.root / "ready"

    def log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    def record(self, name: str) -> Path:
        return self.root / "pids" / name

    def remove(self, keep_logs: bool) -> None:
        """Remove what a start made, and nothing else that may lie in the folder."""
        if self.run.parent != self.root:
            shutil.rmtree(self.run, ignore_errors=True)
        for name in _FOLDERS:
            if not (keep_logs and name == "logs"):
                shutil.rmtree(self.root / name, ignore_errors=True)
        for name in _FILES:
            (self.root / name).unlink(missing_ok=True)
        # Last, and only with everything else gone: it is what says that this folder is ours to clear.
        if not keep_logs:
            (self.root / "sandbox.json").unlink(missing_ok=True)


def create(root: Path, settings: Settings) -> Folder:
    """Claim an empty folder, choose ports, make the tree."""
    if not re.fullmatch(r"[\w./+-]+", str(root)):
        raise SandboxError(
            f"{root}: Slurm's configuration takes only letters, digits and ._+-/ in a path; choose another --dir"
        )
    foreign = sorted(path.name for path in root.iterdir())
    if foreign:
        raise SandboxError(f"{root} is not a sandbox and not empty ({foreign[0]}, ...); choose another --dir")
    run = root / "run"
    if len(str(run)) + _LONGEST_SOCKET > 107:
        run = Path(tempfile.mkdtemp(prefix="slurm-sandbox-", dir="/tmp"))
        run.chmod(0o755)
    folder = Folder(root, settings, _free_ports(settings.daemons), run)
    text = json.dumps({"settings": asdict(settings), "ports": folder.ports, "run": str(run)}, indent=1)
    (root / "sandbox.json.new").write_text(text + "\n")
    (root / "sandbox.json.new").rename(root / "sandbox.json")
    for name in _FOLDERS:
        (root / name).mkdir()
    return folder


def load(root: Path) -> Folder | None:
    """The sandbox that this folder holds, if it holds one."""
    (root / "sandbox.json.new").unlink(missing_ok=True)  # a starter was killed while it wrote
    path = root / "sandbox.json"
    try:
        data = json.loads(path.read_text())
        return Folder(root, Settings(**data["settings"]), data["ports"], Path(data["run"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise SandboxError(
            f"{path} cannot be read ({error}); remove {root} by hand once nothing runs from it"
        ) from error


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """One start or stop per folder at a time. The lock is on the folder itself, so it leaves no file."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _free_ports(daemons: list[str]) -> dict[str, int]:
    """Random free ports below the range the kernel hands out to outgoing connections."""
    ports: dict[str, int] = {}
    with contextlib.ExitStack() as held:
        for name in daemons:
            if name == "munged":
                continue
            for port in random.sample(range(10_000, 32_000), 200):
                probe = held.enter_context(socket.socket())
                try:
                    probe.bind(("0.0.0.0", port))
                except OSError:
                    continue
                ports[name] = port
                break
            else:
                raise SandboxError(
                    "found no free TCP port between 10000 and 32000; close some listeners and start again"
                )
    return ports
