"""Sites that limit how many jobs a user may have, how long arrays may be, and what may be asked: runs finish all the same."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes import TouchConfig, chain, child_environment, driven, write_run
from sandbox import Sandbox, running_sandbox

from aipo_hpc.clusters.slurm import SlurmCluster
from aipo_hpc.graph import Graph
from aipo_hpc.recipe import SlurmConfig
from aipo_hpc.store import Run

FAST = SlurmConfig(query_seconds=1.0)


@contextmanager
def user_of(sandbox: Sandbox, folder: Path) -> Iterator[Path]:
    """This process uses the sandbox; the file that is given counts the client commands."""
    counted = folder / "commands"
    wrappers = folder / "bin"
    wrappers.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scontrol", "scancel"):
        real = f"/usr/bin/{name}"
        (wrappers / name).write_text(f'#!/bin/sh\necho {name} >> {counted}\nexec {real} "$@"\n')
        (wrappers / name).chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**sandbox.env, **child_environment(folder / "site")}.items():
            patch.setenv(name, value)
        patch.setenv("PATH", f"{wrappers}:{os.environ['PATH']}")
        yield counted


def follow(run: Run, graph: Graph) -> list[str]:
    """Drive a run to its end; returns what the driver said."""
    with driven(run, graph, SlurmCluster(FAST)) as at_work:
        assert at_work.driver.follow(0.3)
    return at_work.lines


@pytest.mark.slow
def test_a_run_finishes_where_few_jobs_and_short_arrays_are_allowed(tmp_path: Path) -> None:
    executions = tmp_path / "executions"
    graph = chain(12, TouchConfig(executions=str(executions)))
    run = write_run(tmp_path / "run", graph)
    flags = {"nodes": 1, "enforce_limits": True, "max_array_size": 4}
    with running_sandbox(tmp_path / "sandbox", **flags) as sandbox, user_of(sandbox, tmp_path) as counted:
        sandbox.run("sacctmgr", "--immediate", "modify", "user", "root", "set", "MaxSubmitJobs=6", "MaxJobs=3")
        lines = follow(run, graph)
        commands = Counter(counted.read_text().split())
    ran = executions.read_text().splitlines()
    refused = [event for event in run.read_journal() if event["event"] == "refused"]
    sizes = [len(event["shards"]) for event in run.read_journal() if event["event"] == "submit"]
    print(
        f"25 shards, at most 6 jobs at once in arrays of 4: {dict(commands)}, {len(refused)} refused for lack of room"
    )
    assert len(ran) == len(set(ran)) == 25
    assert refused and max(sizes) <= 4 and sum("no room" in line for line in lines) == 1
    assert not any(run.job(name).failures() for name in graph.jobs)


def test_a_run_finishes_where_arrays_are_forbidden_and_nothing_is_accounted(tmp_path: Path) -> None:
    executions = tmp_path / "executions"
    graph = chain(3, TouchConfig(executions=str(executions)))
    run = write_run(tmp_path / "run", graph)
    flags = {"nodes": 1, "no_accounting": True, "max_array_size": 1}
    with running_sandbox(tmp_path / "sandbox", **flags) as sandbox, user_of(sandbox, tmp_path):
        follow(run, graph)
    assert len(executions.read_text().splitlines()) == 7
    assert {len(event["shards"]) for event in run.read_journal() if event["event"] == "submit"} == {1}


def test_a_tenth_of_a_command_per_shard_is_enough(slurm_sandbox: Sandbox, tmp_path: Path) -> None:
    graph = chain(100)
    run = write_run(tmp_path / "run", graph)
    with user_of(slurm_sandbox, tmp_path) as counted:
        with driven(run, graph, SlurmCluster(SlurmConfig())) as at_work:
            assert at_work.driver.follow(0.5)
        commands = Counter(counted.read_text().split())
    total = sum(commands.values())
    print(f"{total} client commands for 201 shards: {total / 201:.3f} each, {dict(commands)}")
    assert total / 201 <= 0.1


@pytest.mark.slow
def test_a_run_outlives_a_silent_controller_and_a_silent_accounting(slurm_sandbox: Sandbox, tmp_path: Path) -> None:
    hold, executions = tmp_path / "hold", tmp_path / "executions"
    hold.touch()
    graph = chain(3, TouchConfig(hold=str(hold), executions=str(executions)))
    run = write_run(tmp_path / "run", graph)
    with user_of(slurm_sandbox, tmp_path), driven(run, graph, SlurmCluster(FAST)) as at_work:
        while at_work.driver.tick().submit:
            pass
        told = at_work.lines
        for daemon in ("slurmctld", "slurmdbd"):
            slurm_sandbox.stop_daemon(daemon)
            try:
                began, seen = time.monotonic(), len(told)
                while time.monotonic() - began < 5 or (daemon == "slurmctld" and len(told) == seen):
                    assert time.monotonic() - began < 120
                    at_work.driver.tick()
                    time.sleep(0.3)
            finally:
                slurm_sandbox.start_daemon(daemon)
        hold.unlink()
        assert at_work.driver.follow(0.3)
    assert any("scheduler does not answer" in line for line in at_work.lines)
    ran = executions.read_text().splitlines()
    assert len(ran) == len(set(ran)) == 7
    assert not any(run.job(name).failures() for name in graph.jobs)
