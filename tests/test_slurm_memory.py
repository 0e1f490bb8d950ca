"""Slurm enforces memory limits: what it says of a job that takes more than it asked for, and what the driver makes of it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from _sandbox import cgroups
from fakes import driven, eventually, write_run
from hungry_stage import ROOM, hungry_graph
from sandbox import TOOL, Sandbox, running_sandbox

from aipo_hpc.clusters.slurm import SlurmCluster
from aipo_hpc.graph import Graph
from aipo_hpc.journal import Journal
from aipo_hpc.recipe import SlurmConfig
from aipo_hpc.sentinel import Failure
from aipo_hpc.store import Run

pytestmark = pytest.mark.timeout(300)

CGROUPS = Path("/sys/fs/cgroup/memory")
CANNOT = "memory limits cannot be enforced here"
PATIENCE = 120.0
SETTLE = 1.0
"""Seconds that the driver gives files to show up, on a file system of one machine."""
LIMIT, MORE = 256, 384
"""MB that a task of the hungry stage asks for, and one and a half times that."""


@pytest.fixture(scope="module")
def strict_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A Slurm of two nodes that enforces memory limits."""
    folder = tmp_path_factory.mktemp("strict") / "sandbox"
    try:
        with running_sandbox(folder, nodes=2, enforce_memory=True) as sandbox:
            yield sandbox
    except RuntimeError as error:
        if CANNOT not in str(error):
            raise
        pytest.skip(str(error))


# -- the sandbox ---------------------------------------------------------------------------------------------------------


def groups(sandbox: Path) -> list[str]:
    """Names of the memory cgroups of the sandbox in this folder."""
    own = cgroups.group(sandbox)
    return [path.name for path in [own, *own.rglob("*")] if path.is_dir()]


def eat(megabytes: int) -> str:
    return f"{sys.executable} -c 'hoard = [bytearray(b\"x\") * (1 << 20) for _ in range({megabytes})]'"


def ended(sandbox: Sandbox, *options: str) -> str:
    """How a job ends, as squeue says."""
    job = sandbox.run("sbatch", "--parsable", "--output=/dev/null", *options)

    def state() -> str:
        return sandbox.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T %r")

    assert eventually(lambda: state().split()[0] not in ("PENDING", "RUNNING", "COMPLETING"), 60), state()
    return state()


def test_a_job_that_takes_more_than_it_asked_for_is_out_of_memory_and_others_are_not(strict_sandbox: Sandbox) -> None:
    assert ended(strict_sandbox, "--mem=100M", f"--wrap={eat(200)}") == "OUT_OF_MEMORY OutOfMemory"
    assert ended(strict_sandbox, "--mem=300M", f"--wrap={eat(200)}") == "COMPLETED None"
    assert ended(strict_sandbox, f"--wrap={eat(200)}") == "COMPLETED None", "500 MB per CPU for who asks for none"
    assert ended(strict_sandbox, f"--wrap={eat(600)}") == "OUT_OF_MEMORY OutOfMemory"


def test_a_second_sandbox_has_its_own_cgroups_and_leaves_none_when_it_stops(
    strict_sandbox: Sandbox, tmp_path: Path
) -> None:
    with running_sandbox(tmp_path / "second", nodes=1, no_accounting=True, enforce_memory=True) as second:
        job = second.run(
            "sbatch", "--parsable", "--output=/dev/null", "--mem=300M", "--wrap=setsid sleep 300 & sleep 300"
        )
        assert eventually(lambda: f"job_{job}" in groups(second.folder))
        assert ended(strict_sandbox, "--nodelist=n1", f"--wrap={eat(600)}") == "OUT_OF_MEMORY OutOfMemory"
        assert ended(second, "--mem=100M", f"--wrap={eat(200)}") == "OUT_OF_MEMORY OutOfMemory"
        second.stop_daemon("n1", kill=True)
    assert groups(second.folder) == [], "a job was running, and nobody who would have removed its groups"
    assert "slurm_n1" in groups(strict_sandbox.folder)
    assert ended(strict_sandbox, "--mem=300M", f"--wrap={eat(200)}") == "COMPLETED None", "the other one goes on"


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        ("mount -t tmpfs none /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup", "there is no "),
        (f"mount -o remount,ro,bind {CGROUPS}", "Read-only file system"),
    ],
    ids=["cgroup version 2", "no group may be made"],
)
def test_where_limits_cannot_be_enforced_the_sandbox_says_what_is_missing(
    strict_sandbox: Sandbox, tmp_path: Path, machine: str, why: str
) -> None:
    for command, code in (("start --enforce-memory", 1), ("stop", 0)):
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", f"{machine} && {sys.executable} {TOOL} {command} --dir={tmp_path}/own"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        print(done.stderr)
        assert done.returncode == code
        if code:
            assert CANNOT in done.stderr and why in done.stderr and "start without it, or elsewhere" in done.stderr
    assert list((tmp_path / "own").iterdir()) == []
    assert groups(tmp_path / "own") == []


# -- the driver ----------------------------------------------------------------------------------------------------------


