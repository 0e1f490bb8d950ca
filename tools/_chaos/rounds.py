"""One round of chaos: an undisturbed run, the same run disturbed, and a comparison of both."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

from _chaos.faults import FAULTS
from _chaos.gremlin import Gremlin
from _chaos.outcome import Outcome, judge
from _chaos.user import HumanNeededError, User
from _chaos.world import World
from aipo_hpc.store import Run

SMALL = (
    "recipe=demo", "data.limit=24", "data.num_held_out=6", "generate.n=3", "generate.max_tokens=12",
    "generate.num_shards=8", "reference.num_shards=2", "train.num_train_epochs=1", "train.save_steps=1",
    "train.global_batch_size=8", "train.per_device_train_batch_size=4", "train.resources.cpus_per_task=1",
    "payload_timeout=10", "poll_seconds=0.3",
)  # fmt: skip
"""The demo, small in every way, with all its stages."""
ON_SLURM = ("cluster=slurm", "slurm.query_seconds=2", "generate.resources.array_parallelism=4")
CHAINED = ("drive=chain", "slurm.step_seconds=2")
TWO_NODES = ("train.resources.nodes=2", "train.zero_stage=2")
DISK = "400m"


def command(run_dir: Path, *fields: str) -> list[str]:
    """The launch command of the small run."""
    return [sys.executable, "-m", "aipo_hpc.launch", *SMALL, f"run_dir={run_dir}", *fields]


def environment(conf: Path) -> dict[str, str]:
    """What the user of the sandbox has set. One thread: the order of sums decides the last bit."""
    root = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    return {**outer, "SLURM_CONF": str(conf), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def undisturbed(run_dir: Path, conf: Path, fields: Sequence[str]) -> Run:
    """The run that the others must equal, on the same number of processes."""
    where = ON_SLURM if any(field in TWO_NODES for field in fields) else ("cluster=inline",)
    argv = command(run_dir, *where, *fields)
    done = subprocess.run(argv, env=environment(conf), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the undisturbed run failed:\n{done.stderr[-4000:]}")
    return Run(run_dir)


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of its own in ``folder``, which may be filled; False where nothing may be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={DISK},mode=0700", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def disturbed(
    sandbox: Path,
    conf: Path,
    folder: Path,
    quiet: Run,
    seed: int,
    fields: Sequence[str],
    plan: Mapping[str, int],
    seconds: float,
    kinds: Sequence[str] = tuple(FAULTS),
) -> Outcome:
    """A run with a gremlin beside it, compared with the undisturbed one. ``plan``: how many faults, how far apart."""
    with small_disk(folder / "disk") as may_fill:
        run_dir = folder / "disk" / "run"
        user = User(command(run_dir, *ON_SLURM, *fields), environment(conf), folder / "driver.log")
        world = World(sandbox, conf, run_dir, user, may_fill, chained=CHAINED[0] in fields)
        pause = (plan["shortest"], plan["longest"])
        gremlin = Gremlin(world, Random(seed).randrange(2**31), kinds=kinds, pause=pause, most=plan["faults"])
        try:
            gremlin.disturb(seconds)
            # What was damaged just before the last look at it is found by who comes next.
            user.type_once_more()
            Gremlin(world, seed, most=0).disturb(seconds)
        except HumanNeededError as error:
            outcome = Outcome(gremlin.injected, user.launches, commands=1)
            outcome.differences.append(f"not finished: {error}")
            return outcome
        outcome = judge(world, quiet)
        outcome.injected = gremlin.injected
        return outcome
