"""The run directory: the one module that knows its files, and the protocol that makes them trustworthy.

    <run>/
      recipe.json                 resolved recipe, written before the first submission
      journal.jsonl               append-only: launches, submissions, adoptions, decisions; a torn last line is ignored
      driver.lease/               who drives the run: owner.json, renewed while the driver lives
      chain/                      envelopes and output of the steps of drive=chain
      policy-<digest>/            the initial policy with the recipe's chat template: links to its files
      set-aside/                  what `reset` and corrupt files were moved to; nothing in it is ever deleted
      iter-00/
        generate/
          job.json                settings, inputs, fingerprint, number of shards: all that a worker needs
          shards/00003/<attempt>/ payload of one attempt at shard 3; nobody else writes there
          done/00003.json         THE SENTINEL: shard 3 is done
          done/00003.pruned       ... and part of its payload is no longer kept: which, and of which sentinel
          claims/00003/           who does which part of shard 3 while it is being done, see claims.py
          failed/00003.2.json     shard 3's second failure: class, message, end of the traceback, node, log
          logs/                   submitit's envelopes and the output of each task
        rank/  pairs/  reference/  train/  answers/  evaluate/
        manifest.json             what the iteration was made of and came to; made of the above, and made again if need be
      iter-01/ ...
      report/                     tables and plots that were asked for

A shard is done if and only if its sentinel is there, is whole (it carries a digest of itself) and bears the job's
fingerprint. A sentinel is written last: a temporary file in the same folder, fsync, link to its name, fsync of the folder.
A link never replaces: of two attempts at one shard the first sentinel wins, and the other attempt removes its own folder.
Readers find sentinels by listing the folder, which asks the server where a look-up by name may be answered from a stale
cache, and then check that the payload has the size, and the hash, that the sentinel states.
"""

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
from aipo_hpc.errors import InputNotVisible, RunError
from aipo_hpc.ownership import make_private
from aipo_hpc.sentinel import Blame, Failure, Output, Sentinel
from aipo_hpc.task import ADVANCED

RECIPE = "recipe.json"
JOURNAL = "journal.jsonl"
LEASE = "driver.lease"
SET_ASIDE = "set-aside"
_CHAIN = "chain"
MANIFEST = "manifest.json"
REPORT = "report"
_JOB = "job.json"
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
            write_durably(self.path / _JOB, json.dumps(job, indent=1) + "\n")

    def read_job(self) -> dict[str, Any] | None:
        """job.json, or None if it is not there or not whole."""
        try:
            job: dict[str, Any] = json.loads((self.path / _JOB).read_text(encoding="utf-8"))
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


class Run:
    """A run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self._jobs: dict[str, JobFolder] = {}

    @property
    def chain(self) -> Path:
        """Folder of the envelopes and the output of a chain's steps."""
        return self.path / _CHAIN

    def job(self, name: str) -> JobFolder:
        """The folder of a job (the same object each time, so that it remembers what it has read)."""
        if name not in self._jobs:
            self._jobs[name] = JobFolder(self.path, name)
        return self._jobs[name]

    def job_names(self) -> list[str]:
        """Names of the jobs that have a folder, e.g. ``iter-00/generate``."""
        return sorted(str(path.parent.relative_to(self.path)) for path in self.path.glob(f"iter-*/*/{_JOB}"))

    def templated_model(self, digest: str) -> Path:
        """Folder of a model from outside that is used with another chat template than its own."""
        return self.path / f"policy-{digest}"

    def exists(self) -> bool:
        """Whether a recipe was written here."""
        return (self.path / RECIPE).is_file()

    def create(self) -> None:
        """Make the directory, private to its owner. Raises RunError if it cannot be written or others may write to it."""
        make_private(self.path)

    def write_recipe(self, recipe: dict[str, Any]) -> None:
        """Keep the resolved recipe."""
        write_durably(self.path / RECIPE, json.dumps(recipe, indent=1) + "\n")

    def read_recipe(self) -> dict[str, Any]:
        """The recipe of the run. Raises RunError if this is not a run directory."""
        try:
            recipe: dict[str, Any] = json.loads((self.path / RECIPE).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunError(
                f"{self.path}: not a run directory (no {RECIPE} in it). Give the folder of a launched run, e.g. runs/demo."
            ) from error
        except ValueError as error:
            raise RunError(
                f"{self.path / RECIPE}: damaged ({error}). Move it away and launch the recipe again, which writes it anew."
            ) from error
        return recipe

    def append_journal(self, event: str, **fields: Any) -> None:
        """Append one line, durably; a line torn by a crash is closed first."""
        path = self.path / JOURNAL
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n"
        with full_disk_named(path), path.open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def read_journal(self) -> list[dict[str, Any]]:
        """The journal's whole lines."""
        try:
            lines = (self.path / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        events: list[dict[str, Any]] = []
        for line in lines:
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    events.append(event)
        return events

    def set_jobs_aside(self, names: list[str]) -> Path:
        """Move the folders of jobs, and what tells of them, to a new folder below set-aside/ and return it; the last first.

        So whatever a crash leaves in place still has its inputs beside it.
        """
        target = self.path / SET_ASIDE / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}"
        manifests = {f"{name.split('/')[0]}/{MANIFEST}" for name in names}
        for name in (*sorted(manifests), *reversed(names)):
            if (self.path / name).exists():
                (target / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.rename(self.path / name, target / name)
                sync_folder((self.path / name).parent)
            self._jobs.pop(name, None)
        return target


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
