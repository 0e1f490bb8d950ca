"""What a run achieved: one row per policy, read from the sentinels and metrics of its jobs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from aipo_hpc import plots
from aipo_hpc.benchmarks.results import read_results
from aipo_hpc.graph import Graph
from aipo_hpc.guard import ADVICE, VALUE, check
from aipo_hpc.ledger import counts, effort, finished
from aipo_hpc.lineage import chain, newest_model
from aipo_hpc.manifest import write_manifest
from aipo_hpc.retention import win_rates
from aipo_hpc.store import Run
from aipo_hpc.summary import markdown, summary_rows, write_summary
from aipo_hpc.terminal import print_table


def print_report(run: Run, graph: Graph) -> None:
    """Print the tables of results, pairs and times, and where the final model lies."""
    for make in (results_table, new_prompts_table, pairs_table, guard_table, times_table):
        table = make(run, graph)
        if make is not new_prompts_table or table.row_count:
            print_table(table)
            print()
    for name in graph.jobs:
        if number := counts(run, graph, name).get("set_aside"):
            print(f"{name}: {number:g} prompts set aside because they killed their workers; their rows tell which")
    model = final_model(run, graph)
    print(f"final model: {model}" if model else "no model is finished yet")
    if (best := best_model(run, graph)) is not None and best[0] != model:
        print(f"best model by win rate ({100 * best[1]:.1f} %): {best[0]}")


def print_lineage(run: Run, graph: Graph) -> None:
    """Write the manifests of all iterations that have begun, and print the chain from the newest model to its origins."""
    for iteration in iterations(graph):
        if any(finished(run, graph, name) for name, job in graph.jobs.items() if job.iteration == iteration):
            write_manifest(run, graph, iteration)
    newest = newest_model(run, graph)
    print("\n".join(chain(run, graph, newest)) if newest else "no model is finished yet")


def print_summary(run: Run, graph: Graph, results: Sequence[Path], write: bool) -> None:
    """Print the table over iterations, with scores from result files of benchmarks; write it and the plots if asked to."""
    scores = read_results(results)
    rows = summary_rows(run, graph, scores)
    print(markdown(rows), end="")
    models = [str(row["model"]) for row in rows]
    if (found := set(scores).intersection(models)) != set(scores):
        others = ", ".join(sorted(set(scores) - found)[:5])
        print(f"\nresult files also name {others}, which are no models of this run; its models are {', '.join(models)}")
    if not write:
        return
    for path in write_summary(run, graph, rows):
        print(f"wrote {path}")
    if not plots.available():
        print("no plots: matplotlib is not installed; type: pip install 'aipo_hpc[plots]'")


def iterations(graph: Graph) -> list[int]:
    """The iterations of a graph."""
    return sorted({job.iteration for job in graph.jobs.values()})


def results_table(run: Run, graph: Graph) -> Table:
    """Per iteration: win rate of the trained policy against iteration 0 (the initial policy), lengths, training."""
    table = Table(
        "iteration",
        "win rate vs iteration 0",
        "better, same, worse",
        "prompts judged",
        "mean response length (characters)",
        "reward accuracy (last epoch)",
        "reward margin (last epoch)",
        "training loss first -> last",
        title="Policies, on held-out prompts",
        title_justify="left",
    )
    baseline = counts(run, graph, "iter-00/baseline")
    if baseline.get("candidates"):
        length = baseline["characters"] / baseline["candidates"]
        table.add_row("0 (initial policy)", "50.0 % (itself)", "", "", f"{length:.1f}", "", "", "")
    for iteration in iterations(graph):
        evaluation = counts(run, graph, f"iter-{iteration:02d}/evaluate")
        training = counts(run, graph, f"iter-{iteration:02d}/train")
        if not training:
            continue
        error = evaluation.get("win_rate_se")
        judged = sum(sentinel.rows for sentinel in finished(run, graph, f"iter-{iteration:02d}/evaluate").values())
        rate = f"{100 * evaluation['win_rate']:.1f} %" if evaluation else "not evaluated"
        table.add_row(
            f"{iteration + 1} (iter-{iteration:02d})",
            rate + (f" ± {100 * error:.1f}" if error is not None else ""),
            ", ".join(f"{evaluation[name]:g}" for name in ("wins", "ties", "losses")) if evaluation else "",
            f"{judged} of {judged + evaluation['not_judged']:g}" if evaluation else "",
            f"{evaluation['mean_length']:.1f}" if evaluation else "",
            _number(training, "reward_accuracy", "{:.3f}"),
            _number(training, "reward_margin", "{:.3f}"),
            f"{_number(training, 'loss_first', '{:.4f}')} -> {_number(training, 'loss_last', '{:.4f}')}",
        )
    table.caption = "win rate by the recipe's ranker, ties count half, ± one standard error over prompts"
    return table


def new_prompts_table(run: Run, graph: Graph) -> Table:
    """Per iteration with self-instruct: calls and the tasks they brought, prompts made of them, tasks dropped by reason."""
    table = Table(
        "iteration", "calls", "tasks", "new prompts", "dropped by reason", title="New prompts", title_justify="left"
    )
    for iteration in iterations(graph):
        made, collected = (counts(run, graph, f"iter-{iteration:02d}/{name}") for name in ("instruct", "collect"))
        if not made:
            continue
        dropped: Counter[str] = Counter()
        for part in (made, collected):
            dropped.update({key.removeprefix("dropped_"): int(part[key]) for key in part if key.startswith("dropped_")})
        table.add_row(
            f"{iteration + 1} (iter-{iteration:02d})",
            f"{made['calls']:g}",
            f"{made['tasks']:g}",
            f"{collected.get('kept', 0):g}",
            ", ".join(f"{reason} {number:g}" for reason, number in dropped.most_common()) or "none",
        )
    return table


def pairs_table(run: Run, graph: Graph) -> Table:
    """Per iteration: prompts, pairs kept, and pairs dropped by reason; what the ranker did not see."""
    table = Table(
        "iteration", "prompts", "pairs kept", "dropped by reason", "pairs added", "candidates cut off",
        "candidates the ranker saw in part",
        title="Pairs", title_justify="left",
    )  # fmt: skip
    for iteration in iterations(graph):
        prefix = f"iter-{iteration:02d}"
        pairs = counts(run, graph, f"{prefix}/pairs")
        if not pairs:
            continue
        generated, ranked = counts(run, graph, f"{prefix}/generate"), counts(run, graph, f"{prefix}/rank")
        dropped = {key.removeprefix("dropped_"): value for key, value in pairs.items() if key.startswith("dropped_")}
        table.add_row(
            f"{iteration + 1} ({prefix})",
            f"{sum(dropped.values()) + pairs['kept']:g}",
            f"{pairs['kept']:g}",
            ", ".join(f"{reason} {number:g}" for reason, number in dropped.items()) or "none",
            f"{pairs.get('added', 0):g}",
            f"{generated.get('truncated', 0):g} of {generated.get('candidates', 0):g}",
            f"{ranked.get('truncated_candidates', 0):g}",
        )
    return table


def guard_table(run: Run, graph: Graph) -> Table:
    """Per iteration: the guard's values, with the threshold that one is beyond."""
    table = Table("iteration", *(name.replace("_", " ") for name in ADVICE), title="Guard", title_justify="left")
    for iteration in iterations(graph):
        cells = dict.fromkeys(ADVICE, "")
        for stage in ("pairs", "train"):
            name = f"iter-{iteration:02d}/{stage}"
            found = counts(run, graph, name)
            values = {key: found[f"{VALUE}{key}"] for key in ADVICE if f"{VALUE}{key}" in found}
            cells |= {key: f"{value:.3f}" for key, value in values.items()}
            if values:
                cells |= {each.name: str(each) for each in check(values, graph.jobs[name].config.guard)}
        if any(cells.values()):
            table.add_row(f"{iteration + 1} (iter-{iteration:02d})", *cells.values())
    return table


