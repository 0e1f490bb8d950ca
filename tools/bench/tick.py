"""Measure what the driver itself costs on a run of many shards: a first look, a tick, a resume up to its first submission.

    python tools/bench/tick.py [--num-shards 10000] [--missing 3] [--repeat 5] [--dir FOLDER]

A run of one array job and one job that needs all of it is written below FOLDER (default: a temporary folder), sentinels and
all. The resume is measured in fresh processes: from the first look, listing and reading of all sentinels included, to the
first call of the cluster's submit; ``process`` is the whole process with its imports. The file system's caches are warm.
The figures are the best of the repetitions in seconds of wall time, and of CPU time in brackets.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from aipo_hpc.clusters import Limits, Submission, TaskState
from aipo_hpc.driver import Driver
from aipo_hpc.errors import SubmitRefused
from aipo_hpc.graph import Edge, Graph, Job, make_graph
from aipo_hpc.job_folder import JobFolder
from aipo_hpc.journal import Journal
from aipo_hpc.lease import Lease
from aipo_hpc.record import job_record, read_graph
from aipo_hpc.resources import Resources
from aipo_hpc.sentinel import Output, Sentinel
from aipo_hpc.stages.generate import GenerateConfig
from aipo_hpc.stages.pairs import PairsConfig
from aipo_hpc.store import Run

MANY, ONE = "iter-00/generate", "iter-00/pairs"


class Submitted(SubmitRefused):
    """The driver has come to its first submission."""


class Cluster:
    """Takes everything and says that it runs; or, for a resume, stops the clock at the first submission."""

    limits = Limits(dependencies=True, max_array_size=1001, settle=15.0, query_interval=0.0)

    def __init__(self, *, stop: bool) -> None:
        self._stop = stop
        self.sent: list[tuple[int, ...]] = []

    def check(self, graph: Graph) -> None:
        """Anything goes."""

    def submit(self, run: Run, job: Job, submission: Submission, after: Sequence[Submission]) -> str:
        if self._stop:
            raise Submitted(submission.shards)
        self.sent.append(submission.shards)
        return str(len(self.sent))

    def states(self, submissions: Sequence[Submission]) -> Mapping[str, Mapping[int, TaskState]]:
        runs = TaskState(alive=True, running=True)
        return {each.name: dict.fromkeys(range(len(each.shards)), runs) for each in submissions}

    def cancel(self, submissions: Sequence[Submission]) -> None:
        """Nothing runs."""


def make_run(path: Path, num_shards: int) -> Graph:
    """A run directory of two jobs, nothing done."""
    resources = Resources()
    many = Job(MANY, "generate", 0, num_shards, 1, GenerateConfig(num_shards=num_shards), {}, resources)
    one = Job(ONE, "pairs", 0, 1, 1, PairsConfig(), {"ranked": Edge(MANY, "rows.parquet")}, resources)
    graph = make_graph([many, one])
    run = Run(path)
    run.create()
    run.write_recipe({"run_id": "bench", "recipe": "bench", "settings": {}})
    for job in graph.jobs.values():
        run.job(job.name).create(job_record(graph, job, 60.0))
    return graph


def finish(path: Path, graph: Graph, shards: Sequence[int]) -> None:
    """Sentinels as large as those of a real generate shard on Slurm, without fsync."""
    made = Sentinel(
        MANY, 0, graph.fingerprints[MANY], "", 1, 625, (Output("rows.parquet", 1234567, "f" * 64),),
        {"prompts": {"job": "iter-00/prompts", "sentinels": ["e" * 64]}, "policy": {"identity": "sha256:" + "d" * 64}},
        {"candidates": 3125, "prompt_tokens": 97531, "output_tokens": 1357911, "finished_stop": 3000, "finished_length": 125},
        1.7e9, 1.7e9 + 1234.5, "node0123",
        {"slurm_job_id": "12345678", "slurm_array_job_id": "12345678", "slurm_array_task_id": "7", "slurm_job_nodelist": "n1"},
        ("NVIDIA H100 80GB HBM3",),
    )  # fmt: skip
    for shard in shards:
        sentinel = replace(made, shard=shard, attempt=f"aipo-bench-1.{shard}.r0")
        (path / MANY / "done" / f"{shard:05d}.json").write_text(sentinel.to_json())


def driver(run: Run, graph: Graph, cluster: Cluster, lease: Lease) -> Driver:
    """A driver as a launch makes it, that tells and shows nothing."""
    journal = Journal(run)
    journal.launch()
    return Driver(run, "bench", graph, cluster, journal, lease, lambda line: None, lambda *seen: None)


def resume(path: Path) -> None:
    """What a fresh process does up to its first submission; prints the times."""
    run = Run(path)
    with Lease(run) as lease:
        graph = read_graph(run)
        made = driver(run, graph, Cluster(stop=True), lease)
        began, cpu = time.perf_counter(), time.process_time()
        try:
            made.tick()
        except Submitted as submitted:
            shards = submitted.args[0]
        print(json.dumps([time.perf_counter() - began, time.process_time() - cpu, time.process_time(), shards]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-shards", type=int, default=10_000)
    parser.add_argument("--missing", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resume:
        resume(arguments.resume)
        return
    with tempfile.TemporaryDirectory(prefix="tick-", dir=arguments.dir) as folder:
        measure(Path(folder), arguments.num_shards, arguments.missing, arguments.repeat)


def measure(folder: Path, num_shards: int, num_missing: int, repeat: int) -> None:
    missing = [number * (num_shards - 1) // max(1, num_missing - 1) for number in range(num_missing)]
    rows: list[tuple[str, list[tuple[float, float]]]] = []

    path = folder / "done"
    graph = make_run(path, num_shards)
    finish(path, graph, [shard for shard in range(num_shards) if shard not in missing])
    looks = [timed(lambda: JobFolder(path, MANY).done(graph.fingerprints[MANY])) for _ in range(repeat)]
    rows.append((f"first look: list and read {num_shards - len(missing)} sentinels", looks))

    within, whole = [], []
    for _ in range(repeat):
        began = time.perf_counter()
        argv = [sys.executable, __file__, f"--resume={path}"]
        said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
        wall, cpu, process, shards = json.loads(said)
        assert shards == missing, shards
        within.append((wall, cpu))
        whole.append((time.perf_counter() - began, process))
    rows.append((f"resume with {len(missing)} missing: first look to first submission", within))
    rows.append(("... the whole process, with its imports", whole))

    run = Run(path)
    with Lease(run) as lease:
        at_work = driver(run, graph, Cluster(stop=False), lease)
        at_work.tick()
        rows.append((f"a tick: all but {len(missing)} done", [timed(at_work.tick) for _ in range(repeat)]))

    path = folder / "running"
    graph = make_run(path, num_shards)
    run = Run(path)
    with Lease(run) as lease:
        at_work = driver(run, graph, Cluster(stop=False), lease)
        at_work.tick()
        rows.append(("a tick: all of them running", [timed(at_work.tick) for _ in range(repeat)]))
        finish(path, graph, range(0, num_shards, 2))
        at_work.tick()
        rows.append(("a tick: half done, half running", [timed(at_work.tick) for _ in range(repeat)]))

    width = max(len(what) for what, _ in rows)
    print(f"{num_shards} shards, best of {repeat}")
    for what, times in rows:
        print(f"{what:{width}}  {min(wall for wall, _ in times):6.3f} s  ({min(cpu for _, cpu in times):.3f} s CPU)")


def timed(call: object) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    assert callable(call)
    began, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - cpu


if __name__ == "__main__":
    main()
