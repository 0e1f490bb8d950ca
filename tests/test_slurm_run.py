"""A whole iteration on a real Slurm: arrays, overlap, two nodes of DeepSpeed, sentinels that agree with the accounting."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sandbox import Sandbox

from aipo_hpc.graph import Graph
from aipo_hpc.launch import launch
from aipo_hpc.recipe import Recipe
from aipo_hpc.record import read_graph
from aipo_hpc.sentinel import Sentinel
from aipo_hpc.store import Run

pytestmark = pytest.mark.timeout(1800)
"""Whole runs, each process of which loads torch: minutes on a busy machine, and longer than most tests may take."""

PATIENCE = 800.0
"""Seconds after which a driver is taken to hang."""

SMALL = [
    "recipe=demo", "cluster=slurm", "iterations=1", "data.limit=24", "data.num_held_out=6", "generate.n=3",
    "generate.max_tokens=12", "train.num_train_epochs=1", "train.save_steps=1", "train.global_batch_size=8",
    "train.per_device_train_batch_size=4", "train.resources.cpus_per_task=1", "slurm.query_seconds=3", "poll_seconds=0.3",
]  # fmt: skip


def command(run: Path, *fields: str) -> list[str]:
    """The launch command of the small run."""
    return [sys.executable, "-m", "aipo_hpc.launch", *SMALL, f"run_dir={run}", *fields]


@contextmanager
def driver(argv: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A driver as a process of its own, ended at the latest when the test is."""
    process = subprocess.Popen(argv, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def sentinels(run: Run, graph: Graph) -> dict[str, dict[int, Sentinel]]:
    """All sentinels of a run, by job and shard."""
    return {name: dict(run.job(name).done(graph.fingerprints[name])) for name in graph.jobs}


def wait_until(what: str, holds: object, seconds: float = PATIENCE) -> None:
    """Poll until ``holds()``; fails naming ``what`` after the time."""
    assert callable(holds)
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


@pytest.fixture
def environment(slurm_sandbox: Sandbox) -> dict[str, str]:
    """The environment of a user of the sandbox."""
    return {**os.environ, **slurm_sandbox.env, "OMP_NUM_THREADS": "1"}


def test_an_iteration_runs_on_slurm_with_overlap_two_nodes_and_sentinels_that_agree_with_sacct(
    slurm_sandbox: Sandbox, environment: dict[str, str], tmp_path: Path
) -> None:
    argv = command(
        tmp_path / "run",
        "generate.num_shards=8",
        "generate.resources.array_parallelism=3",
        "reference.num_shards=2",
        "train.resources.nodes=2",
        "train.zero_stage=2",
    )
    finished = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    print(finished.stderr, finished.stdout)
    assert finished.returncode == 0, finished.stderr
    assert "win rate" in finished.stdout and "final model: " in finished.stdout

    run = Run(tmp_path / "run")
    graph = read_graph(run)
    done = sentinels(run, graph)
    assert {name: len(shards) for name, shards in done.items()} == {
        name: job.num_shards for name, job in graph.jobs.items()
    }
    ranks, generates = done["iter-00/rank"].values(), done["iter-00/generate"].values()
    assert min(rank.started for rank in ranks) < max(generate.ended for generate in generates), "rank did not overlap"
    assert done["iter-00/train"][0].num_processes == 2
    nodes = slurm_sandbox.run("scontrol", "show", "hostnames", done["iter-00/train"][0].scheduler["slurm_job_nodelist"])
    assert len(nodes.split()) == 2

    recorded = {
        f"{ids['slurm_array_job_id']}_{ids['slurm_array_task_id']}"
        if "slurm_array_job_id" in ids
        else ids["slurm_job_id"]
        for shards in done.values()
        for ids in (sentinel.scheduler for sentinel in shards.values())
        if ids
    }
    accounted: dict[str, str] = {}

    def accounting_is_complete() -> bool:
        query = ["sacct", "-X", "-n", "-P", "--format=JobID,State", f"--name={','.join(submission_names(run))}"]
        accounted.clear()  # waiting elements are told together, under a name that goes when they start
        accounted.update(line.split("|") for line in slurm_sandbox.run(*query).split())
        return set(accounted.values()) == {"COMPLETED"}

    wait_until("sacct tells that all are over", accounting_is_complete)
    assert set(accounted) == recorded
    print(
        f"{len(recorded)} elements in sacct, each with its sentinel; {len(list(submission_names(run)))} sbatch commands"
    )

    again = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert again.returncode == 0 and "sent" not in again.stderr, "a finished run submitted something"


def test_a_killed_driver_is_resumed_without_running_a_shard_twice_and_gives_the_same_model(
    environment: dict[str, str], tmp_path: Path, small_recipe: Recipe
) -> None:
    run = Run(tmp_path / "killed")
    argv = command(run.path, "generate.num_shards=4", "generate.resources.array_parallelism=2", "train.zero_stage=0")
    with driver(argv, environment) as first:
        wait_until("first finished shard of generate", lambda: (run.path / "iter-00/generate/done/00000.json").exists())
        first.send_signal(signal.SIGKILL)
        first.wait()
    graph = read_graph(run)
    assert len(run.job("iter-00/generate").done(graph.fingerprints["iter-00/generate"])) < 4, (
        "killed too late to prove it"
    )
    with driver(argv, environment) as second:
        assert second.wait(timeout=PATIENCE) == 0

    executions = [path for name in graph.jobs for path in (run.path / name / "shards").glob("*/*") if path.is_dir()]
    assert len(executions) == sum(job.num_shards for job in graph.jobs.values()), "a shard ran twice"
    assert sum(len(run.job(name).failures()) for name in graph.jobs) == 0

    quiet = launch(
        replace(
            small_recipe,
            iterations=1,
            generate=replace(small_recipe.generate, num_shards=4),
            train=replace(small_recipe.train, resources=replace(small_recipe.train.resources, cpus_per_task=1)),
        )
    )
    assert output_hashes(run, "iter-00/train") == output_hashes(quiet, "iter-00/train")
    print("rows, pairs and weights equal those of an undisturbed run, byte for byte")


def submission_names(run: Run) -> list[str]:
    """Names of all that a run submitted."""
    return [str(event["name"]) for event in run.read_journal() if event["event"] == "submitted"]


def output_hashes(run: Run, job: str) -> dict[str, str]:
    """Hashes of what a job made, apart from its log of metrics."""
    graph = read_graph(run)
    (sentinel,) = run.job(job).done(graph.fingerprints[job]).values()
    return {
        output.path: output.sha256 for output in sentinel.outputs if output.path.endswith((".safetensors", ".json"))
    }


def test_a_record_of_a_job_is_readable_json(small_recipe: Recipe) -> None:
    prepared = launch(replace(small_recipe, drive="prepare"))
    record = json.loads((prepared.path / "iter-00/generate/job.json").read_text())
    assert record["settings"]["n"] == small_recipe.generate.n
    assert record["inputs"]["prompts"]["job"] == "iter-00/prompts"
