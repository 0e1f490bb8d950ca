"""Stand-ins that let the core be tested without models or a scheduler: a tiny stage, graphs of it, a scripted cluster."""

import builtins
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aipo_hpc import driver, errors, journal, worker
from aipo_hpc.clusters import Cluster, Limits, Submission, TaskState
from aipo_hpc.decision import Decision, View
from aipo_hpc.driver import Driver
from aipo_hpc.graph import Edge, Graph, Job, make_graph
from aipo_hpc.journal import Journal
from aipo_hpc.lease import Lease
from aipo_hpc.record import job_record
from aipo_hpc.resources import Resources
from aipo_hpc.sentinel import Output, Sentinel
from aipo_hpc.settings import memory_bound, tuning
from aipo_hpc.stage_table import STAGES, Stage
from aipo_hpc.store import Run
from aipo_hpc.task import Outcome, Task

OUT = "out.txt"


@dataclass(frozen=True)
class TouchConfig:
    """A stage that writes one line, and can be told to misbehave."""

    text: str = "x"
    """What it writes."""
    executions: str = tuning("")
    """A file to which each execution appends its job and shard."""
    hold: str = tuning("")
    """It waits while this file is there."""
    fail: str = tuning("")
    """It raises what this file names (an exception's name and message), while the file is there."""
    width: int = memory_bound(8)
    """What is lowered when memory ran out; each attempt writes it down."""
    resources: Resources = tuning(Resources())


def run(config: TouchConfig, task: Task) -> Outcome:
    """Write the text and what the inputs said."""
    if config.executions:
        with Path(config.executions).open("a") as file:
            file.write(f"{task.job} {task.shard}\n")
    (task.out / "width").write_text(str(config.width))
    while config.hold and Path(config.hold).exists():
        time.sleep(0.02)
    if config.fail and Path(config.fail).exists():
        name, _, message = Path(config.fail).read_text().partition(" ")
        raise (getattr(errors, name, None) or getattr(builtins, name))(message)
    said = "".join(path.read_text() for source in task.inputs.values() for path in source.files)
    (task.out / OUT).write_text(f"{said}{config.text} {task.job} {task.shard}\n")
    return Outcome(1, (OUT,))


def register() -> None:
    """Make the stage known, in this process."""
    STAGES["touch"] = Stage("fakes:TouchConfig")  # type: ignore[index]


register()


def touch(name: str, num_shards: int = 1, config: TouchConfig | None = None, **inputs: tuple[str, str]) -> Job:
    """A job of the stage; inputs as ``name=(job, "all" or "shard")``."""
    config = config or TouchConfig()
    edges = {key: Edge(job, OUT, by) for key, (job, by) in inputs.items()}  # type: ignore[arg-type]
    return Job(name, "touch", int(name[5:7]), num_shards, 7, config, edges, config.resources)


def chain(num_shards: int = 4, config: TouchConfig | None = None, iterations: int = 1) -> Graph:
    """Per iteration: ``a`` (shards), ``b`` (shard by shard from a), ``c`` (one, from all of b); the next a reads c."""
    jobs: list[Job] = []
    for iteration in range(iterations):
        at = f"iter-{iteration:02d}"
        before = {"last": (f"iter-{iteration - 1:02d}/c", "all")} if iteration else {}
        jobs.append(touch(f"{at}/a", num_shards, config, **before))
        jobs.append(touch(f"{at}/b", num_shards, config, source=(f"{at}/a", "shard")))
        jobs.append(touch(f"{at}/c", 1, config, source=(f"{at}/b", "all")))
    return make_graph(jobs)


def write_run(path: Path, graph: Graph, payload_timeout: float = 1.0) -> Run:
    """A run directory as a launch leaves it before it submits anything."""
    run = Run(path)
    run.create()
    settings = {"name": "fake", "cluster": "local", "run_dir": str(path)}
    run.write_recipe({"run_id": "cafe", "recipe": "fake", "settings": settings})
    for job in graph.jobs.values():
        run.job(job.name).create(job_record(graph, job, payload_timeout))
    return run


def sentinel(graph: Graph, job: str, shard: int, attempt: str = "one", outputs: tuple[Output, ...] = ()) -> Sentinel:
    """A sentinel that would be believed."""
    return Sentinel(job, shard, graph.fingerprints[job], attempt, 1, 1, outputs, {}, {}, 1.0, 2.0, "here")


def finish(run: Run, graph: Graph, job: str, shard: int, text: str = "x\n") -> Sentinel:
    """Make a shard done, payload included."""
    folder = run.job(job)
    out, _ = folder.begin_attempt(shard, "one")
    (out / OUT).write_text(text)
    output = Output(OUT, len(text.encode()), hashlib.sha256(text.encode()).hexdigest())
    made = sentinel(graph, job, shard, outputs=(output,))
    folder.publish(made)
    return made


