"""What befalls workers that are real processes: loaded into each of them; a folder, $MISFORTUNES, says what.

    hold-<stage>               a worker waits after two new rows, or until asked to leave, while this file is there
    at-work-<stage>.<attempt>  a worker's pid and start time, written when it waits
    overlap-<stage>.<attempt>  written when it begins while an earlier attempt is still there
    poison-<stage>             JSON: a prompt's id, and how it kills its worker
    memory                     a memory cgroup in which nothing has room, as a link

The ranker gets as many prompts at once as in a finished run (``finished.py``).
"""

import ctypes
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

from aipo_hpc import engines, leaving, rankers
from aipo_hpc.processes import start_time
from aipo_hpc.progress import Progress
from aipo_hpc.stages import reference

HOLD_AFTER = 2
SEGFAULT, OOM_KILL, KILL, NO_MEMORY = "segfault", "the kernel's OOM killer", "SIGKILL", "no memory"


def environment(folder: Path) -> dict[str, str]:
    """Variables with which workers that are started from here load this module."""
    site = folder / "site"
    site.mkdir(parents=True)
    site.joinpath("sitecustomize.py").write_text(
        "import sys\nif any('submitit' in each for each in sys.orig_argv):\n    import misfortunes\n\n    misfortunes.load()\n"
    )
    here = Path(__file__).parent
    return {
        "PYTHONPATH": os.pathsep.join([str(site), str(here), str(here.parent)]),
        "MISFORTUNES": str(folder),
        "OMP_NUM_THREADS": "1",
    }


def die(how: str, folder: Path) -> None:
    """Die, or fail, of that."""
    if how == SEGFAULT:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.string_at(0)
    elif how == OOM_KILL:
        (folder / "memory" / "cgroup.procs").write_text(str(os.getpid()))
        hoard = [os.urandom(1 << 20) for _ in range(1 << 10)]
        raise AssertionError(f"{len(hoard)} MB fitted into a cgroup without room")
    elif how == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        import torch

        torch.empty(1 << 50, dtype=torch.uint8)


def load() -> None:
    """Change the classes and functions that the misfortunes come through."""
    folder = Path(os.environ["MISFORTUNES"])
    _hold(folder)
    _poison(folder)


def _hold(folder: Path) -> None:
    append, begin = Progress.append, Progress.__init__
    new: list[object] = []

    def name(progress: Any) -> str:
        return f"{progress._out.parents[2].name}.{progress._out.name}"

    def begin_alone(self: Any, *args: Any) -> None:
        begin(self, *args)
        stage = name(self).partition(".")[0]
        for path in folder.glob(f"at-work-{stage}.*"):
            pid, _, started = path.read_text().partition(" ")
            if start_time(int(pid)) == started:
                (folder / f"overlap-{name(self)}").touch()

    def append_and_wait(self: Any, row: Any) -> None:
        append(self, row)
        new.append(row)
        if len(new) != HOLD_AFTER:
            return
        (folder / f"at-work-{name(self)}").write_text(f"{os.getpid()} {start_time(os.getpid())}")
        while (folder / f"hold-{name(self).partition('.')[0]}").exists() and leaving.asked() != leaving.STOP:
            time.sleep(0.02)

    Progress.__init__, Progress.append = begin_alone, append_and_wait  # type: ignore[method-assign,assignment]


def _poison(folder: Path) -> None:
    def poisoned(stage: str, prompt_ids: Any) -> None:
        path = folder / f"poison-{stage}"
        if path.exists() and (poison := json.loads(path.read_text()))["prompt_id"] in prompt_ids:
            die(poison["how"], folder)

    load_engine, load_ranker, score = engines.load_engine, rankers.load_ranker, reference._score

    def load_poisoned_engine(*args: Any) -> Any:
        engine: Any = load_engine(*args)
        run = engine._run

        def run_poisoned(batch: Any) -> Any:
            poisoned("generate", [request.prompt_id for request in batch])
            return run(batch)

        engine._run = run_poisoned
        return engine

    def load_poisoned_ranker(*args: Any) -> Any:
        from finished import PROMPTS_PER_CALL

        ranker: Any = load_ranker(*args)
        rank = ranker.rank

        def rank_poisoned(rows: Any) -> Any:
            poisoned("rank", [row.prompt_id for row in rows])
            return rank(rows)

        ranker.prompts_per_call, ranker.rank = PROMPTS_PER_CALL, rank_poisoned
        return ranker

    def score_poisoned(model: Any, rows: Any) -> Any:
        poisoned("reference", [row.prompt_id for row in rows])
        return score(model, rows)

    engines.load_engine, rankers.load_ranker, reference._score = (
        load_poisoned_engine,
        load_poisoned_ranker,
        score_poisoned,
    )
