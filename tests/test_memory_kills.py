"""Processes that the kernel killed for want of memory, as their cgroup counts them: the kernel's own, and written ones."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aipo_hpc.memory_kills import memory_kills

CGROUPS = Path("/sys/fs/cgroup/memory")
TASK = "/slurm_n1/uid_0/job_7/step_batch/task_0"
HUNGRY = """
import subprocess, sys
from pathlib import Path
from aipo_hpc.memory_kills import memory_kills

Path(sys.argv[1], "cgroup.procs").write_text("0")
child = [sys.executable, "-c", "hoard = [bytearray(b'x') * (1 << 20) for _ in range(200)]"]
for _ in range(2):
    print(memory_kills(), subprocess.run(child).returncode)
print(memory_kills())
"""


def test_a_process_learns_that_the_kernel_killed_its_child() -> None:
    group = CGROUPS / f"aipo-test-kills-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup of version 1 can be made here: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(100 << 20))
        done = subprocess.run([sys.executable, "-c", HUNGRY, group], capture_output=True, text=True, check=True)
    finally:
        group.rmdir()
    assert done.stdout.split() == ["0", f"{-signal.SIGKILL:d}", "1", f"{-signal.SIGKILL:d}", "2"]


@pytest.mark.parametrize(
    ("groups", "file", "text", "kills"),
    [
        (f"0::{TASK}", f"{TASK}/memory.events", "low 0\noom 4\noom_kill 3\noom_group_kill 1", 3),
        (f"4:memory:{TASK}\n0::/", f"memory{TASK}/memory.oom_control", "under_oom 0\noom_kill 2", 2),
        (f"3:cpu,memory:{TASK}", f"memory{TASK}/memory.oom_control", "oom_kill 1", 1),
        (f"4:memory:{TASK}", "memory/memory.oom_control", "oom_kill 5", 5),
        (f"4:memory:{TASK}", f"memory{TASK}/memory.oom_control", "under_oom 0", 0),
        ("0::/", "memory.pressure", "some avg10=0.00", 0),
        ("nonsense", "memory.events", "oom_kill 3", 0),
    ],
    ids=[
        "version 2",
        "version 1",
        "with another controller",
        "a container",
        "an old kernel",
        "no controller",
        "nonsense",
    ],
)
def test_the_count_is_read_from_either_version_of_cgroups(
    tmp_path: Path, groups: str, file: str, text: str, kills: int
) -> None:
    (tmp_path / "own").write_text(groups + "\n")
    path = tmp_path / "fs" / file.strip("/")
    path.parent.mkdir(parents=True)
    path.write_text(text + "\n")
    assert memory_kills(tmp_path / "own", tmp_path / "fs") == kills
    assert memory_kills(tmp_path / "none", tmp_path / "fs") == 0, "a system without cgroups"
