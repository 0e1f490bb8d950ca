"""One folder seen by two "nodes" of which neither learns at once what the other did there.

Two FUSE mounts of the same folder, each with caches of attributes, of names and of absent names of its own: what a shared
file system does to its clients, by the same code of the kernel.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from _sandbox import packages
from _sandbox.errors import SandboxError


@contextmanager
def two_nodes(folder: Path, seconds: float) -> Iterator[tuple[Path, Path]]:
    """The views of both nodes on one folder, each up to ``seconds`` stale; skips where that cannot be had."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/fuse, which this machine does not give")
    if shutil.which("bindfs") is None:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.skip("needs bindfs: apt-get install bindfs")
        try:
            packages.install(["bindfs"])
        except SandboxError as error:
            pytest.skip(f"needs bindfs: {error}")
    real, views = folder / "real", (folder / "node-a", folder / "node-b")
    for each in (real, *views):
        each.mkdir(mode=0o700, parents=True)
    mounted: list[Path] = []
    try:
        for view in views:
            caches = f"attr_timeout={seconds:g},entry_timeout={seconds:g},negative_timeout={seconds:g}"
            done = subprocess.run(
                ["bindfs", "-o", caches, str(real), str(view)], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                pytest.skip(f"needs the right to mount by FUSE: {done.stderr.strip()}")
            mounted.append(view)
        yield views
    finally:
        for view in mounted:
            subprocess.run(["umount", "--lazy", str(view)], check=True)