def times_table(run: Run, graph: Graph) -> Table:
    """Seconds per stage and iteration, from the first start to the last end."""
    stages = list(dict.fromkeys(name.split("/")[1] for name in graph.jobs))
    table = Table("iteration", *stages, title="Seconds per stage", title_justify="left")
    for iteration in iterations(graph):
        cells = []
        for stage in stages:
            name = f"iter-{iteration:02d}/{stage}"
            done = finished(run, graph, name).values()
            cells.append(f"{effort(done, graph.jobs[name])['seconds']:.1f}" if done else "")
        table.add_row(f"{iteration + 1} (iter-{iteration:02d})", *cells)
    return table


def final_model(run: Run, graph: Graph) -> str | None:
    """Folder of the newest finished model that is kept."""
    kept = [folder for name in graph.jobs if (folder := kept_model(run, graph, name)) is not None]
    return kept[-1] if kept else None


def best_model(run: Run, graph: Graph) -> tuple[str, float] | None:
    """Folder and win rate of the best evaluated model that is kept."""
    rated = [(rate, kept_model(run, graph, name)) for name, rate in win_rates(run, graph).items()]
    kept = [(folder, rate) for rate, folder in rated if folder is not None]
    return max(reversed(kept), key=lambda each: each[1], default=None)


def kept_model(run: Run, graph: Graph, name: str) -> str | None:
    """Folder of the model that a job trained; None if it trained none, or none that is kept."""
    if graph.jobs[name].stage != "train":
        return None
    folder = run.job(name)
    for sentinel in finished(run, graph, name).values():
        configs = [path for path in folder.files(sentinel) if path.name == "config.json"]
        if configs and not folder.pruned(sentinel):
            return str(configs[0].parent)
    return None


def _number(values: Mapping[str, Any], key: str, form: str) -> str:
    return form.format(values[key]) if key in values else ""
