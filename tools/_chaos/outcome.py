"""What became of a run: its executions, told by the accounting, and its results beside those of an undisturbed run."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations

from _chaos.world import World
from aipo_hpc.graph import Graph
from aipo_hpc.journal import Journal
from aipo_hpc.record import read_graph
from aipo_hpc.sentinel import Sentinel
from aipo_hpc.store import Run

COMPARED = (".safetensors", ".json", ".parquet", ".jinja")
"""Files that must equal an undisturbed run's. Left out: the log of training metrics, which holds times."""


@dataclass(frozen=True)
class Execution:
    """One start of one shard, in seconds since the epoch. It ended, as far as work goes, when its failure was recorded."""

    job: str
    shard: int
    submission: str
    index: int
    begin: float
    end: float
    tasks: int
    extra: bool = False
    """Whether it did part of a shard along with another one, as it was meant to."""

    def overlaps(self, other: "Execution") -> bool:
        """Whether both were at work at once and should not; the accounting knows whole seconds."""
        same = (self.job, self.shard) == (other.job, other.shard) and not (self.extra or other.extra)
        return same and min(self.end, other.end) - max(self.begin, other.begin) > 1.0


@dataclass
class Outcome:
    """The figures of the report."""

    injected: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    shards: int = 0
    executions: int = 0
    extra: int = 0
    """Executions that did part of another one's shard, because that stood still."""
    duplicates: list[str] = field(default_factory=list)
    rows_lost: int = 0
    differences: list[str] = field(default_factory=list)
    """Results that are not those of the undisturbed run."""
    unused: int = 0
    """Files that were damaged after they had been read for the last time, which nobody looks at."""
    seconds: float = 0.0
    wasted: float = 0.0
    commands: int = 0
    """Commands that a human had to type, beyond the launch command again."""

    def add(self, other: "Outcome") -> None:
        """Add another run's figures."""
        self.injected += other.injected
        for name in (
            "launches",
            "shards",
            "executions",
            "extra",
            "rows_lost",
            "unused",
            "seconds",
            "wasted",
            "commands",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.duplicates += other.duplicates
        self.differences += other.differences

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return not (self.duplicates or self.differences or self.rows_lost or self.commands)

    def table(self) -> str:
        """The report, as a table in Markdown."""
        faults = ", ".join(f"{kind} {count}" for kind, count in sorted(self.injected.items()))
        rows = [
            ("faults injected", f"{self.injected.total()}: {faults}"),
            ("launches of the same command", str(self.launches)),
            ("human commands needed beyond those", str(self.commands)),
            ("shard executions / shards", f"{self.executions} / {self.shards}"),
            ("of these extra ones, for shards that stood still", str(self.extra)),
            ("duplicate concurrent executions", str(len(self.duplicates))),
            ("rows lost", str(self.rows_lost)),
            ("results that differ from the undisturbed run's", str(len(self.differences))),
            ("files damaged after their last use", str(self.unused)),
            ("task-seconds wasted / used", f"{self.wasted:.0f} / {self.seconds:.0f}"),
        ]
        return "\n".join(["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)])


def judge(world: World, undisturbed: Run) -> Outcome:
    """Compare a finished run with an undisturbed one, and count what it took."""
    run = world.run
    graph = read_graph(run)
    done, quiet = sentinels(run, graph), sentinels(undisturbed, graph)
    outcome = Outcome(launches=world.user.launches)
    sent = [name for name, job in graph.jobs.items() if job.resources is not None]
    outcome.shards = sum(graph.jobs[name].num_shards for name in sent)
    for name in graph.jobs:
        rows = [sum(each.rows for each in found[name].values()) for found in (done, quiet)]
        outcome.rows_lost += max(0, rows[1] - rows[0])
        outcome.differences += differences(name, done[name], quiet[name])
        outcome.unused += sum(run.job(name).damage(each) is not None for each in done[name].values())
    executions = read_executions(world, graph)
    outcome.executions = len(executions)
    outcome.extra = sum(each.extra for each in executions)
    outcome.duplicates = [
        f"{one.job} shard {one.shard}: {one.submission} and {other.submission}"
        for one, other in combinations(executions, 2)
        if one.overlaps(other)
    ]
    outcome.seconds = sum((each.end - each.begin) * each.tasks for each in executions)
    outcome.wasted = outcome.seconds - sum(
        (each.end - each.begin) * each.tasks for each in executions if made(each, done[each.job])
    )
    return outcome


def sentinels(run: Run, graph: Graph) -> dict[str, dict[int, Sentinel]]:
    """All sentinels of a run, by job and shard, read anew."""
    return {name: Run(run.path).job(name).done(graph.fingerprints[name]) for name in graph.jobs}


def differences(job: str, done: Mapping[int, Sentinel], quiet: Mapping[int, Sentinel]) -> list[str]:
    """Files of a job whose content is not that of the undisturbed run's."""
    found = [f"{job}: shards {sorted(set(done) ^ set(quiet))} in one of them only"] if set(done) != set(quiet) else []
    for shard in sorted(set(done) & set(quiet)):
        one, other = (
            {each.path: each.sha256 for each in sentinel.outputs if each.path.endswith(COMPARED)}
            for sentinel in (done[shard], quiet[shard])
        )
        found += [
            f"{job} shard {shard}: {path}"
            for path in sorted(one.keys() | other.keys())
            if one.get(path) != other.get(path)
        ]
    return found


def made(execution: Execution, done: Mapping[int, Sentinel]) -> bool:
    """Whether the shard's sentinel is of this execution."""
    sentinel = done.get(execution.shard)
    if sentinel is None or not sentinel.attempt.startswith(f"{execution.submission}.{execution.index}."):
        return False
    return execution.begin - 1 <= sentinel.ended <= execution.end + 1


def read_executions(world: World, graph: Graph) -> list[Execution]:
    """All starts of the run's shards, from the accounting: each requeue is one of its own."""
    submissions = Journal(world.run).submissions
    names = ",".join(submissions)
    world.user.environment["SLURM_TIME_FORMAT"] = "%s"
    told = world.slurm(
        "sacct", "--allocations", "--duplicates", "--noheader", "--parsable2", f"--name={names}",
        "--starttime=now-2days", "--format=JobName,JobID,Start,End",
    )  # fmt: skip
    if told is None:
        raise RuntimeError("sacct does not answer")
    failures: dict[tuple[str, int], list[float]] = {}
    for name in graph.jobs:
        for failure in world.run.job(name).failures():
            if found := re.fullmatch(r"(.+)\.(\d+)\.r\d+", failure.attempt):
                failures.setdefault((found[1], int(found[2])), []).append(failure.time)
    executions = []
    for line in told.splitlines():
        name, job_id, begin, end = line.split("|")[:4]
        element = job_id.partition("_")[2]
        if not begin.isdigit() or not end.isdigit() or not (element.isdigit() or not element):
            continue  # never started
        index, submission = int(element or 0), submissions[name]
        recorded = [when for when in failures.get((name, index), ()) if int(begin) <= when <= int(end) + 1]
        over = min([float(end), *recorded])
        resources = graph.jobs[submission.job].resources
        assert resources is not None
        tasks = resources.nodes * resources.tasks_per_node
        shard, extra = submission.shards[index], submission.extra
        executions.append(Execution(submission.job, shard, name, index, float(begin), over, tasks, extra))
    return executions
