"""Plots of a run as PNG files, through matplotlib (the extra ``plots``): scores and lengths over iterations, reward curves."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aipo_hpc.graph import Graph
from aipo_hpc.ledger import finished
from aipo_hpc.store import Run

Curves = Mapping[int, Sequence[Mapping[str, float]]]
"""Logged steps of each iteration's training."""

METRICS = "metrics.jsonl"
_ITERATION, _LENGTH = "iteration", "length (characters)"
_SCORES = ("win rate (%)", "length-controlled win rate (%)", "AlpacaEval 2 LC", "AlpacaEval 2 WR", "Arena-Hard")
_SHOWN = ("rewards/accuracies", "rewards/margins", "loss")


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def reward_curves(run: Run, graph: Graph) -> dict[int, list[dict[str, float]]]:
    """What each finished training logged."""
    found: dict[int, list[dict[str, float]]] = {}
    for name, job in graph.jobs.items():
        for sentinel in finished(run, graph, name).values() if job.stage == "train" else ():
            for path in run.job(name).files(sentinel):
                if path.name == METRICS and path.is_file():
                    found[job.iteration] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def draw(folder: Path, rows: Sequence[Mapping[str, Any]], curves: Curves) -> list[Path]:
    """Draw what there is to draw; returns the files, none if matplotlib is not installed."""
    if not available():
        return []
    from matplotlib.figure import Figure

    def save(figure: Any, name: str) -> Path:
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        return path

    written: list[Path] = []
    for name, y_names, x_name, y_title in (
        ("score-iteration", _SCORES, _ITERATION, "score (%)"),
        ("length-iteration", (_LENGTH, "AlpacaEval 2 length"), _ITERATION, "mean response length (characters)"),
        ("score-length", _SCORES, _LENGTH, "score (%)"),
        ("mt_bench-iteration", ("MT-Bench", "MT-Bench turn 1", "MT-Bench turn 2"), _ITERATION, "MT-Bench score"),
    ):
        figure = Figure(figsize=(6, 4), layout="constrained")
        if _lines(figure.subplots(), rows, x_name, y_names, y_title):
            written.append(save(figure, name))
    if any(curves.values()):
        figure = Figure(figsize=(6, 8), layout="constrained")
        _curves(figure.subplots(len(_SHOWN), 1, sharex=True), curves)
        written.append(save(figure, "rewards"))
    return written


def _lines(axes: Any, rows: Sequence[Mapping[str, Any]], x_name: str, y_names: Sequence[str], y_title: str) -> bool:
    """One line per name that has two points or more; False if none has."""
    drawn = False
    for name in y_names:
        points = [row for row in rows if name in row and x_name in row]
        if len(points) < 2:
            continue
        drawn = True
        axes.errorbar(
            [row[x_name] for row in points],
            [row[name] for row in points],
            yerr=[row.get(f"{name} se", 0.0) for row in points],
            marker="o",
            capsize=3,
            label=name,
        )
        if x_name != _ITERATION:
            for row in points:
                axes.annotate(str(row[_ITERATION]), (row[x_name], row[name]), xytext=(4, 4), textcoords="offset points")
    if drawn:
        if x_name == _ITERATION:
            axes.set_xticks([row[_ITERATION] for row in rows])
        axes.set_xlabel("iteration (0: initial policy)" if x_name == _ITERATION else f"mean response {x_name}")
        axes.set_ylabel(y_title)
        axes.grid(alpha=0.3)
        axes.legend()
    return drawn


def _curves(all_axes: Any, curves: Curves) -> None:
    """The logged values over the steps, iteration after iteration, with a line where one ends."""
    start = 0.0
    for number, (iteration, steps) in enumerate(sorted(curves.items())):
        position = [start + step["step"] for step in steps]
        for axes, name in zip(all_axes, _SHOWN, strict=True):
            axes.plot(
                position, [step.get(name) for step in steps], color=f"C{number % 10}", label=f"iter-{iteration:02d}"
            )
            axes.set_ylabel(name)
            axes.grid(alpha=0.3)
        start = max(position, default=start)
        for axes in all_axes:
            axes.axvline(start, color="gray", linewidth=0.5)
    all_axes[-1].set_xlabel("optimizer steps")
    all_axes[0].legend()
