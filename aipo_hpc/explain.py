"""Why a run cannot go on, in words: which shards, their errors, and what to type."""

from aipo_hpc.decision import GivenUp
from aipo_hpc.failures import KINDS
from aipo_hpc.store import Run


def explain(run: Run, given_up: tuple[GivenUp, ...]) -> str:
    """Why a run cannot go on: which shards, their errors, and what to type."""
    lines = [f"{run.path}: cannot go on."]
    for given in given_up[:5]:
        failure = given.failure
        lines.append(f"{given.job} shard {given.shard}: {failure.kind}: {failure.message}")
        if failure.log:
            lines.append(f"  log: {failure.log}")
        lines.append(f"  what to do: {KINDS[failure.kind].advice}")
    if len(given_up) > 5:
        lines.append(f"... and {len(given_up) - 5} more shards")
    if given_up:
        lines.append(f"To see more, type: python -m aipo_hpc logs {run.path} {given_up[0].job} {given_up[0].shard}")
    lines.append("Then type the same command again: what is done stays done.")
    return "\n".join(lines)