@dataclass
class Fed:
    """A run of the hungry stage's graph that came to its end."""

    sandbox: Sandbox
    run: Run
    graph: Graph
    cluster: SlurmCluster
    lines: list[str]

    def failures(self, job: str) -> list[Failure]:
        return self.run.job(f"iter-00/{job}").failures()

    def rooms(self, job: str, shard: int) -> list[tuple[int, int]]:
        """The batch of each attempt at a shard, and the MB that it had, in order."""
        attempts = (self.run.path / f"iter-00/{job}/shards/{shard:05d}").iterdir()
        found = [tuple(map(int, (each / ROOM).read_text().split())) for each in sorted(attempts, key=number)]
        print(f"{job} shard {shard}: batch and MB of each attempt {found}; failures", self.told(job))
        return found  # type: ignore[return-value]

    def told(self, job: str) -> list[tuple[int, str, str]]:
        return [(failure.shard, failure.kind, failure.message) for failure in self.failures(job)]

    def sent(self, job: str) -> list[str]:
        """What the driver said of submissions."""
        return [line for line in self.lines if line.startswith(f"iter-00/{job}: sent")]


def number(attempt: Path) -> int:
    """Of the submission that made an attempt."""
    return int(attempt.name.split(".")[0].rpartition("-")[2])


@pytest.fixture(scope="module")
def fed(strict_sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fed]:
    """Every job has been driven to its end; whether all is done is for the tests to say."""
    folder = tmp_path_factory.mktemp("fed")
    (folder / "sitecustomize.py").write_text("import hungry_stage\n")
    here = Path(__file__).parent
    graph = hungry_graph()
    run = write_run(folder / "run", graph)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(here), str(here.parent)]))
        patched.setenv("SLURM_CONF", str(strict_sandbox.conf))
        cluster = SlurmCluster(SlurmConfig(query_seconds=0.5))
        cluster.limits = replace(cluster.limits, settle=SETTLE)
        with driven(run, graph, cluster) as at_work:
            deadline = time.monotonic() + PATIENCE
            while not (decision := at_work.driver.tick()).finished and not decision.stuck:
                assert time.monotonic() < deadline, "\n".join(at_work.lines)
                time.sleep(0.1)
        print("\n".join(at_work.lines))
        yield Fed(strict_sandbox, run, graph, cluster, at_work.lines)


AGAIN = ", with 1.5 x the memory, 1/2 of the batch"


def test_a_task_that_took_too_much_memory_is_sent_again_with_more_of_it_and_half_the_batch_and_completes(
    fed: Fed,
) -> None:
    assert fed.rooms("itself", 0) == [(4, LIMIT)], "its sibling is left alone"
    assert fed.rooms("itself", 1) == [(4, LIMIT), (2, MORE)]
    (failure,) = fed.failures("itself")
    assert (failure.shard, failure.kind, failure.by_driver) == (1, "out_of_memory", True)
    assert failure.message == "Slurm: OUT_OF_MEMORY, OutOfMemory", "as squeue told it"
    assert [line.partition(", with")[1:] for line in fed.sent("itself")] == [("", ""), AGAIN.partition(", with")[1:]]
    done = fed.run.job("iter-00/itself").done(fed.graph.fingerprints["iter-00/itself"])
    assert len({sentinel.outputs for sentinel in done.values()}) == 1 and len(done) == 2, "with the same result"


def test_a_task_whose_child_was_killed_for_memory_says_so_itself(fed: Fed) -> None:
    assert fed.rooms("child", 0) == [(4, LIMIT)]
    assert fed.rooms("child", 1) == [(4, LIMIT), (2, MORE)]
    (failure,) = fed.failures("child")
    assert (failure.shard, failure.kind, failure.by_driver) == (1, "out_of_memory", False)
    assert "the engine's process ended with exit code -9" in failure.message
    assert "the kernel killed a process of this task for want of memory" in failure.message
    assert fed.sent("child")[1].endswith(AGAIN)


def test_a_gang_of_which_one_process_was_killed_for_memory_is_out_of_memory(fed: Fed) -> None:
    assert fed.rooms("gang", 0) == [(4, LIMIT), (2, MORE)]
    (failure,) = fed.failures("gang")
    assert (failure.kind, failure.by_driver) == ("out_of_memory", True), "nobody blames the connection"
    assert failure.message.startswith("Slurm: FAILED") and failure.message.endswith("a step of it OUT_OF_MEMORY")
    assert fed.sent("gang")[1].endswith(AGAIN)


def test_a_task_that_can_do_without_its_killed_child_is_done_and_what_waited_for_it_is_done_too(fed: Fed) -> None:
    (job,) = (line.split()[-1] for line in fed.sent("spare"))
    told = fed.sandbox.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")
    assert told == "OUT_OF_MEMORY", "so whoever waits in Slurm for it to succeed waits in vain"
    assert fed.rooms("spare", 0) == [(4, LIMIT)] and fed.failures("spare") == []
    assert {failure.kind for failure in fed.failures("after")} <= {"dependency"}
    assert fed.rooms("after", 0) == [(4, LIMIT)]


def test_sacct_tells_the_same_of_what_squeue_has_forgotten(
    fed: Fed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetful = tmp_path / "squeue"
    forgetful.write_text("#!/bin/sh\n")
    forgetful.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    firsts = {sent.job: sent for sent in reversed(Journal(fed.run).submissions.values())}
    last = {job: len(firsts[f"iter-00/{job}"].shards) - 1 for job in ("itself", "child", "gang")}

    def told(job: str) -> tuple[str | None, str]:
        state = fed.cluster.states([firsts[f"iter-00/{job}"]]).get(firsts[f"iter-00/{job}"].name, {}).get(last[job])
        return (state.kind, state.detail) if state else (None, "")

    # Accounting is a second or two behind, and with a step further than with its job.
    eventually(lambda: all(told(job)[0] == "out_of_memory" for job in last))
    for job in last:
        print(job, told(job))
        assert told(job)[0] == "out_of_memory" and "OUT_OF_MEMORY" in told(job)[1]
