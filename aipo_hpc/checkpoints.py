"""Training checkpoints that can be believed.

    <attempt>/checkpoints/checkpoint-<step>/...            written by the trainer, by all processes
    <attempt>/checkpoints/checkpoint-<step>/complete.json  {"global_step", "world_size", ..., "files"}, written last

A process may be killed at any moment of a save. A folder without its marker is therefore never resumed from; a later
save of the same attempt replaces it. A new attempt looks through its own folder and those of earlier attempts, and loads
the newest complete checkpoint from where it lies, if each of its files still has the size and the hash that the marker
states: a full disk or a crashed file server leaves files behind that load, or half load, and are wrong.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from aipo_hpc import leaving, process_group
from aipo_hpc.durable import hash_file
from aipo_hpc.model_files import files_below, sync_tree

CHECKPOINTS = "checkpoints"
MARKER = "complete.json"

logger = logging.getLogger(__name__)


def newest_complete(attempts: Iterable[Path], shape: Mapping[str, Any]) -> Path | None:
    """The complete checkpoint with the highest step below the folders of ``attempts``, or None.

    ``shape`` is what a checkpoint must agree with to be loadable (world size, ZeRO stage, number of steps); one that
    differs is passed over with a warning.
    """
    found = sorted(_complete(attempts), key=lambda item: item[0]["global_step"], reverse=True)
    for marker, folder in found:
        different = {key: (marker.get(key), value) for key, value in shape.items() if marker.get(key) != value}
        if not different:
            if (wrong := _wrong_with(folder, marker["files"])) is None:
                return folder
            logger.warning("not resuming from %s: %s", folder, wrong)
            continue
        reasons = ", ".join(f"{key} was {was}, is {now}" for key, (was, now) in different.items())
        logger.warning("not resuming from %s: %s", folder, reasons)
    return None


def _complete(attempts: Iterable[Path]) -> Iterator[tuple[dict[str, Any], Path]]:
    for attempt in attempts:
        for folder in sorted((attempt / CHECKPOINTS).glob("checkpoint-*")):
            try:
                marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(marker, dict) and isinstance(marker.get("global_step"), int) and "files" in marker:
                yield marker, folder


def _wrong_with(folder: Path, files: Mapping[str, Any]) -> str | None:
    """How a checkpoint differs from what its marker states; None if it does not."""
    try:
        for name, (size, _) in files.items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes, not {size}"
        found_now = _hashes(folder, list(files))
    except OSError as error:
        return f"{error}"
    altered = [name for name in files if found_now[name] != files[name]]
    return f"the content of {', '.join(altered)} is not what was saved" if altered else None


def _hashes(folder: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """Size and hash of each file; several at a time, for they may be large."""
    paths = [folder / name for name in names]
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = pool.map(hash_file, paths)
        return {name: [path.stat().st_size, digest] for name, path, digest in zip(names, paths, digests, strict=True)}


def remove_incomplete(attempt: Path) -> None:
    """Delete the folders of unfinished saves, so that nothing half-written is left to mix with a new save."""
    for folder in (attempt / CHECKPOINTS).glob("*"):
        if not (folder / MARKER).exists():
            logger.warning("removing %s: its save was never finished", folder)
            shutil.rmtree(folder)


class MarkComplete(TrainerCallback):
    """Writes the marker of each checkpoint, after every process has finished its part and had it kept on disk."""

    def __init__(self, shape: Mapping[str, Any], advance: Callable[[], None]) -> None:
        """``advance`` is called when a checkpoint is complete."""
        self._shape = shape
        self._advance = advance

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer on every process, after its part of a save."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sync_tree(folder)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            names = [path.relative_to(folder).as_posix() for path in files_below(folder)]
            marker = {"global_step": state.global_step, **self._shape, "files": _hashes(folder, names)}
            partial = folder / (MARKER + ".partial")
            with partial.open("w", encoding="utf-8") as file:
                json.dump(marker, file)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(folder / MARKER)
            sync_tree(folder.parent)
            self._advance()


class SaveBeforeTheEnd(TrainerCallback):
    """Has a checkpoint saved after the step in which any process was asked to save or leave; all agree on the step."""

    def __init__(self) -> None:
        self.left = False
        """Whether training stopped before its end, to be continued by another attempt."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer on every process, after each optimizer step."""
        asked = process_group.highest(leaving.asked())
        if asked == leaving.NOT_ASKED or state.global_step >= state.max_steps:
            return
        control.should_save = True
        leaving.saved()
        if asked == leaving.STOP:
            control.should_training_stop = self.left = True
