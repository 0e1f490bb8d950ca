"""A job's folder: its sentinels, attempts and failures, by the protocol that the first page of `store.py` tells."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Any

from aipo_hpc.durable import (
    full_disk_named,
    hash_file,
    link_new,
    list_names,
    sync_folder,
    visible_size,
    write_durably,
    write_synced,
)
from aipo_hpc.errors import InputNotVisible
from aipo_hpc.sentinel import Blame, Failure, Output, Sentinel
from aipo_hpc.task import ADVANCED

SET_ASIDE = "set-aside"
JOB = "job.json"
_PRUNED = ".pruned"
_SHARDS, _DONE, _FAILED, _LOGS = "shards", "done", "failed", "logs"


class JobFolder:
    """The files of one job. Parsed sentinels are remembered, so a look costs one listing and only news is read."""

    def __init__(self, run: Path, name: str) -> None:
        self.name = name
        self.path = run / name
        self._run = run
        self._sentinels: dict[str, Sentinel] = {}
        self._doubted: dict[str, tuple[object, ...]] = {}
        self._failures: dict[str, Failure] = {}
        self._noted: frozenset[str] = frozenset()
        self._pruned: dict[str, str] = {}
        self.reports: list[str] = []
        """What was found wrong with files, to be told once."""

    @property
    def logs(self) -> Path:
        """Folder of envelopes and task output."""
        return self.path / _LOGS

    def create(self, job: dict[str, Any]) -> None:
        """Write job.json and make the folders."""
        with full_disk_named(self.path):
            for folder in (_SHARDS, _DONE, _FAILED, _LOGS):
                (self.path / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.read_job() != job:  # a file that stays is never seen half old and half new
            write_durably(self.path / JOB, json.dumps(job, indent=1) + "\n")

    def read_job(self) -> dict[str, Any] | None:
        """job.json, or None if it is not there or not whole."""
        try:
            job: dict[str, Any] = json.loads((self.path / JOB).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return job

    # -- sentinels ---------------------------------------------------------------------------------------------------

    def done(self, fingerprint: str, only: Container[int] | None = None) -> dict[int, Sentinel]:
        """The finished shards: whole sentinels that bear the fingerprint. Others are reported, never trusted.

        With ``only``, a look at those shards alone: a task needs few of the many that its job may have.
        """
        found: dict[int, Sentinel] = {}
        for name in self._list_done():
            digits = name.removesuffix(".json")
            if not digits.isdecimal() or (only is not None and int(digits) not in only):
                continue
            sentinel = self._sentinels.get(name)
            if sentinel is None or sentinel.fingerprint != fingerprint:
                sentinel = self._look_at(name, fingerprint)
            if sentinel is not None:
                found[int(digits)] = sentinel
        return found

    def _list_done(self) -> list[str]:
        names = list_names(self.path / _DONE)
        self._noted = frozenset(name for name in names if name.endswith(_PRUNED))
        return names

    def _look_at(self, name: str, fingerprint: str) -> Sentinel | None:
        """A sentinel that is not known yet, or was doubted: another attempt may have put a good one in its place."""
        path = os.path.join(self.path, _DONE, name)  # not a Path: a first look is at thousands of them
        try:
            with open(path, "rb") as file:
                state = os.fstat(file.fileno())
                seen = (state.st_ino, state.st_size, state.st_mtime_ns, fingerprint)
                if self._doubted.get(name) == seen:
                    return None
                content = file.read()
        except OSError:
            # Listed, but not to be opened on this node yet: the next look may find it.
            return None
        try:
            sentinel = self._parse(name, content)
            if sentinel.fingerprint != fingerprint:
                raise ValueError("it was made with other settings")
        except ValueError as error:
            self._doubted[name] = seen
            self.reports.append(f"{path}: not believed, {error}; the shard counts as not done")
            return None
        self._sentinels[name] = sentinel
        return sentinel

    def _parse(self, name: str, content: bytes) -> Sentinel:
        """Parse a file of sentinels. Raises ValueError for one that is not whole or not in its place."""
        sentinel = Sentinel.from_json(content.decode())
        if (sentinel.job, f"{sentinel.shard:05d}.json") != (self.name, name):
            raise ValueError(f"it speaks of {sentinel.job} shard {sentinel.shard}")
        return sentinel

    def publish(self, sentinel: Sentinel) -> bool:
        """Make a shard done. False if another attempt was first: its sentinel stands, this attempt's files are removed."""
        name = f"{sentinel.shard:05d}.json"
        final = self.path / _DONE / name
        temporary = self.path / _DONE / f".{name}.{sentinel.attempt}.tmp"
        with full_disk_named(final):
            while True:
                write_synced(temporary, sentinel.to_json())
                if link_new(temporary, final):
                    return True
                try:
                    standing = self._parse(name, final.read_bytes())
                except FileNotFoundError:
                    time.sleep(0.1)  # retracted just now, or another node's and not to be opened here yet
                    continue
                except ValueError:
                    self._set_aside(final)
                    continue
                if standing == sentinel:
                    # A server that repeats a link whose answer was lost says that the name is taken: by this very one.
                    return True
                if standing.fingerprint == sentinel.fingerprint and standing.attempt != sentinel.attempt:
                    shutil.rmtree(self.attempt_folder(sentinel.shard, sentinel.attempt), ignore_errors=True)
                    return False
                self._set_aside(final)

    def retract(self, shard: int) -> None:
        """Move a sentinel whose payload turned out to be missing or altered out of the way; the shard is not done."""
        name = f"{shard:05d}.json"
        self._set_aside(self.path / _DONE / name)
        self._set_aside(self._note(shard))
        self._sentinels.pop(name, None)

    def _set_aside(self, path: Path) -> None:
        target = self._run / SET_ASIDE / f"{self.name.replace('/', '.')}.{path.name}.{time.time_ns()}"
        target.parent.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):
            os.rename(path, target)
            sync_folder(path.parent)

    # -- attempts ----------------------------------------------------------------------------------------------------

    def attempt_folder(self, shard: int, attempt: str) -> Path:
        """Where an attempt keeps its payload."""
        return self.path / _SHARDS / f"{shard:05d}" / attempt

    def begin_attempt(self, shard: int, attempt: str) -> tuple[Path, tuple[Path, ...]]:
        """Make the attempt's folder; also return those of earlier attempts, oldest first."""
        folder = self.attempt_folder(shard, attempt)
        with full_disk_named(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        others: list[tuple[float, str]] = []
        for name in list_names(folder.parent):
            with suppress(FileNotFoundError):  # an attempt that came second has just removed its folder
                if name != attempt:
                    others.append(((folder.parent / name).stat().st_mtime, name))
        return folder, tuple(folder.parent / name for _, name in sorted(others))

    def advanced(self, shard: int, element: str) -> bool:
        """Whether an attempt of this element (of which a requeued task makes several) got further than those before."""
        folder = self.path / _SHARDS / f"{shard:05d}"
        attempts = [name for name in list_names(folder) if name.rsplit(".", 1)[0] == element]
        return any(ADVANCED in list_names(folder / name) for name in attempts)

    def files(self, sentinel: Sentinel) -> tuple[Path, ...]:
        """The output files of a finished shard."""
        folder = self.attempt_folder(sentinel.shard, sentinel.attempt)
        return tuple(folder / output.path for output in sentinel.outputs)

    def wait_for_payload(
        self, sentinel: Sentinel, part: str, timeout: float, deadline: float | None = None
    ) -> tuple[Path, ...]:
        """The output files of ``part`` (a file, or a folder/), once each is visible here with its size and hash.

        Waits, refreshing by listing the parent folder, at most ``timeout`` seconds (from when the caller began, if it
        says until when on the monotonic clock); then raises InputNotVisible.
        """
        deadline = time.monotonic() + timeout if deadline is None else deadline
        found: list[Path] = []
        for output in sentinel.outputs:
            if output.path != part and not (part.endswith("/") and output.path.startswith(part)):
                continue
            path = self.attempt_folder(sentinel.shard, sentinel.attempt) / output.path
            while True:
                began = time.monotonic()
                seen = wrong_with(path, output)
                if seen is None:
                    break
                self._list_done()
                if self.pruned(sentinel) == part:
                    raise InputNotVisible(
                        f"{path}: was deleted when nobody needed it any more (keep_models), and is needed again. "
                        "Type the launch command again: it has it computed anew.",
                        (Blame(self.name, sentinel.shard, sentinel.digest),),
                    )
                now = time.monotonic()
                if now > deadline:
                    raise InputNotVisible(
                        f"{path}: the sentinel of {self.name} shard {sentinel.shard} states {output.bytes} bytes, but on "
                        f"{os.uname().nodename} it is {seen} after {timeout:g} s. If the driver sees the same, it has the "
                        "shard computed again.",
                        (Blame(self.name, sentinel.shard, sentinel.digest),),
                    )
                time.sleep(max(0.2, now - began))  # hashing a large file takes its time
            found.append(path)
        return tuple(found)

    def damage(self, sentinel: Sentinel) -> str | None:
        """What is wrong with the payload of a finished shard, as this node sees it now; None if it is whole.

        What was pruned is not missed.
        """
        folder = self.attempt_folder(sentinel.shard, sentinel.attempt)
        pruned = self.pruned(sentinel)
        for output in sentinel.outputs:
            if pruned and output.path.startswith(pruned):
                continue
            if (seen := wrong_with(folder / output.path, output)) is not None:
                return f"{folder / output.path} is {seen}"
        return None

    def prune(self, sentinel: Sentinel, part: str) -> None:
        """Note durably that a folder/ of a finished shard's payload is no longer kept, then delete it.

        A crash in between leaves files that nobody misses or reads; the next call deletes them. With it go the folders
        of other attempts at the shard, which hold checkpoints and models too.
        """
        if self.pruned(sentinel) != part:
            write_durably(self._note(sentinel.shard), json.dumps({"digest": sentinel.digest, "part": part}) + "\n")
            self._list_done()
        kept = self.attempt_folder(sentinel.shard, sentinel.attempt)
        for name in list_names(kept.parent):
            shutil.rmtree(kept.parent / name if name != kept.name else kept / part, ignore_errors=True)

    def pruned(self, sentinel: Sentinel) -> str:
        """The folder/ of a finished shard's payload that is no longer kept; empty if all of it is."""
        if self._note(sentinel.shard).name not in self._noted:
            return ""
        if sentinel.digest not in self._pruned:
            with suppress(OSError, ValueError, KeyError, TypeError):
                note = json.loads(self._note(sentinel.shard).read_text(encoding="utf-8"))
                self._pruned[str(note["digest"])] = str(note["part"])
        return self._pruned.get(sentinel.digest, "")

    def _note(self, shard: int) -> Path:
        return self.path / _DONE / f"{shard:05d}{_PRUNED}"

    def forget(self, shard: int) -> Sentinel | None:
        """Read a shard's sentinel anew at the next look; returns what was remembered of it."""
        return self._sentinels.pop(f"{shard:05d}.json", None)

    def logs_of(self, sentinel: Sentinel) -> list[Path]:
        """What the processes of a finished shard printed."""
        ids = sentinel.scheduler
        if "slurm_array_job_id" in ids:
            task = f"{ids['slurm_array_job_id']}_{ids['slurm_array_task_id']}"
        else:
            task = ids.get("slurm_job_id") or ids.get("submitit_local_job_id") or "none"
        return sorted(self.logs.glob(f"{task}_*_log.out"))

    # -- failures ----------------------------------------------------------------------------------------------------

    def failures(self) -> list[Failure]:
        """All recorded failures, oldest first; unreadable records are left out."""
        for name in list_names(self.path / _FAILED):
            if name in self._failures or name.startswith("."):
                continue
            with suppress(OSError, ValueError, TypeError, AttributeError):
                self._failures[name] = Failure.from_json((self.path / _FAILED / name).read_text(encoding="utf-8"))
        return sorted(self._failures.values(), key=lambda failure: failure.time)

    def record_failure(self, failure: Failure) -> Path:
        """Keep a failure under the shard's next free number."""
        folder = self.path / _FAILED
        text = json.dumps(dataclasses.asdict(failure), indent=1) + "\n"
        with full_disk_named(folder):
            number = 1 + sum(name.startswith(f"{failure.shard:05d}.") for name in list_names(folder))
            while True:
                temporary = folder / f".{failure.shard:05d}.{os.uname().nodename}.{os.getpid()}.tmp"
                write_synced(temporary, text)
                path = folder / f"{failure.shard:05d}.{number}.json"
                if link_new(temporary, path):
                    return path
                number += 1


def wrong_with(path: Path, output: Output) -> str | None:
    """What a file is instead of what its sentinel states, as seen from this node; None if it is that."""
    size = visible_size(path)
    if size is None:
        return "not there"
    if size != output.bytes:
        return f"{size} bytes"
    try:
        return None if hash_file(path) == output.sha256 else "of other content"
    except FileNotFoundError:
        return "not there"
