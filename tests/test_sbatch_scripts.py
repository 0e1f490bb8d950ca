"""The scripts under sbatch/ do, by hand, what a launch does: on a real Slurm, from a prepared run to its report."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pairrm_checkpoint import Checkpoint
from sandbox import Sandbox
from tiny_models import listing_model_folder, task

from aipo_hpc.__main__ import main
from aipo_hpc.launch import main as launch
from aipo_hpc.record import read_graph
from aipo_hpc.sentinel import Sentinel
from aipo_hpc.store import Run

SCRIPTS = sorted((Path(__file__).resolve().parents[1] / "sbatch").glob("*.sbatch"))
DRIVER, GENERATE, INSTRUCT, RANK, TRAIN = SCRIPTS
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)

SMALL = (
    "recipe=demo", "iterations=1", "data.num_held_out=4", "generate.n=2", "generate.max_tokens=8",
    "train.num_train_epochs=1", "train.global_batch_size=4", "train.per_device_train_batch_size=2",
    "instruct.engine=transformers", "instruct.dtype=float32", "instruct.num_prompts=16", "instruct.num_shards=2",
    "instruct.max_tokens=60", "instruct.max_prompt_tokens=300", "instruct.temperature=1", "instruct.top_p=1",
    "instruct.near_duplicate=1", "instruct.resources.gpus_per_node=0",
)  # fmt: skip


@every_script
def test_a_script_is_short_and_stops_at_the_first_error(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert len(lines) < 30
    assert "set -euo pipefail" in lines
    subprocess.run(["bash", "-n", script], check=True)


@every_script
def test_a_script_names_no_account_no_partition_and_no_folder(script: Path) -> None:
    options = re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script.read_text(), re.MULTILINE)
    assert {"account", "partition", "qos", "constraint", "chdir"}.isdisjoint(name for name, _ in options)
    assert not [value for _, value in options if "/" in value]


@pytest.mark.parametrize("script", [GENERATE, INSTRUCT, RANK, TRAIN], ids=lambda script: script.name)
def test_a_script_without_arguments_says_how_it_is_called(script: Path) -> None:
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"sbatch/{script.name} RUN ITERATION" in done.stderr


def done_shards(run: Run, job: str) -> dict[int, Sentinel]:
    """The sentinels of a job."""
    return dict(run.job(job).done(read_graph(run).fingerprints[job]))


@pytest.mark.timeout(1800)
def test_a_prepared_run_is_computed_by_hand_and_finished_by_a_driver_in_a_job(
    slurm_sandbox: Sandbox, ranker_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHON", sys.executable)
    draw = random.Random(1)
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in sorted({task(draw) for _ in range(40)})))
    fields = [
        *SMALL, f"run_dir={tmp_path / 'run'}", f"rank.model_name_or_path={ranker_checkpoint.pairrm}", f"prompts={seeds}",
        f"model_name_or_path={listing_model_folder(tmp_path / 'listing')}",
    ]  # fmt: skip
    run = Run(tmp_path / "run")

    def sbatch(*arguments: str | Path) -> str:
        small = ("--cpus-per-task=1", "--gpus-per-node=0")
        return slurm_sandbox.run(
            "sbatch", "--wait", "--parsable", *small, *map(str, arguments), cwd=tmp_path, timeout=800
        )

    assert launch([*fields, "drive=prepare"]) == 0
    assert not done_shards(run, "iter-00/generate")

    sbatch("--array=0-1", INSTRUCT, run.path, "iter-00")
    assert sorted(done_shards(run, "iter-00/instruct")) == [0, 1]
    assert main(["work", str(run.path), "iter-00/collect"]) == 0

    array = sbatch("--array=0-1", GENERATE, run.path, "iter-00")
    sbatch("--array=0-1", RANK, run.path, "iter-00")
    for job in ("iter-00/generate", "iter-00/rank"):
        assert sorted(done_shards(run, job)) == [0, 1]
    sentinel = done_shards(run, "iter-00/generate")[1]
    assert (sentinel.scheduler["slurm_array_job_id"], sentinel.scheduler["slurm_array_task_id"]) == (array, "1")

    assert main(["work", str(run.path), "iter-00/pairs"]) == 0
    assert main(["work", str(run.path), "iter-00/reference"]) == 0

    sbatch("--ntasks-per-node=1", TRAIN, run.path, "iter-00")
    trained = done_shards(run, "iter-00/train")[0]
    assert trained.num_processes == 2
    assert len(slurm_sandbox.run("scontrol", "show", "hostnames", trained.scheduler["slurm_job_nodelist"]).split()) == 2

    # The driver takes up what is done, and from inside its job sends the rest as jobs of their own.
    driver = sbatch(
        DRIVER, *fields, "cluster=slurm", "slurm.query_seconds=2", "train.resources.nodes=2", "drive=follow"
    )
    assert (tmp_path / f"aipo-driver-{driver}.out").read_text()
    evaluated = done_shards(run, "iter-00/evaluate")[0]
    assert evaluated.scheduler["slurm_job_id"] != driver
    assert done_shards(run, "iter-00/train") == {0: trained}
