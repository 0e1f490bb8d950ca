"""Processes of one training that run together: who is who, and where they meet.

Exports RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, the variables that torch.distributed reads, from what
srun or submitit's local executor set.
"""

import os
import re
import socket
import subprocess
import zlib

from aipo_hpc.errors import ClusterError
from aipo_hpc.task import Place

_FIRST_PORT, _NUM_PORTS = 20000, 20000


def join() -> Place:
    """Export this process's place in its gang, and return it."""
    env = os.environ
    if "SUBMITIT_LOCAL_GLOBALID" in env and env.get("SUBMITIT_EXECUTOR") == "local":
        place = Place(
            int(env["SUBMITIT_LOCAL_GLOBALID"]), int(env["SUBMITIT_LOCAL_NTASKS"]), int(env["SUBMITIT_LOCAL_LOCALID"])
        )
        meeting, job = "127.0.0.1", env["SUBMITIT_LOCAL_JOB_ID"]
    elif "SLURM_PROCID" in env and "SLURM_JOB_ID" in env:
        place = Place(int(env["SLURM_PROCID"]), int(env.get("SLURM_NTASKS", "1")), int(env["SLURM_LOCALID"]))
        meeting = first_address(env["SLURM_JOB_NODELIST"]) if place.world_size > 1 else "127.0.0.1"
        job = env["SLURM_JOB_ID"]
    else:
        return Place.here()
    env.update(place.export())
    env["MASTER_ADDR"] = meeting
    # The same for all of a gang and after a requeue, most likely another for the neighbour's job on the node.
    env["MASTER_PORT"] = str(_FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS)
    return place


def first_address(nodelist: str) -> str:
    """Address of the first node of a Slurm node list.

    Slurm's own address of the node is asked for where its name does not resolve. Raises ClusterError if that does not
    either, at once rather than after a process group's timeout.
    """
    name = re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodelist).split(",")[0]
    try:
        return socket.gethostbyname(name)
    except OSError:
        pass
    try:
        shown = subprocess.run(
            ["scontrol", "--oneliner", "show", "node", name], capture_output=True, text=True, timeout=60, check=True
        ).stdout
        found = re.search(r"\bNodeAddr=(\S+)", shown)
        return socket.gethostbyname(found.group(1) if found else name)
    except (OSError, subprocess.SubprocessError) as error:
        raise ClusterError(
            f"node {name!r}, where the processes of this training meet, has no address that resolves here ({error}). "
            "Ask the cluster's administrators for name resolution between compute nodes."
        ) from error
