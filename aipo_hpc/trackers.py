"""Trackers that ``report_to`` names: they write below the task's folder, reach for no network, and end when training does."""

import os
import sys
from pathlib import Path

from aipo_hpc.model_files import files_below


def keep_in(folder: Path) -> None:
    """Have trackers write below ``folder``, and none of them reach for a network."""
    folder.mkdir(exist_ok=True)
    os.environ["TENSORBOARD_LOGGING_DIR"] = os.environ["TRACKIO_DIR"] = os.environ["WANDB_DIR"] = str(folder)
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_PROJECT", "aipo_hpc")
    for module in [each for each in sys.modules if each.partition(".")[0] == "trackio"]:
        del sys.modules[module]  # it reads where to write when it is imported, and may have been


def finish(name: str) -> None:
    """End what the tracker ``name`` still does, so that its files are whole and stay as they are.

    The others end with the training. wandb would when the process ends, and the process' next training would join its run.
    """
    if name == "wandb":
        import wandb

        wandb.finish()
        wandb.teardown()


def written_below(folder: Path) -> list[Path]:
    """Files of trackers; not their links, some of which lead out of the run (wandb's, to its own log)."""
    return [path for path in files_below(folder) if not path.is_symlink()]
