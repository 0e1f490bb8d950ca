"""The process group of a training task, and what DeepSpeed needs around it.

The variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are the caller's to export.
"""

import contextlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from aipo_hpc.errors import ClusterError
from aipo_hpc.task import Place

_STALE_LOCK_SECONDS = 600


@contextlib.contextmanager
def joined(place: Place, *, deepspeed: bool) -> Iterator[None]:
    """Have this process be one of its process group (NCCL with GPUs, Gloo without) while the block runs.

    A single process without DeepSpeed needs no group and gets none. Raises ClusterError if MASTER_ADDR or MASTER_PORT
    is missing for several processes, or cannot be resolved from here.
    """
    if place.world_size == 1 and not deepspeed:
        yield
        return
    if place.world_size == 1:
        _alone(place)
    _check_master()
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(place.local_rank)
    if deepspeed:
        _prepare_compiler()
        import deepspeed as engine

        engine.init_distributed(backend, auto_mpi_discovery=False)
    else:
        torch.distributed.init_process_group(backend)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def agree(value: Any) -> Any:
    """Return rank 0's ``value`` on every process."""
    if not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=_device())
    return box[0]


def highest(value: int) -> int:
    """Return the highest ``value`` of all processes on every process."""
    if not torch.distributed.is_initialized():
        return value
    box = torch.tensor(value, device=_device())
    torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX)
    return int(box.item())


def wait_for_all() -> None:
    """Return when every process of the group has come here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _alone(place: Place) -> None:
    """DeepSpeed asks for MPI unless it is told that there is one process."""
    os.environ.update(place.export())
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])


def _check_master() -> None:
    """An unknown address would otherwise show as half an hour of silence."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ClusterError(
            f"{' and '.join(missing)} not set: whoever starts the processes of a training must export where they meet."
        )
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        socket.getaddrinfo(address, int(port))
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"MASTER_ADDR={address} MASTER_PORT={port} does not resolve on {socket.gethostname()}: {error}"
        ) from error


def _prepare_compiler() -> None:
    """DeepSpeed compiles a small extension at its first start on a CPU; it needs ninja and a folder on this node."""
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(part for part in (scripts, os.environ.get("PATH")) if part)
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(_node_folder())
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("**/lock"):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > _STALE_LOCK_SECONDS:
                lock.unlink()  # left by a compilation that was killed; whoever finds it waits for ever


def _node_folder() -> Path:
    """A folder for compiled code that belongs to this user alone, the same for all processes on this node."""
    folder = Path(tempfile.gettempdir()) / f"aipo-hpc-torch-extensions-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ClusterError(f"{folder} belongs to someone else: set TORCH_EXTENSIONS_DIR to a folder on this node.")
    return folder
