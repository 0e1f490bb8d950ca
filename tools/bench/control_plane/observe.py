"""Run a contender to the end as a patient person would, and observe what it took."""

import getpass
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from contenders import Contender
from payload import Plan

CLIENTS = ("sbatch", "squeue", "sacct", "scontrol", "scancel", "sinfo", "srun", "sacctmgr", "sstat")
MOST_HUMAN_COMMANDS = 20
IDLE_LOOKS = 3
"""So many looks in a row without jobs of the user before they count as over: a tool may be about to submit."""


@dataclass(frozen=True)
class Outcome:
    """What one run took; see the columns in ``__main__``."""

    makespan: float
    commands: int
    cpu: float
    executions: int
    duplicates: int
    stuck: int
    early: int
    human: int


def run_to_the_end(contender: Contender, plan: Plan, patience: float) -> Outcome:
    """Type the contender's command, and again while shards are missing; an infinite makespan: not within ``patience``.

    Raises RuntimeError if that leads nowhere.
    """
    plan.write()
    log = plan.work / "commands.log"
    environment = {**os.environ, **contender.environment, "PATH": f"{wrappers(plan.work, log)}:{os.environ['PATH']}"}
    human, stuck, cpu = 0, 0, 0.0
    started = time.time()
    while True:
        left = started + patience - time.time()
        cpu += run_measured(contender.command(), environment, plan.work, left)
        if time.time() > started + patience:
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], check=True)  # of the throw-away Slurm
        stuck += wait_until_idle(plan)
        if not plan.missing(2) or time.time() > started + patience:
            break
        human += 1
        if human > MOST_HUMAN_COMMANDS:
            raise RuntimeError(f"{contender}: still not finished after {human} commands; see {plan.work}")
    events = [json.loads(path.read_text()) for path in (plan.work / "events").iterdir()]
    return Outcome(
        makespan=math.inf if plan.missing(2) else max(event["end"] for event in events if event["ok"]) - started,
        commands=len(log.read_text().splitlines()) if log.exists() else 0,
        cpu=cpu,
        executions=len(events),
        duplicates=overlapping(events),
        stuck=stuck,
        early=sum(not event["valid"] for event in events),
        human=human + stuck_commands(stuck),
    )


def stuck_commands(stuck: int) -> int:
    """Removing all jobs that can never start takes a person one scancel."""
    return 1 if stuck else 0


def run_measured(command: list[str], environment: dict[str, str], work: Path, most_seconds: float) -> float:
    """Run a driving command to its end, or to that of one's patience; processor seconds of it and of what it called."""
    with (work / "driver.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, cwd=work, stdout=log, stderr=log, start_new_session=True)
        impatience = threading.Timer(most_seconds, os.killpg, (process.pid, signal.SIGKILL))
        impatience.start()
        _, _, usage = os.wait4(process.pid, 0)
        impatience.cancel()
        process.returncode = 0
    return usage.ru_utime + usage.ru_stime


def wait_until_idle(plan: Plan) -> int:
    """Wait until no job of ours can still do something; remove and count those that can never start."""
    stuck, idle = 0, 0
    while idle < IDLE_LOOKS:
        shown = subprocess.run(
            ["squeue", "--noheader", "--array", "--format=%A|%T|%r"], capture_output=True, text=True, check=True
        ).stdout
        jobs = [line.split("|") for line in shown.split("\n") if line]
        if any("NeverSatisfied" in reason for _, _, reason in jobs) and all(
            "Depend" in reason for _, _, reason in jobs
        ):
            stuck += len(jobs)
            subprocess.run(["scancel", *sorted({job for job, _, _ in jobs})], check=True)
        idle = 0 if jobs else idle + 1
        if not plan.missing(2) and not jobs:
            return stuck
        time.sleep(0.1)
    return stuck


def overlapping(events: list[dict[str, float]]) -> int:
    """Executions that began while another of the same shard was under way."""
    by_shard: dict[tuple[float, float], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        by_shard[event["stage"], event["index"]].append((event["start"], event["end"]))
    found = 0
    for spans in by_shard.values():
        spans.sort()
        found += sum(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans))
    return found


def wrappers(work: Path, log: Path) -> Path:
    """A folder of client commands that write a line to ``log`` and then are the real ones.

    They find the cluster also where a tool takes SLURM_* out of the environment of its jobs, as snakemake's plugin does.
    """
    folder, conf = work / "bin", os.environ["SLURM_CONF"]
    folder.mkdir()
    for name in CLIENTS:
        real = shutil.which(name)
        if real is not None:
            script = folder / name
            script.write_text(f'#!/bin/sh\necho {name} >> {log}\nexport SLURM_CONF={conf}\nexec {real} "$@"\n')
            script.chmod(0o755)
    return folder