@contextmanager
def small_disk(folder: Path, size: str = "64k") -> Iterator[Path]:
    """A file system of its own that is soon full; skips where nothing may be mounted."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes=200", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a small tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Fill a small disk to the last byte; remove the returned file to free it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 512)
        except OSError:
            return ballast


@dataclass
class Clock:
    """The time, as far as driver and journal see it; sleeping moves it."""

    now: float = 1_700_000_000.0
    on_sleep: Callable[[], None] = lambda: None

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Clock":
        monkeypatch.setattr(driver, "time", self)
        monkeypatch.setattr(journal, "time", self)
        return self


SLURM_LIKE = Limits(dependencies=True, max_array_size=1000, settle=15.0, query_interval=0.0)


@dataclass
class ScriptedCluster:
    """Takes submissions and says of them what the test wants; ``answers`` are raised instead of taking one."""

    limits: Limits = SLURM_LIKE
    taken: list[Submission] = field(default_factory=list)
    """What was taken, in order."""
    answers: list[Exception | None] = field(default_factory=list)
    """One per submission to come: raised if it is an exception."""
    takes_although: bool = False
    """Whether a submission that raises ClusterError was taken all the same."""
    told: dict[str, dict[int, TaskState]] = field(default_factory=dict)
    """States by submission and index; what was taken and is not here waits."""
    forgets: set[str] = field(default_factory=set)
    """Names that it does not know."""
    room: int | None = None
    """How many more elements it takes."""
    outage: Exception | None = None
    cancelled: list[str] = field(default_factory=list)
    num_queries: int = 0
    after_submit: Callable[[Submission], None] = lambda submission: None

    def check(self, graph: Graph) -> None:
        """Anything goes."""

    def submit(self, run: Run, job: Job, submission: Submission, after: Sequence[Submission]) -> str:
        if self.room is not None and len(submission.shards) > self.room:
            raise errors.NoRoom(f"{job.name}: the scheduler has no room")
        answer = self.answers.pop(0) if self.answers else None
        if answer is None or self.takes_although:
            self.taken.append(submission)
            if self.room is not None:
                self.room -= len(submission.shards)
            self.after_submit(submission)
        if answer is not None:
            raise answer
        return str(len(self.taken))

    def states(self, submissions: Sequence[Submission]) -> Mapping[str, Mapping[int, TaskState]]:
        self.num_queries += 1
        if self.outage is not None:
            raise self.outage
        known = {submission.name for submission in self.taken} - self.forgets
        waiting = TaskState(alive=True)
        return {
            submission.name: {
                index: self.told.get(submission.name, {}).get(index, waiting) for index in range(len(submission.shards))
            }
            for submission in submissions
            if submission.name in known
        }

    def cancel(self, submissions: Sequence[Submission]) -> None:
        self.cancelled += [submission.name for submission in submissions]

    def end(self, kind: str | None, *names: str) -> None:
        """All elements of these submissions (default: of all) are over."""
        for submission in self.taken:
            if not names or submission.name in names:
                over = TaskState(alive=False, kind=kind, detail="as the test says")
                self.told[submission.name] = dict.fromkeys(range(len(submission.shards)), over)


def execute(run: Run, submission: Submission, index: int) -> None:
    """Do the work of one element, here."""
    worker.Envelope(
        str(run.path), submission.job, submission.shards[index], submission.name, index, submission.fence
    ).run()


@dataclass
class Driven:
    """A driver with what it said."""

    driver: Driver
    journal: Journal
    lines: list[str]
    views: list[tuple[Decision, View]]


@contextmanager
def driven(
    run: Run, graph: Graph, cluster: Cluster, keep_models: int | None = None, step: bool = False
) -> Iterator[Driven]:
    """A driver at work on a run, as a launch starts it, or a step of a chain."""
    with Lease(run) as lease:
        kept = Journal(run)
        _ = kept.step() if step else kept.launch()
        lines: list[str] = []
        views: list[tuple[Decision, View]] = []
        made = Driver(
            run,
            "cafe",
            graph,
            cluster,
            kept,
            lease,
            lines.append,
            lambda *seen: views.append(seen),  # type: ignore[arg-type]
            keep_models,
        )
        yield Driven(made, kept, lines, views)


def eventually(holds: Callable[[], Any], seconds: float = 20) -> bool:
    """Whether it holds within the time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def child_environment(folder: Path) -> dict[str, str]:
    """Variables with which Python processes started from here know the stage ``touch``."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text("import fakes\n")
    here = Path(__file__).parent
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(here), str(here.parent)])}
