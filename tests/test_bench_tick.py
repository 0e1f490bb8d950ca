"""The bench of the driver runs, and what it measures is right: only what is missing is sent."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "tools" / "bench" / "tick.py"


def test_the_bench_of_the_driver_measures_a_resume_that_sends_only_what_is_missing(tmp_path: Path) -> None:
    argv = [sys.executable, str(BENCH), "--num-shards=60", "--missing=4", "--repeat=1", f"--dir={tmp_path}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "60 shards, best of 1" and len(lines) == 7
    assert "list and read 56 sentinels" in lines[1] and all(" s CPU)" in line for line in lines[1:])
    assert list(tmp_path.iterdir()) == []
