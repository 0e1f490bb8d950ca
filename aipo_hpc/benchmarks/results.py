"""Reads back what the benchmarks' own tools found: scores by model.

    leaderboard.csv, .json     AlpacaEval: a row per model with win_rate, length_controlled_winrate, avg_length, their errors
    *.jsonl with score, turn   MT-Bench: FastChat's model_judgment/<judge>_single.jsonl
    *.jsonl with games         Arena-Hard: model_judgment/<judge>/<model>.jsonl

Scores are as the tools count them. MT-Bench: mean over the judgments of both turns, -1 (no verdict) left out, the last of a
repeated one counts. Arena-Hard: share of games won against its baseline, a tie half, a strong verdict three times; with one
opponent that is what its regression comes to, so the number is the same but for the tool's rounding and random resampling.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from aipo_hpc.errors import DataError

Scores = dict[str, dict[str, float]]
"""By model, by the name of what was found."""

_ALPACA = {
    "win_rate": "AlpacaEval 2 WR",
    "standard_error": "AlpacaEval 2 WR se",
    "length_controlled_winrate": "AlpacaEval 2 LC",
    "lc_standard_error": "AlpacaEval 2 LC se",
    "avg_length": "AlpacaEval 2 length",
}
_STRONG = 3


def read_results(paths: Iterable[Path]) -> Scores:
    """Scores in these files, and in the files of these folders. Raises DataError for one that is none of the above."""
    found: Scores = {}
    rows: dict[str, list[dict[str, Any]]] = {"mt_bench": [], "arena_hard": []}
    for path in _files(paths):
        try:
            if path.suffix == ".jsonl":
                lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
                for line in lines:
                    rows["arena_hard" if "games" in line else "mt_bench"].append(line)
                    _ = line["model"], (line["games"] if "games" in line else (line["score"], line["turn"]))
            else:
                _merge(found, _leaderboard(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: not a result file of AlpacaEval, MT-Bench or Arena-Hard ({type(error).__name__}: {error}). "
                "Give a leaderboard (.csv, .json) or model_judgment files (.jsonl)."
            ) from error
    _merge(found, _mt_bench(rows["mt_bench"]))
    _merge(found, _arena_hard(rows["arena_hard"]))
    return found


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(each for each in path.rglob("*") if each.suffix in (".csv", ".json", ".jsonl"))
        else:
            yield path


def _leaderboard(path: Path) -> Scores:
    with path.open(encoding="utf-8", newline="") as file:
        table = {row[""]: row for row in csv.DictReader(file)} if path.suffix == ".csv" else json.load(file)
    found = {
        model: {title: float(row[name]) for name, title in _ALPACA.items() if row.get(name) not in (None, "")}
        for model, row in table.items()
    }
    if not found or not all(found.values()):
        raise ValueError("no win_rate in it")
    return found


def _mt_bench(judgments: list[dict[str, Any]]) -> Scores:
    last = {(row["model"], row["question_id"], row["turn"]): row for row in judgments}
    scores: dict[str, dict[str, list[float]]] = {}
    for (model, _, turn), row in last.items():
        if row["score"] != -1:
            for title in ("MT-Bench", f"MT-Bench turn {turn}"):
                scores.setdefault(model, {}).setdefault(title, []).append(float(row["score"]))
    return {model: {title: fmean(each) for title, each in sorted(found.items())} for model, found in scores.items()}


def _arena_hard(battles: list[dict[str, Any]]) -> Scores:
    won: dict[str, list[float]] = {}
    for row in battles:
        verdicts = [None if game is None else game["score"] for game in row["games"]]
        if "uid" in row and None in verdicts:
            continue  # its later tool leaves the question out, the earlier one the game
        # First the baseline's answer is A, then the model's.
        for verdict, model_is in zip(verdicts, "BA", strict=False):
            if verdict is not None:
                won.setdefault(row["model"], []).extend(_share(verdict, model_is))
    return {model: {"Arena-Hard": 100 * fmean(shares)} for model, shares in won.items() if shares}


def _share(verdict: str, model_is: str) -> list[float]:
    if verdict in ("A=B", "B=A"):
        return [0.5]
    winner = verdict[0] if ">" in verdict else verdict[-1]
    weight = _STRONG if ">>" in verdict or "<<" in verdict else 1
    return [float(winner == model_is)] * weight


def _merge(found: Scores, more: Mapping[str, Mapping[str, float]]) -> None:
    for model, scores in more.items():
        found.setdefault(model, {}).update(scores)
