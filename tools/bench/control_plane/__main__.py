"""Measure ways to run two stages of no-op shards on one Slurm, side by side in one run.

    python tools/bench/control_plane [--sizes 64 512] [--repeats 5] [--tools raw ours submitit datatrove snakemake]

Every tool runs the same payload (``payload.py``) on the same throw-away sandbox: stage 2's shard reads its own shard of
stage 1, and one shard in twenty fails the first time in each stage. A tool is driven as its users drive it. Whenever its
command has ended, nothing of it waits or runs, and shards are still missing, a person types the command again (and first
removes jobs that can never start): that is counted, and takes no time here. Tools take turns, so a busy machine hits all.

    makespan    seconds from the first command to the last output of stage 2, inf if a run was given up; the ratio is to the
                raw chain of the same turn
    commands    Slurm client commands issued, counted by wrappers on PATH, and per shard
    CPU         seconds of processor time of the driving processes with their client commands
    executions  payload starts per shard; duplicates: starts while another execution of that shard ran
    stuck       jobs left pending for ever by a dependency that cannot be satisfied
    early       stage-2 shards started before their input was valid
    human       commands a person typed after the first

The peers come from the package index into an environment of the benchmark's own, ``--peers`` (made at the first call).
"""

import argparse
import os
import statistics
import subprocess
import sys
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import payload
from contenders import CONTENDERS, Contender
from observe import Outcome, run_to_the_end

TOOLS = Path(__file__).resolve().parents[2]
PEERS = ["datatrove==0.10.1", "snakemake==9.27.1", "snakemake-executor-plugin-slurm==2.8.0", "submitit==1.5.4"]


@dataclass(frozen=True)
class Row:
    """The medians of one tool at one size."""

    tool: str
    shards: str
    runs: int
    makespan: str
    ratio_to_raw: str
    commands: str
    commands_per_shard: str
    cpu_seconds: str
    executions_per_shard: str
    duplicates: str
    stuck: str
    early: str
    human: str


def main() -> None:
    """Parse the command line, run all in turns, print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64], help="shards of each stage")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each tool at each size")
    parser.add_argument("--tools", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--patience", type=float, default=600.0, help="seconds after which a run is given up")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long a payload sleeps (0: a no-op)")
    parser.add_argument("--seed", type=int, default=0, help="which shards fail")
    parser.add_argument("--dir", type=Path, default=Path("/tmp/aipo_hpc-control-plane"))
    parser.add_argument("--peers", type=Path, default=Path("/tmp/aipo_hpc-control-plane/peers"))
    arguments = parser.parse_args()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    python = peers_python(arguments.peers) if set(arguments.tools) - {"raw", "ours"} else Path(sys.executable)
    sandbox = arguments.dir / "sandbox"
    exported = subprocess.run(
        [sys.executable, TOOLS / "slurm_sandbox", "start", f"--dir={sandbox}", "--max-array-size=4001"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    os.environ["SLURM_CONF"] = exported.strip().removeprefix("export SLURM_CONF=")
    try:
        rows = [row for size in arguments.sizes for row in measure(size, arguments, python)]
    finally:
        subprocess.run([sys.executable, TOOLS / "slurm_sandbox", "stop", f"--dir={sandbox}"], check=True)
    print_markdown(rows)


def measure(size: int, arguments: argparse.Namespace, python: Path) -> list[Row]:
    """All tools at one size, in turns."""
    outcomes: dict[str, list[Outcome]] = {tool: [] for tool in arguments.tools}
    for turn in range(arguments.repeats):
        for tool in arguments.tools:
            work = arguments.dir / f"{os.getpid()}-{tool}-{size}-{turn}"
            plan = payload.Plan(work, size, arguments.seed + turn, arguments.seconds)
            contender: Contender = CONTENDERS[tool](plan, python)
            outcomes[tool].append(run_to_the_end(contender, plan, arguments.patience))
            print(f"{tool} {size} turn {turn}: {outcomes[tool][-1]}", file=sys.stderr, flush=True)
    raw = outcomes.get("raw", [])
    return [summarize(tool, size, each, raw) for tool, each in outcomes.items()]


def summarize(tool: str, size: int, outcomes: list[Outcome], raw: list[Outcome]) -> Row:
    """Medians over the turns; the ratio is taken turn by turn."""

    def median(values: list[float], form: str = "{:g}") -> str:
        return form.format(statistics.median(values))

    pairs = zip(outcomes, raw, strict=True) if raw else []
    ratios = [mine.makespan / theirs.makespan for mine, theirs in pairs]
    return Row(
        tool,
        f"2 x {size}",
        len(outcomes),
        median([each.makespan for each in outcomes], "{:.1f}"),
        median(ratios, "{:.2f}") if ratios else "",
        median([each.commands for each in outcomes]),
        median([each.commands / (2 * size) for each in outcomes], "{:.3f}"),
        median([each.cpu for each in outcomes], "{:.1f}"),
        median([each.executions / (2 * size) for each in outcomes], "{:.3f}"),
        median([each.duplicates for each in outcomes]),
        median([each.stuck for each in outcomes]),
        median([each.early for each in outcomes]),
        median([each.human for each in outcomes]),
    )


def print_markdown(rows: list[Row]) -> None:
    """One table."""
    names = [field.name.replace("_", " ") for field in fields(Row)]
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(map(str, astuple(row))) + " |")


def peers_python(folder: Path) -> Path:
    """The interpreter of the peers' environment, made at the first call."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEERS], check=True)
    return python


if __name__ == "__main__":
    main()
