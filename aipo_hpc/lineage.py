"""The chain from a trained model back to the prompts and models from outside the run, as text."""

from collections.abc import Iterator
from typing import Any

from aipo_hpc.graph import Edge, Graph
from aipo_hpc.ledger import finished, pruned_models
from aipo_hpc.manifest import model_entry, revision, stage_entry
from aipo_hpc.outside import Outside
from aipo_hpc.store import Run

_TOLD = ("loss_type", "ranker", "engine", "n", "temperature", "selection")
"""Settings that say most about a stage."""


def chain(run: Run, graph: Graph, job: str) -> Iterator[str]:
    """Lines that tell what a job was made from, and that from what; each job once. The last ones name the code.

    Says so where a sentinel that was read is no longer the one that stands: then something was made again since.
    """
    seen: dict[str, dict[str, Any]] = {}
    yield from _job(run, graph, job, "", 0, seen)
    used: dict[str, set[str]] = {}
    for entry in seen.values():
        for library, version in entry["versions"].items():
            used.setdefault(library, set()).update([version] if isinstance(version, str) else version)
    yield "made with " + ", ".join(
        f"{library} {' and '.join(sorted(found))}" for library, found in sorted(used.items())
    )


def newest_model(run: Run, graph: Graph) -> str | None:
    """The last job that made a model."""
    made = [name for name in graph.jobs if model_entry(run, graph, name)]
    return made[-1] if made else None


def _job(run: Run, graph: Graph, name: str, title: str, depth: int, seen: dict[str, dict[str, Any]]) -> Iterator[str]:
    entry = seen[name] = stage_entry(run, graph, graph.jobs[name])
    yield _line(depth, f"{title}{name}: {_summary(entry)}")
    if (model := model_entry(run, graph, name)) is not None:
        gone = " (deleted since: keep_models)" if name in pruned_models(run, graph) else ""
        yield _line(depth, f"  model {model['path']}{gone}, weights sha256 {model['sha256']}")
    for role, source in graph.jobs[name].inputs.items():
        if isinstance(source, Outside):
            yield _line(depth + 1, f"{role} = {_outside(source)}")
            continue
        rows = f"{entry['rows_in'][role]} rows of " if role in entry["rows_in"] else "the model of "
        doubt = "" if _stands(run, graph, name, role, source) else "MADE AGAIN since it was read: "
        if source.job in seen:
            yield _line(depth + 1, f"{role} = {doubt}{rows}{source.job}, see above")
        else:
            yield from _job(run, graph, source.job, f"{role} = {doubt}{rows}", depth + 1, seen)


def _summary(entry: dict[str, Any]) -> str:
    told = [f"{name} {entry['settings'][name]}" for name in _TOLD if entry["settings"].get(name) is not None]
    parts = [entry["stage"], *told, f"{entry['shards_done']} of {entry['shards']} shards", f"{entry['rows']} rows"]
    hours = f"{entry['gpu_hours']:.2f} GPU-hours" if entry["gpu_hours"] else f"{entry['task_hours']:.3f} task-hours"
    return ", ".join([*parts, hours])


def _outside(source: Outside) -> str:
    found = revision(source.value, source.revision)
    return f"{source.value}{f' at revision {found}' if found else ''}, {source.identity}"


def _stands(run: Run, graph: Graph, name: str, title: str, source: Edge) -> bool:
    """Whether the sentinels that the shards of a job read are those that stand now."""
    digests = {sentinel.digest for sentinel in finished(run, graph, source.job).values()}
    return all(set(made.inputs[title]["sentinels"]) <= digests for made in finished(run, graph, name).values())


def _line(depth: int, text: str) -> str:
    return "  " * depth + text
