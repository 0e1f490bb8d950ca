"""The driver's lease: one driver per run, on file systems where locks do not hold.

    driver.lease/owner.json   host, pid, boot id and start time of the process; renewed while it lives
    driver.lease/cancel       someone asks the driver to stop the run

Renaming a folder is atomic also on NFS, and fails if the new name is a folder with something in it. So a driver prepares its
folder aside and renames it to the lease: that succeeds for one. The lease of a dead owner is first renamed to a name that
follows from the owner alone, where it stays: of two that found the same owner dead, the second fails there, and cannot take
the first one's new lease away. An owner on this host is seen to be dead at once, else when it did not renew for a while.
"""

import errno
import json
import os
import platform
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from aipo_hpc.durable import full_disk_named, list_names, write_durably
from aipo_hpc.errors import RunError
from aipo_hpc.job_folder import SET_ASIDE
from aipo_hpc.processes import start_time
from aipo_hpc.store import LEASE, Run

_RENEW_SECONDS = 15.0
EXPIRES_SECONDS = 120.0
"""A driver elsewhere that has not renewed its lease for so long is taken for dead."""
_OWNER = "owner.json"
_CANCEL = "cancel"
_FIELDS = {"token", "host", "pid", "started", "boot_id", "heartbeat"}


class Lease:
    """Held as a context manager. Raises RunError on entry if another driver holds it, and for ``patience`` seconds on."""

    def __init__(self, run: Run, patience: float = 0.0) -> None:
        self._patience = patience
        self._run = run
        self._folder = run.path / LEASE
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._token = f"{platform.node()}:{os.getpid()}:{time.time_ns()}"

    def __enter__(self) -> "Lease":
        deadline = time.monotonic() + self._patience
        while True:
            if self._take_free():
                self._thread.start()
                return self
            try:
                self._take_over()
            except RunError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self.holds():
            shutil.rmtree(self._folder, ignore_errors=True)

    def holds(self) -> bool:
        """Whether the lease is still this driver's (another one may have taken it after a long standstill)."""
        owner = read_owner(self._run)
        return owner is not None and owner.get("token") == self._token

    def cancel_requested(self) -> bool:
        """Whether someone asked, by `request_cancel`, that this driver stops the run."""
        return _CANCEL in list_names(self._folder)

    def _take_free(self) -> bool:
        """Take the lease if nobody has it."""
        prepared = self._folder.with_name(f".{LEASE}.{self._token}")
        with full_disk_named(prepared):
            prepared.mkdir(mode=0o700, exist_ok=True)
            self._write(prepared)
        try:
            os.rename(prepared, self._folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
                raise
            shutil.rmtree(prepared, ignore_errors=True)
        # By what stands there, not by the answer: a server may repeat a rename whose answer was lost.
        return self.holds()

    def _write(self, folder: Path) -> None:
        owner = {
            "token": self._token,
            "host": platform.node(),
            "pid": os.getpid(),
            "started": start_time(os.getpid()),
            "boot_id": _boot_id(),
            "heartbeat": time.time(),
        }
        write_durably(folder / _OWNER, json.dumps(owner, indent=1) + "\n")

    def _renew(self) -> None:
        while not self._stop.wait(_RENEW_SECONDS):
            if not self.holds():
                return
            with suppress(OSError):
                self._write(self._folder)

    def _take_over(self) -> None:
        """Move the lease of a dead owner out of the way. Raises RunError if the owner lives."""
        owner = read_owner(self._run)
        if owner is None:
            # Its owner is just removing it, or was killed at that. An empty folder is in nobody's way.
            time.sleep(0.2)
            with suppress(FileNotFoundError):
                state = self._folder.stat()
                if time.time() - state.st_mtime > _RENEW_SECONDS and list_names(self._folder):
                    self._set_aside(f"unreadable.{state.st_ino}.{state.st_mtime_ns}")
            return
        if is_alive(owner):
            raise RunError(
                f"{self._run.path}: is being driven by process {owner['pid']} on {owner['host']} "
                f"(last sign of life {time.time() - owner['heartbeat']:.0f} s ago). To watch it, type: "
                f"python -m aipo_hpc status {self._run.path}; to stop it: python -m aipo_hpc cancel {self._run.path}"
            )
        if self._set_aside(owner["token"]):
            self._run.append_journal("lease_taken_over", of=owner)

    def _set_aside(self, name: str) -> bool:
        """Rename the lease that was seen, after what tells it from any other; False if somebody else was first."""
        aside = self._run.path / SET_ASIDE / f"{LEASE}.{name}"
        aside.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            os.rename(self._folder, aside)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
                raise
            return False
        return True


def request_cancel(run: Run) -> None:
    """Ask the living driver of a run to stop it; one that has just gone needs no asking."""
    with suppress(FileNotFoundError):
        (run.path / LEASE / _CANCEL).touch()


def read_owner(run: Run) -> dict[str, Any] | None:
    """Who drives the run, or None: nobody, or the file does not tell."""
    try:
        owner = json.loads((run.path / LEASE / _OWNER).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return owner if isinstance(owner, dict) and owner.keys() >= _FIELDS else None


def is_alive(owner: dict[str, Any]) -> bool:
    """Whether the owner of a lease lives: known for sure on its own host, else judged by its last sign of life."""
    if owner["host"] == platform.node() and owner["boot_id"] == _boot_id():
        return start_time(int(owner["pid"])) == str(owner["started"])
    return time.time() - float(owner["heartbeat"]) < EXPIRES_SECONDS


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
