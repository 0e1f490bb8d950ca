"""What a stage is given and what it gives back: one shard of one job.

Every stage is a module in ``aipo_hpc/stages`` with a frozen settings class and ``run(config, task) -> Outcome``. A stage
reads ``task.inputs``, writes files below ``task.out`` and never learns which cluster it runs on.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aipo_hpc.claims import Claims


@dataclass(frozen=True)
class Input:
    """One named input of a task: files of another job's shards, or a value from outside the run.

    ``value`` is a model name or path from outside (the initial policy, a ranker); ``shards`` maps each needed shard of
    the producing job to its output files, already verified. Exactly one of them is set.
    """

    value: str | None = None
    shards: Mapping[int, tuple[Path, ...]] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """All files, in the order of shards and of names within a shard."""
        return [path for shard in sorted(self.shards) for path in self.shards[shard]]

    def named(self, name: str) -> list[Path]:
        """The files called ``name``, one per shard that has it, in the order of shards."""
        return [path for path in self.files if path.name == name]

    @property
    def model(self) -> str:
        """The model to load: the outside value, or the folder in which the producing job wrote ``config.json``."""
        if self.value is not None:
            return self.value
        return str(self.named("config.json")[0].parent)


@dataclass(frozen=True)
class Task:
    """One shard of one job, as a stage sees it."""

    job: str
    """The job's identity, e.g. ``iter-00/generate``."""
    iteration: int
    shard: int
    num_shards: int
    seed: int
    """Seed of the whole run; a stage derives its own from it with the identities of what it draws for."""
    inputs: Mapping[str, Input]
    out: Path
    """This attempt's own folder: exists, and nobody else writes there. All processes of a gang share it."""
    earlier: tuple[Path, ...] = ()
    """Folders of earlier attempts at the same shard, oldest first; they may hold work to continue from."""
    deaths: tuple[Path, ...] = ()
    """Those of them that crashed, ran out of memory, or ran out of time without getting further."""
    claims: "Claims | None" = None
    """Which parts of the shard are whose, where several attempts may do it together; None: this one does all of it."""

    def advance(self) -> None:
        """Note that this attempt got further than those before it: a failure after that is not held against the shard."""
        path = self.out / ADVANCED
        if not path.exists():
            path.touch()


@dataclass(frozen=True)
class Outcome:
    """What a stage made: rows, the files that make up the output (relative to ``task.out``), and counts to report."""

    rows: int
    outputs: tuple[str, ...]
    counts: Mapping[str, float] = field(default_factory=dict)
    """Plain numbers for the sentinel and the report, e.g. ``dropped_tie: 3``."""


@dataclass(frozen=True)
class Place:
    """Which process of a task's gang this is (0 of 1 for everything but multi-process training)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @staticmethod
    def here() -> "Place":
        """Read the place from the variables that torchrun, and our launcher under srun, export."""
        read = {key: int(os.environ.get(key, default)) for key, default in _PLACE.items()}
        return Place(read["RANK"], read["WORLD_SIZE"], read["LOCAL_RANK"])

    def export(self) -> dict[str, str]:
        """The same variables, to set in a child's or this process's environment."""
        values = dataclasses.astuple(self)
        return {key: str(value) for key, value in zip(_PLACE, values, strict=True)}


ADVANCED = "advanced"
"""The file in an attempt's folder that tells, whatever becomes of the attempt, that it got further than those before it."""

_PLACE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
