"""Files that survive a crash and a slow shared file system: the primitives of the run directory's protocol."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aipo_hpc.errors import DiskFull

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors that say that there is no space left, or none of ours."""


@contextmanager
def full_disk_named(where: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into DiskFull with the place and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(
                f"{where}: {os.strerror(error.errno)}. Free space (or raise the quota) and type the same command again: "
                "nothing that finished is lost."
            ) from error
        raise


def write_durably(path: Path, text: str) -> None:
    """Replace a file atomically: readers see the old or the new content, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    with full_disk_named(path):
        write_synced(temporary, text)
        os.replace(temporary, path)
        sync_folder(path.parent)


def write_synced(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_new(temporary: Path, final: Path) -> bool:
    """Give a finished temporary file its final name unless that name is taken; True if it was free."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_folder(final.parent)
    return True


def list_names(folder: Path) -> list[str]:
    """Names in a folder by one listing; what is absent, or a file, is an empty one."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def visible_size(path: Path) -> int | None:
    """Size of a file as this node sees it; lists the parent first, which refreshes what the node remembers of it."""
    if path.name not in list_names(path.parent):
        return None
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
