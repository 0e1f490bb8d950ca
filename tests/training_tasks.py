"""Pairs, rows and tasks for the reference and training stages; run as a script, one process of a training task.

python tests/training_tasks.py <spec.json>     {"config": {...}, "task": {...}, "die": "after step 3"}
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aipo_hpc import leaving
from aipo_hpc.rows import Candidate, Message, Pair, write_rows
from aipo_hpc.stages import reference, sft, train
from aipo_hpc.task import Input, Outcome, Place, Task

LEFT = 75
"""Exit code of a process that left because it was asked to."""
REPOSITORY = Path(__file__).parents[1]
WORDS = "red blue green small large old new dog cat bird fish tree river stone house city moon sun star rain".split()

PLAIN: dict[str, Any] = {
    "dtype": "float32",
    "zero_stage": 0,
    "global_batch_size": 8,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
}


def text(seed: int, length: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * (seed % 5 + 1)) % len(WORDS)] for i in range(length))


def pair(index: int, **changes: Any) -> Pair:
    """A pair with lengths of its own; every third rejected response was cut off."""
    question = text(index, 2 + index % 6)
    values: dict[str, Any] = {
        "prompt_id": f"p{index}",
        "prompt": question,
        "messages": [Message("user", question)],
        "chosen": Candidate(text(index + 100, 3 + index % 7), "stop", 0),
        "rejected": Candidate(text(index + 200, 2 + index % 4), "stop" if index % 3 else "length", 0),
        "chosen_score": 1.0,
        "rejected_score": 0.0,
    }
    return Pair(**{**values, **changes})


def reference_task(
    folder: Path, pairs: list[Pair], model: Path, *, shard: int = 0, num_shards: int = 1, earlier: tuple[Path, ...] = ()
) -> Task:
    folder.mkdir(parents=True)
    write_rows(folder / "pairs.parquet", pairs, Pair)
    (folder / "out").mkdir()
    inputs = {"pairs": Input(shards={0: (folder / "pairs.parquet",)}), "reference": Input(value=str(model))}
    inputs["policy"] = inputs["reference"]
    return Task("iter-00/reference", 0, shard, num_shards, 0, inputs, folder / "out", earlier)


def scored_rows(folder: Path, num_pairs: int, model: Path, **config: Any) -> Path:
    """Score pairs with the reference stage and return the file of rows."""
    task = reference_task(folder, [pair(index) for index in range(num_pairs)], model)
    reference.run(reference.ReferenceConfig(**{"dtype": "float32", **config}), task)
    return task.out / "rows.parquet"


def train_task(out: Path, rows: Path, model: Path, *, earlier: tuple[Path, ...] = ()) -> Task:
    out.mkdir(parents=True, exist_ok=True)
    inputs = {"pairs": Input(shards={0: (rows,)}), "policy": Input(value=str(model))}
    return Task("iter-00/train", 0, 0, 1, 7, inputs, out, earlier)


def sft_task(out: Path, rows: Path, model: Path, *, earlier: tuple[Path, ...] = ()) -> Task:
    out.mkdir(parents=True, exist_ok=True)
    inputs = {"conversations": Input(shards={0: (rows,)}), "policy": Input(value=str(model))}
    return Task("iter-00/sft", 0, 0, 1, 7, inputs, out, earlier)


_STAGES: dict[str, tuple[Callable[..., Task], Any, Callable[..., Any], str]] = {
    "iter-00/train": (train_task, train, train.TrainConfig, "pairs"),
    "iter-00/sft": (sft_task, sft, sft.SftConfig, "conversations"),
}
"""Of a job: what makes its task, its stage, the stage's settings, and its input with the data."""


def run_here(task: Task, **config: Any) -> Outcome:
    """Train ``task`` in this process."""
    _, stage, settings, _ = _STAGES[task.job]
    outcome: Outcome = stage.run(settings(**config), task)
    return outcome


def launch(task: Task, *, num_processes: int = 1, die: str | None = None, **config: Any) -> list[int]:
    """Train ``task`` in processes of their own, as a launcher would; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spec = {
        "config": config,
        "job": task.job,
        "task": {
            "rows": str(task.inputs[_STAGES[task.job][-1]].files[0]),
            "model": task.inputs["policy"].model,
            "out": str(task.out),
            "earlier": [str(folder) for folder in task.earlier],
        },
        "die": die,
    }
    path = task.out / "spec.json"
    path.write_text(json.dumps(spec))
    processes = []
    for rank in range(num_processes):
        gang = {"RANK": str(rank), "WORLD_SIZE": str(num_processes), "LOCAL_RANK": str(rank)}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = {**os.environ, **gang, **meeting, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        with (task.out / f"log-{rank}.txt").open("w") as log:
            processes.append(
                subprocess.Popen([sys.executable, __file__, str(path)], env=environment, stdout=log, stderr=log)
            )
    try:
        return [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def killed_and_resumed(
    make: Callable[..., Task],
    folder: Path,
    rows: Path,
    model: Path,
    *,
    num_processes: int = 1,
    die: str = "after step 3",
    **config: Any,
) -> tuple[Path, Path]:
    """Train undisturbed, and in an attempt that is killed in its third step, of which another goes on from the second.

    Returns the folders of the undisturbed training and of the attempt that went on. One process is this one, but for the
    killed.
    """

    def finish(task: Task) -> str:
        if num_processes == 1:
            return str(run_here(task, **config))
        assert launch(task, num_processes=num_processes, **config) == [0] * num_processes, logs(task)
        return logs(task)

    whole, first = make(folder / "whole", rows, model), make(folder / "first", rows, model)
    finish(whole)
    killed = [-signal.SIGKILL] * num_processes
    assert launch(first, num_processes=num_processes, die=die, **config) == killed, logs(first)
    second = make(folder / "second", rows, model, earlier=(first.out,))
    assert "'resumed_from_step': 2" in finish(second)
    return whole.out, second.out


def logs(task: Task) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(task.out.glob("log-*.txt")))


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def largest_difference(one: Path, other: Path) -> float:
    """Largest absolute difference of any weight of two model folders, which must hold the same tensors."""
    first, second = weights(one), weights(other)
    assert set(first) == set(second)
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def identical(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return set(first) == set(second) and all(first[name].equal(second[name]) for name in first)


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _die(die: str) -> None:
    """Have this process kill itself, as kill -9 would, after a step or in the middle of a checkpoint's save.

    Or, with "asked after step 3", be asked to leave, if it is the last of its gang.
    """
    from aipo_hpc.metrics_file import MetricsFile

    when, _, step = die.rpartition(" step ")
    name = {"after": "log", "asked after": "log", "in save of": "_save_optimizer_and_scheduler"}[when]
    undisturbed = getattr(MetricsFile, name)

    def fatal(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == int(step) and when == "asked after":
            if Place.here().rank == Place.here().world_size - 1:
                leaving.ask(leaving.STOP)
        elif self.state.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return undisturbed(self, *args, **kwargs)

    setattr(MetricsFile, name, fatal)


def main() -> Outcome:
    spec = json.loads(Path(sys.argv[1]).read_text())
    if spec["die"]:
        _die(spec["die"])
    where = spec["task"]
    make = _STAGES[spec["job"]][0]
    task = make(
        Path(where["out"]),
        Path(where["rows"]),
        Path(where["model"]),
        earlier=tuple(Path(folder) for folder in where["earlier"]),
    )
    try:
        return run_here(task, **spec["config"])
    except leaving.Left as left:
        print(left, flush=True)
        sys.exit(LEFT)


if __name__ == "__main__":
    print(main())
