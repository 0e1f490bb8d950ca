"""The driver's lease: one driver per run, on file systems where locks do not hold.

    driver.lease/owner.json   host, pid, boot id and start time of the process; renewed while it lives
    driver.lease/cancel       someone asks the driver to stop the run

Making a folder is atomic also on NFS, so whoever makes it holds the lease. It is taken over by renaming the folder away,
which only one can do: at once if its owner is seen to be dead on this host, else when it was not renewed for a while.
"""

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

from aipo_hpc.durable import list_names, write_durably
from aipo_hpc.errors import RunError
from aipo_hpc.processes import start_time
from aipo_hpc.store import LEASE, Run

_RENEW_SECONDS = 15.0
_EXPIRES_SECONDS = 120.0
_OWNER = "owner.json"
_CANCEL = "cancel"


class Lease:
    """Held as a context manager. Raises RunError on entry if another driver holds it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._folder = run.path / LEASE
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._token = f"{platform.node()}:{os.getpid()}:{time.time_ns()}"

    def __enter__(self) -> "Lease":
        while True:
            try:
                self._folder.mkdir(mode=0o700)
            except FileExistsError:
                self._take_over()
            else:
                self._write()
                self._thread.start()
                return self

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

    def _write(self) -> None:
        owner = {
            "token": self._token,
            "host": platform.node(),
            "pid": os.getpid(),
            "started": start_time(os.getpid()),
            "boot_id": _boot_id(),
            "heartbeat": time.time(),
        }
        write_durably(self._folder / _OWNER, json.dumps(owner, indent=1) + "\n")

    def _renew(self) -> None:
        while not self._stop.wait(_RENEW_SECONDS):
            if not self.holds():
                return
            with suppress(OSError):
                self._write()

    def _take_over(self) -> None:
        owner = read_owner(self._run)
        if owner is None:
            # Its maker died between making the folder and writing into it, or is just about to write.
            with suppress(FileNotFoundError):
                age = time.time() - self._folder.stat().st_mtime
                if age < _RENEW_SECONDS:
                    time.sleep(0.2)
                    return
        elif is_alive(owner):
            raise RunError(
                f"{self._run.path}: is being driven by process {owner['pid']} on {owner['host']} "
                f"(last sign of life {time.time() - owner['heartbeat']:.0f} s ago). To watch it, type: "
                f"python -m aipo_hpc status {self._run.path}; to stop it: python -m aipo_hpc cancel {self._run.path}"
            )
        with suppress(FileNotFoundError):
            aside = self._folder.with_name(f"{LEASE}.{time.time_ns()}")
            os.rename(self._folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
            self._run.append_journal("lease_taken_over", of=owner)


def request_cancel(run: Run) -> None:
    """Ask the living driver of a run to stop it."""
    (run.path / LEASE / _CANCEL).touch()


def read_owner(run: Run) -> dict[str, Any] | None:
    """Who drives the run, or None."""
    try:
        owner: dict[str, Any] = json.loads((run.path / LEASE / _OWNER).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return owner


def is_alive(owner: dict[str, Any]) -> bool:
    """Whether the owner of a lease lives: known for sure on its own host, else judged by its last sign of life."""
    if owner["host"] == platform.node() and owner["boot_id"] == _boot_id():
        return start_time(int(owner["pid"])) == str(owner["started"])
    return time.time() - float(owner["heartbeat"]) < _EXPIRES_SECONDS


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
