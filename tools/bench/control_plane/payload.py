"""The shard that every tool runs: ``python payload.py WORK STAGE INDEX``. Needs nothing but the standard library.

WORK/plan.json             number of shards, seed, seconds
WORK/out/<stage>/<index>   the output of a finished shard, by rename
WORK/failed/<stage>-<index>  this shard has had its one failure
WORK/events/...            one file per execution: start, end, whether its input was valid
"""

import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FAILING_SHARE = 0.05


@dataclass(frozen=True)
class Plan:
    """What is to be run: shards of each of two stages."""

    work: Path
    size: int
    seed: int
    seconds: float

    def write(self) -> None:
        """Make the folder that the payload reads."""
        for name in ("out/1", "out/2", "failed", "events"):
            (self.work / name).mkdir(parents=True)
        values = {"size": self.size, "seed": self.seed, "seconds": self.seconds}
        (self.work / "plan.json").write_text(json.dumps(values))

    def output(self, stage: int, index: int) -> Path:
        """The file that a shard leaves."""
        return self.work / "out" / str(stage) / str(index)

    def missing(self, stage: int) -> list[int]:
        """Shards of a stage without output."""
        folder = self.work / "out" / str(stage)
        done = set(os.listdir(folder)) if folder.exists() else set()  # snakemake removes empty folders of outputs
        return [index for index in range(self.size) if str(index) not in done]

    def fails_once(self, stage: int) -> set[int]:
        """The shards of a stage that fail the first time."""
        count = max(1, round(self.size * FAILING_SHARE))
        return set(random.Random(f"{self.seed}/{stage}").sample(range(self.size), count))


def read_plan(work: Path) -> Plan:
    """The plan of a folder."""
    return Plan(work, **json.loads((work / "plan.json").read_text()))


def run(work: Path, stage: int, index: int) -> None:
    """Execute a shard. Raises RuntimeError for the planned failure, and for an input that is not there."""
    plan = read_plan(work)
    started = time.time()
    valid = stage == 1 or (plan.output(1, index).exists() and plan.output(1, index).read_text() == content(1, index))
    ok = False
    try:
        if not valid:
            raise RuntimeError(f"stage {stage} shard {index}: its input is not there")
        time.sleep(plan.seconds)
        marker = work / "failed" / f"{stage}-{index}"
        if index in plan.fails_once(stage) and not marker.exists():
            marker.touch()
            raise RuntimeError(f"stage {stage} shard {index}: the planned failure")
        plan.output(stage, index).parent.mkdir(parents=True, exist_ok=True)
        temporary = work / "out" / f".{stage}-{index}-{os.getpid()}"
        temporary.write_text(content(stage, index))
        temporary.rename(plan.output(stage, index))
        ok = True
    finally:
        event = {"stage": stage, "index": index, "start": started, "end": time.time(), "valid": valid, "ok": ok}
        (work / "events" / f"{stage}-{index}-{time.time_ns()}-{os.getpid()}").write_text(json.dumps(event))


def content(stage: int, index: int) -> str:
    """What the output of a shard says."""
    return f"{stage} {index}\n"


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
