"""The local Slurm cluster behaves like one: daemons, GPUs, accounting, nodes, faults."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sandbox import Sandbox, running_sandbox, sandbox_tool


def eventually(holds: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def processes_naming(text: str) -> list[str]:
    """The living processes with ``text`` in their command line, environment or open files."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            files = [str(file.readlink()) for file in (process / "fd").iterdir()]
        except OSError:
            continue  # it has ended, or is the listing of our own descriptors
        if text.encode() in words or any(text in file for file in files):
            found.append(f"{process.name} {words[:80]!r}")
    return found


def test_all_daemons_are_up(slurm_sandbox: Sandbox) -> None:
    status = slurm_sandbox.status()
    daemons = [line.split()[:2] for line in status.stdout.splitlines() if " pid " in line]
    assert status.returncode == 0
    assert {"munged", "mariadbd", "slurmdbd", "slurmctld", "n1", "n2"} <= {name for name, _ in daemons}
    assert {state for _, state in daemons} == {"up"}


def test_the_partitions_are_main_short_and_urgent(slurm_sandbox: Sandbox) -> None:
    assert set(slurm_sandbox.run("sinfo", "-h", "-o", "%P %l").splitlines()) == {
        "main* 1-00:00:00",
        "short 5:00",
        "urgent 1-00:00:00",
    }


def test_array_elements_see_their_own_gpus_and_sacct_sees_them(slurm_sandbox: Sandbox, tmp_path: Path) -> None:
    script = 'echo "$SLURMD_NODENAME:$CUDA_VISIBLE_DEVICES"; sleep 1'
    # All on one node, so that only distinct GPUs are right.
    options = ["--wait", "--parsable", "--array=0-3", "--gpus-per-node=2", "--nodelist=n1", "--output=%a.out"]
    job = slurm_sandbox.run("sbatch", *options, f"--wrap={script}", cwd=tmp_path)

    seen = [path.read_text().strip() for path in tmp_path.glob("*.out")]
    assert sorted(seen) == ["n1:0,1", "n1:2,3", "n1:4,5", "n1:6,7"]

    def accounted() -> bool:
        lines = slurm_sandbox.run("sacct", "-n", "-X", "-P", "-j", job, "-o", "jobid,state,alloctres").splitlines()
        return len(lines) == 4 and all("COMPLETED" in line and "gres/gpu=2" in line for line in lines)

    assert eventually(accounted)


def test_a_two_node_srun_runs_on_two_nodes(slurm_sandbox: Sandbox) -> None:
    output = slurm_sandbox.run("srun", "--nodes=2", "--ntasks-per-node=1", "sh", "-c", "echo $SLURMD_NODENAME")
    assert len(set(output.split())) == 2


def test_an_urgent_job_requeues_a_running_one(slurm_sandbox: Sandbox, tmp_path: Path) -> None:
    def state(job: str) -> str:
        return slurm_sandbox.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    node = ["--parsable", "--nodelist=n2", "--exclusive", f"--chdir={tmp_path}"]
    first = slurm_sandbox.run("sbatch", *node, "--requeue", "--wrap=sleep 60")
    try:
        assert eventually(lambda: state(first) == "RUNNING")
        urgent = slurm_sandbox.run("sbatch", *node, "--partition=urgent", "--wrap=true")
        assert eventually(lambda: state(urgent) == "COMPLETED")
        assert state(first) == "PENDING"
        assert "Restarts=1" in slurm_sandbox.run("scontrol", "show", "job", first)
    finally:
        slurm_sandbox.run("scancel", first)


def test_starting_twice_is_idempotent(slurm_sandbox: Sandbox) -> None:
    before = slurm_sandbox.status().stdout
    assert slurm_sandbox.start() == f"export SLURM_CONF={slurm_sandbox.conf}\n"
    assert slurm_sandbox.status().stdout.split("PARTITION")[0] == before.split("PARTITION")[0]


def test_a_job_outlives_its_daemons(slurm_sandbox: Sandbox, tmp_path: Path) -> None:
    job = slurm_sandbox.run("sbatch", "--parsable", "--nodelist=n1", "--wrap=sleep 3; echo done", cwd=tmp_path)
    assert eventually(lambda: slurm_sandbox.run("squeue", "-h", "-j", job, "-o", "%T") == "RUNNING")
    # Not killed: slurmctld writes its state every few seconds, and without that it starts the job once more.
    slurm_sandbox.stop_daemon("slurmctld")
    slurm_sandbox.stop_daemon("n1", kill=True)
    assert slurm_sandbox.status().returncode == 3
    slurm_sandbox.start_daemon("slurmctld")
    slurm_sandbox.start_daemon("n1")
    assert slurm_sandbox.status().returncode == 0
    assert eventually(lambda: (tmp_path / f"slurm-{job}.out").read_text() == "done\n")


def test_stop_leaves_neither_processes_nor_files_behind(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    with running_sandbox(folder, nodes=1, no_accounting=True) as sandbox:
        # A job with a process that left its session: the one most easily forgotten.
        job = sandbox.run("sbatch", "--parsable", "--wrap=setsid sleep 300 & sleep 300", cwd=tmp_path)
        assert eventually(lambda: len(processes_naming(f"slurm-{job}.out")) >= 3)
        assert processes_naming(str(folder))
    assert not list(folder.iterdir())
    assert not processes_naming(str(tmp_path))
    assert sandbox_tool("status", folder, check=False).returncode == 3
    assert "nothing to stop" in sandbox_tool("stop", folder).stderr


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(RuntimeError, match="is not a sandbox and not empty"):
        sandbox_tool("start", tmp_path)
    sandbox_tool("stop", tmp_path)
    assert (tmp_path / "logs").is_dir()
