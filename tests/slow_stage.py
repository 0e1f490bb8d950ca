"""A stage like generate without a model: batches of prompts, each taking its time, and a log of who did which and when.

What it says of a prompt tells who was in one batch with it, as the rounding of a real engine's numbers does.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aipo_hpc import leaving
from aipo_hpc.blocks import Blocks
from aipo_hpc.graph import Graph, Job, make_graph
from aipo_hpc.progress import Progress
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Candidate, Responses
from aipo_hpc.settings import tuning
from aipo_hpc.stage_table import STAGES, Stage
from aipo_hpc.suspects import Suspects
from aipo_hpc.task import Outcome, Task

JOB = "iter-00/slow"


@dataclass(frozen=True)
class SlowConfig:
    """The last shard takes ``seconds`` for a batch, the others no time."""

    num_prompts: int = 60
    """Prompts of a shard."""
    batch_size: int = 2
    seconds: float = tuning(0.0)
    log: str = tuning("")
    joined: bool = tuning(False)
    """The first batch of the last shard takes until another attempt has begun one."""
    share_after: float | None = tuning(1.5)
    resources: Resources = tuning(Resources(time=10))


def prompts(config: SlowConfig, shard: int) -> list[str]:
    """Ids of a shard's prompts."""
    return [f"{shard}-{number}" for number in range(config.num_prompts)]


def batches_of(config: SlowConfig, shard: int) -> list[list[str]]:
    """What is done together."""
    ids, size = prompts(config, shard), config.batch_size
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def answer(prompt_id: str, batch: Sequence[str]) -> str:
    """What is said of a prompt."""
    return hashlib.sha256(f"{prompt_id} of {batch}".encode()).hexdigest()


def run(config: SlowConfig, task: Task) -> Outcome:
    """Say something of each prompt."""
    ids = prompts(config, task.shard)
    suspects = Suspects(task)
    with Progress(task, Responses) as progress:
        blocks = Blocks(task, batches_of(config, task.shard), progress, suspects)
        for batch in (batch for batches in blocks.rounds() for batch in batches):
            leaving.here("slow")
            note(config, task, "begin", batch)
            suspects.begin(batch)
            if task.shard == task.num_shards - 1:
                time.sleep(config.seconds)
                while config.joined and not any(each["attempt"] != task.out.name for each in notes(config, task.shard)):
                    time.sleep(0.05)
            for prompt_id in batch:
                if prompt_id not in progress:
                    said = Candidate(answer(prompt_id, batch), "stop", 1)
                    progress.append(Responses(prompt_id, prompt_id, [], [said]))
            note(config, task, "end", batch)
        outputs = progress.finish(ids)
        return Outcome(len(ids), outputs, progress.counts)


def note(config: SlowConfig, task: Task, what: str, batch: Sequence[str]) -> None:
    """Append a line to the log."""
    if config.log:
        line = {"what": what, "batch": batch[0], "attempt": task.out.name, "time": time.time(), "pid": os.getpid()}
        with Path(config.log).open("a") as file:
            file.write(json.dumps(line) + "\n")


def notes(config: SlowConfig, shard: int) -> list[dict[str, Any]]:
    """What was noted of a shard."""
    lines = Path(config.log).read_text().splitlines() if Path(config.log).exists() else []
    return [note for note in map(json.loads, lines) if note["batch"].startswith(f"{shard}-")]


def register() -> None:
    """Make the stage known, in this process."""
    STAGES["slow"] = Stage("slow_stage:SlowConfig")  # type: ignore[index]


register()


def slow_graph(num_shards: int, config: SlowConfig) -> Graph:
    """One job."""
    return make_graph([Job(JOB, "slow", 0, num_shards, 7, config, {}, config.resources)])
