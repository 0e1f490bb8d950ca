"""tools/gpu_smoke, on the CPU: the same code as on a GPU, and what it says where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def gpu_smoke(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(REPOSITORY / "tools" / "gpu_smoke"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_without_a_gpu_it_says_so_and_skips():
    done = gpu_smoke()
    assert done.returncode == 77
    assert done.stderr.startswith("no GPU here") and "--cpu" in done.stderr


@pytest.mark.timeout(600)
def test_every_stage_runs_under_deepspeed_in_bfloat16_and_is_checked(tmp_path):
    pytest.importorskip("deepspeed")
    done = gpu_smoke("--cpu", "--num-prompts=16", "--max-tokens=12", "--iterations=1", f"--run={tmp_path / 'run'}")
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ranks: 12 of 12 prompts as on the CPU" in done.stdout
    assert done.stdout.rstrip().endswith("all checks passed")
