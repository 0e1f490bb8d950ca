"""A stage that takes memory for all prompts of a batch at once, and in which one process may starve while others live."""

import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from aipo_hpc.durable import write_durably
from aipo_hpc.graph import Edge, Graph, Job, make_graph
from aipo_hpc.resources import Resources
from aipo_hpc.settings import memory_bound, tuning
from aipo_hpc.stage_table import STAGES, Stage
from aipo_hpc.task import Outcome, Place, Task

ITSELF, CHILD, SPARE_CHILD, NEIGHBOUR, NOBODY = "itself", "child", "spare child", "neighbour", "nobody"
"""Who takes the memory: a task's process, one that it starts and needs or needs not, or another one of its gang."""
ROOM = Path("room")
SAID = "said.txt"
PATIENCE = 60.0


@dataclass(frozen=True)
class HungryConfig:
    """The last shard takes ``mb_per_prompt`` for each of the ``batch_size`` prompts of a batch, the others nothing."""

    eater: str = tuning(NOBODY)
    num_prompts: int = 8
    batch_size: int = memory_bound(4)
    mb_per_prompt: int = tuning(100)
    resources: Resources = field(default=Resources(mem_gb=0.25, time=5), metadata=tuning(None).metadata)


def run(config: HungryConfig, task: Task) -> Outcome:
    """Take memory batch by batch, and say the number of each prompt; noted beside it: the batch, and the room there was."""
    place = Place.here()
    if place.rank == 0:
        (task.out / ROOM).write_text(f"{config.batch_size} {memory_limit() >> 20}")
    if task.shard == task.num_shards - 1:
        meals = [config.mb_per_prompt * config.batch_size] * (config.num_prompts // config.batch_size)
        eat_as(config.eater, meals, task.out / "port", place)
    (task.out / SAID).write_text("".join(f"{number}\n" for number in range(config.num_prompts)))
    return Outcome(config.num_prompts, (SAID,))


def eat_as(eater: str, meals: list[int], port: Path, place: Place) -> None:
    """Take so many megabytes there, meal by meal, and notice it if that was too much for another process than this one."""
    if eater == ITSELF:
        for megabytes in meals:
            eat(megabytes)
    elif eater in (CHILD, SPARE_CHILD):
        codes = [subprocess.run([sys.executable, __file__, str(each)], check=False).returncode for each in meals]
        if any(codes) and eater == CHILD:
            raise RuntimeError(f"the engine's process ended with exit code {codes[0]}")
    elif eater == NEIGHBOUR and place.rank == place.world_size - 1:
        with socket.create_connection(("127.0.0.1", told(port))) as first:
            for megabytes in meals:
                eat(megabytes)
                first.sendall(b"1")
    elif eater == NEIGHBOUR:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(PATIENCE)
            write_durably(port, str(server.getsockname()[1]))
            neighbour, _ = server.accept()
            if not all(neighbour.recv(1) for _ in meals):
                raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]")


def told(port: Path) -> int:
    """Where the first process of the gang listens, once it does."""
    deadline = time.monotonic() + PATIENCE
    while not port.exists():
        assert time.monotonic() < deadline, "the first process does not listen"
        time.sleep(0.02)
    return int(port.read_text())


def eat(megabytes: int) -> None:
    """Take so much memory, every page of it."""
    hoard = [bytearray(b"x") * (1 << 20) for _ in range(megabytes)]
    del hoard


def memory_limit() -> int:
    """Bytes that the step may have: its tasks are in groups below it, without a limit of their own."""
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    (path,) = (path for _, controllers, path in groups if controllers == "memory")
    return int((Path(f"/sys/fs/cgroup/memory{path}").parent / "memory.limit_in_bytes").read_text())


def register() -> None:
    """Make the stage known, in this process."""
    STAGES["hungry"] = Stage("hungry_stage:HungryConfig")  # type: ignore[index]


if __name__ == "__main__":
    eat(int(sys.argv[1]))
else:
    register()


def hungry_job(name: str, num_shards: int, config: HungryConfig, source: str | None = None) -> Job:
    """A job of the stage, perhaps after another one."""
    edges = {"source": Edge(source, SAID)} if source else {}
    return Job(f"iter-00/{name}", "hungry", 0, num_shards, 7, config, edges, config.resources)


def hungry_graph() -> Graph:
    """A job for each that may take the memory, of two shards where those are single tasks; and one that needs another."""
    gang = Resources(nodes=2, mem_gb=0.25, time=5)
    return make_graph(
        [
            hungry_job("itself", 2, HungryConfig(ITSELF)),
            hungry_job("child", 2, HungryConfig(CHILD)),
            hungry_job("spare", 1, HungryConfig(SPARE_CHILD)),
            hungry_job("after", 1, HungryConfig(), "iter-00/spare"),
            hungry_job("gang", 1, HungryConfig(NEIGHBOUR, resources=gang)),
        ]
    )
