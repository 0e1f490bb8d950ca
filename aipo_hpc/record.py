"""job.json: a job as a worker, and anyone who looks at the run later, reads it; and back to the graph."""

from difflib import get_close_matches
from typing import Any

from aipo_hpc.errors import RecipeError, RunError
from aipo_hpc.graph import Edge, Graph, Job, make_graph
from aipo_hpc.outside import Outside
from aipo_hpc.settings import everything, from_plain
from aipo_hpc.stage_table import STAGES
from aipo_hpc.store import Run


def job_record(graph: Graph, job: Job, payload_timeout: float) -> dict[str, Any]:
    """What job.json says: all that a worker needs."""
    return {
        "name": job.name,
        "position": list(graph.jobs).index(job.name),
        "stage": job.stage,
        "iteration": job.iteration,
        "num_shards": job.num_shards,
        "seed": job.seed,
        "fingerprint": graph.fingerprints[job.name],
        "content": graph.contents[job.name],
        "settings": everything(job.config),
        "payload_timeout": payload_timeout,
        "inputs": {
            name: ({"trust_remote_code": True} if source.trust_remote_code else {})
            | {
                "job": source.job,
                "part": source.part,
                "by": source.by,
                "num_shards": graph.jobs[source.job].num_shards,
                "fingerprint": graph.fingerprints[source.job],
            }
            if isinstance(source, Edge)
            else ({"trust_remote_code": True} if source.trust_remote_code else {})
            | {"value": source.value, "identity": source.identity}
            for name, source in job.inputs.items()
        },
    }


def read_graph(run: Run) -> Graph:
    """The graph of a run, from its job.json files alone. Raises RunError if there are none, or one cannot be used."""
    run.read_recipe()
    records: list[tuple[int, Job]] = []
    for name in run.job_names():
        record = run.job(name).read_job()
        if record is None:
            raise RunError(
                f"{run.job(name).path}: no readable job.json. Type the launch command again: it writes it anew."
            )
        try:
            records.append((record["position"], _job(record)))
        except (RecipeError, KeyError) as error:
            raise RunError(
                f"{run.job(name).path}: its job.json was written by another version of this program: {error}. "
                "Type the launch command again: it writes it anew."
            ) from error
    if not records:
        raise RunError(f"{run.path}: no jobs in it yet. Type the launch command again: it writes them.")
    return make_graph([job for _, job in sorted(records, key=lambda each: each[0])])


def check_job(graph: Graph, name: str, run: Run) -> None:
    """Raise RunError if there is no such job in the run."""
    if name not in graph.jobs:
        close = get_close_matches(name, graph.jobs, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RunError(f"{name!r}: no such job in {run.path}; jobs are {', '.join(graph.jobs)}.{hint}")


def check_shard(graph: Graph, name: str, shard: int) -> None:
    """Raise RunError if the job has no such shard."""
    if not 0 <= shard < graph.jobs[name].num_shards:
        raise RunError(f"{name}: shard {shard} is not among 0 to {graph.jobs[name].num_shards - 1}")


def _job(record: dict[str, Any]) -> Job:
    config = from_plain(STAGES[record["stage"]].config, record["settings"])
    inputs = {
        name: Edge(source["job"], source["part"], source["by"], source.get("trust_remote_code", False))
        if "job" in source
        else Outside(source["value"], source["identity"], trust_remote_code=source.get("trust_remote_code", False))
        for name, source in record["inputs"].items()
    }
    return Job(
        name=record["name"],
        stage=record["stage"],
        iteration=record["iteration"],
        num_shards=record["num_shards"],
        seed=record["seed"],
        config=config,
        inputs=inputs,
        resources=getattr(config, "resources", None),
    )
