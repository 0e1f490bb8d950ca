"""Folders that only their owner writes to: workers run what they read there."""

import errno
import os
import stat
from pathlib import Path

from aipo_hpc.durable import full_disk_named, write_synced
from aipo_hpc.errors import RunError


def make_private(path: Path) -> None:
    """Make a folder, and those on the way to it, for its owner alone.

    Raises RunError if it cannot be written, or if others may write to it.
    """
    try:
        for missing in reversed([path, *path.parents]):
            missing.mkdir(mode=0o700, exist_ok=True)
        probe = path / f".probe.{os.getpid()}"
        with full_disk_named(path):
            write_synced(probe, "probe\n")
        probe.unlink()
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise _unwritable(path, error) from error
    except OSError as error:
        if error.errno == errno.EROFS:
            raise _unwritable(path, error) from error
        raise
    refuse_others(path)


def refuse_others(path: Path) -> None:
    """Raise RunError for a folder that belongs to somebody else, or that others may write to."""
    state = path.stat()
    if state.st_uid != os.getuid():
        raise RunError(
            f"{path}: belongs to another user (uid {state.st_uid}), and what workers run is read from it. "
            "Choose a folder of your own with run_dir=..."
        )
    mode = state.st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RunError(
            f"{path}: others may write to it (mode {stat.S_IMODE(mode):o}), and what workers run is read from it. "
            f"Type: chmod go-w {path}"
        )


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: cannot be written ({error.strerror}). Choose another place with run_dir=..., or mend its rights."
    )
