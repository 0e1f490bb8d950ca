"""iter-XX/manifest.json: what an iteration was made of and what it came to; and the model card made of it.

It is derived: everything in it is told by the recipe, the job.json files and the sentinels, so it can be written again at any
time, and it is whenever a driver finds an iteration complete.

    {"recipe", "run_id", "iteration", "seed",
     "model": {"job", "path", "sha256", "files"},      the trained model: its files' hashes, and one hash over them
     "outside": {"policy": ..., "source": ..., ...},   models and data from outside the run: name, revision, identity
     "stages": {"generate": {"fingerprint", "settings", "inputs", "rows_in", "rows", "counts", "versions", "hosts", "gpus",
                             "gpu_hours", "task_hours", "seconds", "failed_attempts"}, ...},
     "guard": {"length_gap", "tie_rate", ...},         the guard's values; "evaluation": the counts of evaluate,
     "gpu_hours", "task_hours"}                        sums over the stages

``gpu_hours`` are GPUs times hours of the tasks that finished; on a machine without GPUs look at ``task_hours``. Paths inside
the run are relative to it.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from aipo_hpc.durable import write_durably
from aipo_hpc.graph import Edge, Graph, Job
from aipo_hpc.guard import VALUE
from aipo_hpc.ledger import effort, finished, versions
from aipo_hpc.model_card import CARD, model_card
from aipo_hpc.sentinel import Sentinel
from aipo_hpc.settings import everything
from aipo_hpc.store import MANIFEST, Run


class Manifests:
    """Keeps the manifests, and the cards of the models, of a run up to date."""

    def __init__(self, run: Run, graph: Graph) -> None:
        self._run = run
        self._graph = graph
        self._written: set[int] = set()

    def update(self, done: Mapping[str, Container[int]]) -> None:
        """Write those of iterations that became complete since the last look; ``done`` tells finished shards by job."""
        jobs = self._graph.jobs.values()
        open_ones = {
            job.iteration for job in jobs if any(shard not in done[job.name] for shard in range(job.num_shards))
        }
        self._written -= open_ones
        for iteration in sorted({job.iteration for job in jobs} - open_ones - self._written):
            write_manifest(self._run, self._graph, iteration)
            self._written.add(iteration)


def write_manifest(run: Run, graph: Graph, iteration: int) -> dict[str, Any]:
    """Write the manifest of an iteration and the card of its model, where they are not there as they should be."""
    manifest = make_manifest(run, graph, iteration)
    _write(run.path / f"iter-{iteration:02d}" / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    if manifest["model"] is not None and (folder := run.path / manifest["model"]["path"]).is_dir():
        # Beside what the sentinel vouches for: no reader of the model looks at the card, and its text may be renewed.
        _write(folder / CARD, model_card(manifest, run.read_recipe()["settings"]))
    return manifest


def read_manifest(run: Run, iteration: int) -> dict[str, Any] | None:
    """The manifest of an iteration, or None if it is not there or not whole."""
    with suppress(OSError, ValueError):
        text = (run.path / f"iter-{iteration:02d}" / MANIFEST).read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)
        return manifest
    return None


def make_manifest(run: Run, graph: Graph, iteration: int) -> dict[str, Any]:
    """The manifest of an iteration, as far as it is done."""
    written = run.read_recipe()
    jobs = [job for job in graph.jobs.values() if job.iteration == iteration]
    stages = {job.name.split("/")[1]: stage_entry(run, graph, job) for job in jobs}
    return {
        "recipe": written["recipe"],
        "run_id": written["run_id"],
        "iteration": iteration,
        "seed": jobs[0].seed,
        "model": model_entry(run, graph, f"iter-{iteration:02d}/train"),
        "outside": {
            name: {
                "value": source.value,
                "revision": revision(source.value, source.revision),
                "identity": source.identity,
            }
            for job in jobs
            for name, source in job.inputs.items()
            if not isinstance(source, Edge)
        },
        "stages": stages,
        "guard": {
            key.removeprefix(VALUE): value
            for stage in ("pairs", "train")
            for key, value in stages.get(stage, {}).get("counts", {}).items()
            if key.startswith(VALUE)
        },
        "evaluation": stages.get("evaluate", {}).get("counts", {}),
        "gpu_hours": sum(stage["gpu_hours"] for stage in stages.values()),
        "task_hours": sum(stage["task_hours"] for stage in stages.values()),
    }


def stage_entry(run: Run, graph: Graph, job: Job) -> dict[str, Any]:
    """What one job was made of, what it gave and what it took."""
    done = finished(run, graph, job.name)
    total: Counter[str] = Counter()
    for sentinel in done.values():
        total.update(sentinel.counts)
    return {
        "stage": job.stage,
        "fingerprint": graph.fingerprints[job.name],
        "shards": job.num_shards,
        "shards_done": len(done),
        "settings": everything(job.config),
        "inputs": {
            name: {"job": source.job, "part": source.part}
            if isinstance(source, Edge)
            else {"identity": source.identity}
            for name, source in job.inputs.items()
        },
        "rows_in": {
            name: rows_of(edge.part, finished(run, graph, edge.job).values())
            for name, edge in job.edges.items()
            if not edge.part.endswith("/")
        },
        "rows": sum(sentinel.rows for sentinel in done.values()),
        "counts": dict(total),
        "versions": versions(done.values()),
        "hosts": sorted({sentinel.host for sentinel in done.values()}),
        "gpus": dict(Counter(gpu for sentinel in done.values() for gpu in sentinel.gpus)),
        **effort(done.values(), job),
        "failed_attempts": len(run.job(job.name).failures()),
    }


def rows_of(part: str, made: Iterable[Sentinel]) -> int:
    """Rows that a job handed on in one of its files: of a job with several, which counts them by file, those of that one."""
    return sum(int(sentinel.counts.get(part.partition(".")[0], sentinel.rows)) for sentinel in made)


def model_entry(run: Run, graph: Graph, name: str) -> dict[str, Any] | None:
    """The model that a job made: where it is, the hashes of its files, and one hash over those; None if there is none."""
    for sentinel in finished(run, graph, name).values():
        files = {output.path: output.sha256 for output in sentinel.outputs if output.path.startswith("model/")}
        if files:
            folder = run.job(name).attempt_folder(sentinel.shard, sentinel.attempt) / "model"
            return {
                "job": name,
                "path": str(folder.relative_to(run.path)),
                "sha256": weights_hash(sentinel),
                "files": files,
            }
    return None


def weights_hash(sentinel: Sentinel) -> str:
    """One hash over the weights of a model: SHA-256 of its weight files' names and hashes, in order."""
    weights = sorted(
        (output.path, output.sha256) for output in sentinel.outputs if output.path.endswith(".safetensors")
    )
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()


def revision(value: str, given: str | None) -> str | None:
    """The commit of a model of the hub, which is in the path it was fetched to; else the revision that was asked for."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(/|$)", value)
    return found[1] if found else given


def _write(path: Path, text: str) -> None:
    with suppress(OSError, ValueError):
        if path.read_text(encoding="utf-8") == text:
            return
    write_durably(path, text)
