"""What can go wrong. A fault does one thing to the world and says what; None if there was nothing to do it to now.

A fault that lasts returns also what ends it: a daemon is started again, space is freed.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from _sandbox.process import Process

from _chaos.world import World
from aipo_hpc.claims import unclaimed
from aipo_hpc.leftovers import LEAST


@dataclass(frozen=True)
class Done:
    """What was done; ``end`` undoes it after ``seconds``, and for ``alone`` of them nothing else is done."""

    what: str
    seconds: float = 0.0
    end: Callable[[], object] | None = None
    alone: float = 0.0


Fault = Callable[[World, Random], Done | None]


def kill_driver(world: World, draw: Random) -> Done | None:
    return Done("SIGKILL to the driver") if world.user.kill() else None


def second_driver(world: World, draw: Random) -> Done | None:
    """The same command at the same time. It must say that the run is being driven, or drive because the first died."""
    if not world.user.running:
        return None
    try:
        done = subprocess.run(
            world.user.argv, env=world.user.environment, capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return Done("a second driver took over from one that had ended, and was killed")
    # Where runs are passed on, the first may have ended just before; that nothing ran twice is for the judge to say.
    assert world.chained or done.returncode != 0 or not world.user.running, f"a second driver drove:\n{done.stderr}"
    return Done("a second driver")


def kill_worker(world: World, draw: Random) -> Done | None:
    groups = world.workers()
    if not groups:
        return None
    group = draw.choice(groups)
    for process in group:
        process.signal(signal.SIGKILL)
    return Done(f"SIGKILL to a task's {len(group)} processes")


def hold_task(world: World, draw: Random) -> Done | None:
    """A task stands still amid its shard, as on a node that hangs, for longer than others wait before they take part.

    Nothing else goes wrong until they do, or the task would hardly ever live so long.
    """
    for claims in sorted(world.run_dir.glob("iter-*/*/claims/*")):
        job, shard = world.run.job(str(claims.parent.parent.relative_to(world.run_dir))), int(claims.name)
        with suppress(OSError):
            submission, index, _ = os.readlink(claims / "00000.0").split(".")
            if unclaimed(job, shard) < 2 or not world.runs(submission, int(index)):
                continue
            held = [process for group in world.workers(submission, int(index)) for process in group]
            if not held:
                continue
            for process in held:
                process.signal(signal.SIGSTOP)
            what = f"{job.name} shard {shard} stands still"
            return Done(what, draw.uniform(150, 180), partial(_go_on, held), alone=LEAST)
    return None


def _go_on(held: Sequence[Process]) -> None:
    for process in held:
        process.signal(signal.SIGCONT)


def cancel_element(world: World, draw: Random) -> Done | None:
    elements = world.elements("RUNNING", "PENDING")
    if not elements:
        return None
    element = draw.choice(elements)
    return None if world.slurm("scancel", element.id) is None else Done(f"scancel of {element.id}")


def cancel_array(world: World, draw: Random) -> Done | None:
    arrays = sorted({element.array for element in world.elements("RUNNING", "PENDING") if "_" in element.id})
    if not arrays:
        return None
    array = draw.choice(arrays)
    return None if world.slurm("scancel", array) is None else Done(f"scancel of the array {array}")


def requeue(world: World, draw: Random) -> Done | None:
    elements = world.elements("RUNNING")
    if not elements:
        return None
    element = draw.choice(elements)
    return None if world.slurm("scontrol", "requeue", element.id) is None else Done(f"requeue of {element.id}")


def preempt(world: World, draw: Random) -> Done | None:
    if not world.elements("RUNNING") or not (nodes := world.nodes()):
        return None
    options = ["--partition=urgent", "--exclusive", "--time=1", "--job-name=urgent", "--output=/dev/null", "--chdir=/"]
    node = draw.choice(nodes)
    sent = world.slurm("sbatch", *options, f"--nodelist={node}", "--wrap=sleep 3")
    return None if sent is None else Done(f"an urgent job on {node}")


def power_cut(world: World, draw: Random) -> Done | None:
    nodes = world.nodes()
    if len(nodes) < 3:
        return None
    node = draw.choice(nodes)
    world.daemon("stop-daemon", "--kill", "--with-jobs", node)
    return Done(f"power cut of {node}", draw.uniform(2, 10), lambda: world.daemon("start-daemon", node))


def no_accounting(world: World, draw: Random) -> Done | None:
    if not world.daemon("stop-daemon", "slurmdbd"):
        return None
    return Done("slurmdbd stopped", draw.uniform(10, 25), lambda: world.daemon("start-daemon", "slurmdbd"))


def no_controller(world: World, draw: Random) -> Done | None:
    """By SIGTERM: a slurmctld that is killed forgets the last seconds, and starts jobs twice by itself."""
    if not world.daemon("stop-daemon", "slurmctld"):
        return None
    return Done("slurmctld stopped", draw.uniform(10, 20), lambda: world.daemon("start-daemon", "slurmctld"))


def full_disk(world: World, draw: Random) -> Done | None:
    if not world.small_disk or not world.run_dir.exists():
        return None
    ballast = world.run_dir.parent / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    return Done("disk full", draw.uniform(4, 12), lambda: ballast.unlink(missing_ok=True))


def damage_sentinel(world: World, draw: Random) -> Done | None:
    paths = sorted(world.run_dir.glob("iter-*/*/done/*.json"))
    return Done(_damage(draw.choice(paths), world, draw)) if paths else None


def damage_payload(world: World, draw: Random) -> Done | None:
    """Of a shard that somebody still has to read: nobody looks at what has been used for good."""
    graph, run = world.graph(), world.run
    if graph is None:
        return None
    done = {name: run.job(name).done(graph.fingerprints[name]) for name in graph.jobs}
    wanted = {
        edge.job for job in graph.jobs.values() if len(done[job.name]) < job.num_shards for edge in job.edges.values()
    }
    paths = [
        path for name in sorted(wanted) for _, each in sorted(done[name].items()) for path in run.job(name).files(each)
    ]
    paths = [path for path in paths if path.is_file()]
    return Done(_damage(draw.choice(paths), world, draw)) if paths else None


def damage_checkpoint(world: World, draw: Random) -> Done | None:
    """And end the training, or nobody would read it."""
    paths = sorted(world.run_dir.glob("iter-*/train/shards/*/*/checkpoints/checkpoint-*/**/*"))
    paths = [path for path in paths if path.is_file()]
    groups = world.workers(stage="train/")
    if not (paths and groups):
        return None
    for process in (process for group in groups for process in group):
        process.signal(signal.SIGKILL)
    return Done(f"{_damage(draw.choice(paths), world, draw)}, the training killed")


def leave_temporaries(world: World, draw: Random) -> Done | None:
    """What killed processes leave in the middle of a write."""
    folders = sorted(path for path in world.run_dir.glob("iter-*/*/*") if path.is_dir())
    if not folders:
        return None
    folder = draw.choice(folders)
    for name in (f".0000{draw.randrange(8)}.json.killed.tmp", f"0000{draw.randrange(8)}.json.tmp", ".job.json.x.1.tmp"):
        (folder / name).write_text('{"half":')
    (world.run_dir / f".driver.lease.killed:{draw.randrange(1000)}").mkdir(exist_ok=True)
    return Done(f"temporary files in {folder.relative_to(world.run_dir)}")


def _damage(path: Path, world: World, draw: Random) -> str:
    how = draw.choice(["truncated", "corrupted", "deleted"])
    with suppress(FileNotFoundError):
        if how == "deleted":
            path.unlink()
        elif how == "truncated":
            os.truncate(path, path.stat().st_size // 2)
        else:
            content = bytearray(path.read_bytes())
            if content:
                content[draw.randrange(len(content))] ^= 0xFF
            with path.open("r+b") as file:
                file.write(content)
    return f"{path.relative_to(world.run_dir)} {how}"


FAULTS: Mapping[str, Fault] = {
    "driver killed": kill_driver,
    "second driver": second_driver,
    "worker killed": kill_worker,
    "task held": hold_task,
    "element cancelled": cancel_element,
    "array cancelled": cancel_array,
    "requeued": requeue,
    "preempted": preempt,
    "power cut of a node": power_cut,
    "slurmdbd stopped": no_accounting,
    "slurmctld stopped": no_controller,
    "disk full": full_disk,
    "sentinel damaged": damage_sentinel,
    "payload damaged": damage_payload,
    "checkpoint damaged": damage_checkpoint,
    "temporary files left": leave_temporaries,
}
