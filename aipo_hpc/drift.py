"""Drift: settings that differ from those a job's finished work was made with."""

from collections.abc import Iterator, Mapping
from typing import Any

from aipo_hpc.errors import DriftError
from aipo_hpc.graph import Graph
from aipo_hpc.journal import Journal
from aipo_hpc.store import Run


def drifts(run: Run, graph: Graph) -> dict[str, list[str]]:
    """By job, the fields of its content that differ from its job.json, as ``field: old -> new``.

    Inputs made by other jobs are left out: those jobs have a line of their own. So are jobs that nothing was sent of and
    nothing is finished of: a prompt file that was refused may be mended.
    """
    found: dict[str, list[str]] = {}
    sent = {submission.job for submission in Journal(run).submissions.values()}
    for name in graph.jobs:
        written = run.job(name).read_job()
        if written is None or written["fingerprint"] == graph.fingerprints[name]:
            continue
        if name not in sent and not run.job(name).done(written["fingerprint"]):
            continue
        lines = list(_differences(written["content"], graph.contents[name]))
        if lines:
            found[name] = lines
    return found


def refuse_drift(run: Run, graph: Graph) -> None:
    """Raise DriftError if a job of the run was made with other settings."""
    found = drifts(run, graph)
    if not found:
        return
    lines = [f"  {job}: {line}" for job, fields in found.items() for line in fields]
    job = next(iter(found))
    raise DriftError(
        f"{run.path}: the settings differ from those of the work that is there:\n" + "\n".join(lines) + "\n"
        "Two ways out: give the new settings a run directory of their own (run_dir=...), or set the job and all that "
        f"depends on it aside and compute it anew: python -m aipo_hpc reset {run.path} {job}"
    )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if before == after or key == "fingerprint":
            continue
        where = f"{path}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{where}.")
        else:
            yield f"{where}: {before!r} -> {after!r}"
