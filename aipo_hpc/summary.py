"""One table over the iterations of a run, as Markdown and CSV, with the scores that benchmarks' own tools gave its models.

<run>/report/summary.md, summary.csv, *.png
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from aipo_hpc.durable import write_durably
from aipo_hpc.graph import Graph
from aipo_hpc.ledger import counts, effort, finished
from aipo_hpc.stages.answer_files import initial_model, trained_model
from aipo_hpc.store import REPORT, Run

Row = dict[str, float | str]
"""A policy: values by column; what is not known is left out."""

PLAIN, CONTROLLED, LENGTH = "win rate (%)", "length-controlled win rate (%)", "length (characters)"
ITERATION = "iteration"


def summary_rows(run: Run, graph: Graph, results: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """A row for the initial policy and for each trained one."""
    recipe = str(run.read_recipe()["recipe"])
    baseline = counts(run, graph, "iter-00/baseline")
    first: Row = {ITERATION: 0, "model": initial_model(recipe), PLAIN: 50.0, CONTROLLED: 50.0}
    if baseline.get("candidates"):
        first[LENGTH] = baseline["characters"] / baseline["candidates"]
    rows = [first]
    for iteration in sorted({job.iteration for job in graph.jobs.values()}):
        prefix = f"iter-{iteration:02d}"
        if not finished(run, graph, f"{prefix}/train"):
            continue
        row: Row = {ITERATION: iteration + 1, "model": trained_model(recipe, iteration)}
        evaluated, trained = counts(run, graph, f"{prefix}/evaluate"), counts(run, graph, f"{prefix}/train")
        for title, name in ((PLAIN, "win_rate"), (CONTROLLED, "length_controlled_win_rate")):
            for suffix, key in (("", name), (" se", f"{name}_se")):
                if key in evaluated:
                    row[f"{title}{suffix}"] = 100 * evaluated[key]
        if "mean_length" in evaluated:
            row[LENGTH] = evaluated["mean_length"]
            row["length change (%)"] = 100 * (evaluated["mean_length"] / evaluated["baseline_mean_length"] - 1)
        if "kept" in (paired := counts(run, graph, f"{prefix}/pairs")):
            row["pairs"] = paired["kept"]
        for title, key in (
            ("reward accuracy", "reward_accuracy"),
            ("reward margin", "reward_margin"),
            ("loss", "loss_last"),
        ):
            if key in trained:
                row[title] = trained[key]
        took = [effort(finished(run, graph, name).values(), job) for name, job in graph.jobs.items()
                if job.iteration == iteration]  # fmt: skip
        row["GPU-hours"] = sum(each["gpu_hours"] for each in took)
        row["task-hours"] = sum(each["task_hours"] for each in took)
        rows.append(row)
    for row in rows:
        row.update(results.get(str(row["model"]), {}))
    return rows


def columns(rows: Sequence[Row]) -> list[str]:
    """The columns that any row has, in order of their first appearance in the longest row's order."""
    ordered = max(rows, key=len)
    return list(dict.fromkeys([*ordered, *(name for row in rows for name in row)]))


def markdown(rows: Sequence[Row]) -> str:
    """The table; errors stand behind their values."""
    names = columns(rows)
    shown = [name for name in names if not (name.endswith(" se") and name.removesuffix(" se") in names)]
    lines = [" | ".join(shown), " | ".join("---" for _ in shown)]
    for row in rows:
        cells = []
        for name in shown:
            error = f" ± {_text(row[f'{name} se'])}" if f"{name} se" in row else ""
            cells.append(f"{_text(row[name])}{error}" if name in row else "")
        lines.append(" | ".join(cells))
    return "".join(f"| {line} |\n" for line in lines)


def as_csv(rows: Sequence[Row]) -> str:
    """The table with all digits and a column for each error."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_summary(run: Run, graph: Graph, rows: Sequence[Row]) -> list[Path]:
    """Write tables and plots; returns what was written. Without matplotlib only the tables are."""
    from aipo_hpc import plots

    folder = run.path / REPORT
    folder.mkdir(mode=0o700, exist_ok=True)
    written = [folder / "summary.md", folder / "summary.csv"]
    write_durably(written[0], markdown(rows))
    write_durably(written[1], as_csv(rows))
    return [*written, *plots.draw(folder, rows, plots.reward_curves(run, graph))]


def _text(value: float | str) -> str:
    if isinstance(value, str) or float(value).is_integer():
        return f"{value:g}" if not isinstance(value, str) else value
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.4f}"
