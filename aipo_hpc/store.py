"""The run directory, and the protocol that makes its files trustworthy.

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

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from aipo_hpc.durable import (
    full_disk_named,
    sync_folder,
    write_durably,
)
from aipo_hpc.errors import RunError
from aipo_hpc.job_folder import JOB, SET_ASIDE, JobFolder
from aipo_hpc.ownership import make_private

RECIPE = "recipe.json"
JOURNAL = "journal.jsonl"
LEASE = "driver.lease"
_CHAIN = "chain"
MANIFEST = "manifest.json"
REPORT = "report"


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
        return sorted(str(path.parent.relative_to(self.path)) for path in self.path.glob(f"iter-*/*/{JOB}"))

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
