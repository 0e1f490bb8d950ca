"""The table over iterations, its plots, and the scores that benchmarks' own tools left in their files."""

import csv
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import sentinel, write_run

from aipo_hpc import plots
from aipo_hpc.__main__ import main
from aipo_hpc.benchmarks.results import read_results
from aipo_hpc.errors import DataError
from aipo_hpc.graph import Graph, build_graph
from aipo_hpc.recipe import load_recipe
from aipo_hpc.sentinel import Output
from aipo_hpc.store import Run
from aipo_hpc.summary import CONTROLLED, LENGTH, PLAIN, as_csv, markdown, summary_rows, write_summary

EVALUATED = {
    "win_rate": 0.625, "win_rate_se": 0.0321, "length_controlled_win_rate": 0.6, "length_controlled_win_rate_se": 0.04,
    "mean_length": 99.0, "baseline_mean_length": 90.0, "wins": 1, "ties": 1, "losses": 1, "not_judged": 0,
}  # fmt: skip
TRAINED = {"reward_accuracy": 0.75, "reward_margin": 0.0123, "loss_first": 0.9, "loss_last": 0.7}


@pytest.fixture(scope="module")
def graph() -> Graph:
    return build_graph(load_recipe("demo"))


@pytest.fixture
def run(graph: Graph, tmp_path: Path) -> Run:
    """Two iterations, of which the second is not evaluated."""
    made = write_run(tmp_path / "run", graph)
    made.write_recipe({"run_id": "cafe", "recipe": "demo", "settings": {}})
    steps = "".join(
        json.dumps({"step": n, "loss": 1 / n, "rewards/margins": n, "rewards/accuracies": 0.5}) + "\n" for n in (1, 2)
    )
    outputs = (Output("model/config.json", 2, "c"), Output(plots.METRICS, len(steps), "m"))
    counts: dict[str, dict[str, float]] = {
        "iter-00/baseline": {"candidates": 2, "characters": 180},
        "iter-00/pairs": {"kept": 24},
        "iter-00/train": TRAINED,
        "iter-00/evaluate": EVALUATED,
        "iter-01/train": TRAINED,
    }
    for job, found in counts.items():
        one = replace(sentinel(graph, job, 0), counts=found, started=0.0, ended=1800.0, gpus=("H100",) * 2)
        if job.endswith("train"):
            folder = made.job(job).attempt_folder(0, "one")
            folder.mkdir(parents=True)
            (folder / plots.METRICS).write_text(steps)
            one = replace(one, outputs=outputs)
        made.job(job).publish(one)
    return made


def test_each_policy_has_a_row_with_what_is_known_of_it(run: Run, graph: Graph) -> None:
    first, second, third = summary_rows(run, graph, {"demo-iter-01": {"MT-Bench": 7.5}, "other": {"MT-Bench": 1.0}})
    assert first == {"iteration": 0, "model": "demo-initial", PLAIN: 50.0, CONTROLLED: 50.0, LENGTH: 90.0}
    assert second == {
        "iteration": 1, "model": "demo-iter-00", PLAIN: 62.5, f"{PLAIN} se": pytest.approx(3.21), CONTROLLED: 60.0,
        f"{CONTROLLED} se": 4.0, LENGTH: 99.0, "length change (%)": pytest.approx(10.0), "pairs": 24,
        "reward accuracy": 0.75, "reward margin": 0.0123, "loss": 0.7, "GPU-hours": 4.0, "task-hours": 2.0,
    }  # fmt: skip
    assert (third["model"], third["MT-Bench"], PLAIN in third) == ("demo-iter-01", 7.5, False)


def test_the_table_reads_as_markdown_and_as_csv(run: Run, graph: Graph) -> None:
    rows = summary_rows(run, graph, {"demo-iter-01": {"MT-Bench": 7.5}})
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in markdown(rows).splitlines()]
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5
    shown = dict(zip(lines[0], lines[3], strict=True))
    assert (shown[PLAIN], shown[CONTROLLED], shown["reward margin"]) == ("62.50 ± 3.21", "60 ± 4", "0.0123")
    assert not [name for name in lines[0] if name.endswith(" se")]
    table = list(csv.DictReader(as_csv(rows).splitlines()))
    assert [row["model"] for row in table] == ["demo-initial", "demo-iter-00", "demo-iter-01"]
    assert (table[1][f"{CONTROLLED} se"], table[2][PLAIN], table[2]["MT-Bench"]) == ("4.0", "", "7.5")


@pytest.mark.skipif(not plots.available(), reason="needs matplotlib, the extra `plots`")
def test_tables_and_plots_are_written_below_report_in_the_run(run: Run, graph: Graph) -> None:
    rows = summary_rows(run, graph, {})
    written = write_summary(run, graph, rows)
    names = [
        "length-iteration.png",
        "rewards.png",
        "score-iteration.png",
        "score-length.png",
        "summary.csv",
        "summary.md",
    ]
    assert (
        sorted(path.name for path in written) == names == sorted(path.name for path in (run.path / "report").iterdir())
    )
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    write_summary(run, graph, rows)  # and again over it


def test_without_matplotlib_the_tables_are_written_and_the_command_says_what_to_install(
    run, graph, monkeypatch, capsys
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    assert main(["report", str(run.path), "--summary"]) == 0
    assert "pip install 'aipo_hpc[plots]'" in capsys.readouterr().out
    assert sorted(path.name for path in (run.path / "report").iterdir()) == ["summary.csv", "summary.md"]


def test_reward_curves_are_what_each_training_logged(run: Run, graph: Graph) -> None:
    found = plots.reward_curves(run, graph)
    assert [step["step"] for step in found[0]] == [1, 2] and set(found) == {0, 1}


# -- result files ----------------------------------------------------------------------------------------------------

LEADERBOARD = (
    ",win_rate,standard_error,mode,avg_length,n_wins,n_total,length_controlled_winrate,lc_standard_error\n"
    "demo-iter-00,14.7,1.07,community,1676,113,805,17.1,\n"
)


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judged(question: int, turn: int, score: float) -> dict[str, Any]:
    """As FastChat's gen_judgment.py writes it."""
    return {"question_id": question, "model": "demo-iter-00", "judge": ["gpt-4", "single-v1"], "user_prompt": "",
            "judgment": "", "score": score, "turn": turn, "tstamp": 1.0}  # fmt: skip


def battle(first: str | None, second: str | None, **key: Any) -> dict[str, Any]:
    """As Arena-Hard's gen_judgment.py writes it: in the first game the baseline's answer is A."""
    games = [{"user_prompt": "", "judgment": "", "score": score} for score in (first, second)]
    return {**(key or {"question_id": "a"}), "model": "demo-iter-00", "judge": "gpt-4", "games": games}


def test_alpaca_evals_leaderboard_is_read_as_csv_and_as_json(tmp_path: Path) -> None:
    (tmp_path / "leaderboard.csv").write_text(LEADERBOARD)
    (tmp_path / "leaderboard.json").write_text(
        json.dumps({"demo-iter-00": {"win_rate": 14.7, "length_controlled_winrate": 17.1, "avg_length": 1676.0}})
    )
    found = read_results([tmp_path / "leaderboard.csv"])["demo-iter-00"]
    assert found == {
        "AlpacaEval 2 WR": 14.7, "AlpacaEval 2 WR se": 1.07, "AlpacaEval 2 LC": 17.1, "AlpacaEval 2 length": 1676.0,
    }  # fmt: skip
    assert read_results([tmp_path / "leaderboard.json"])["demo-iter-00"]["AlpacaEval 2 LC"] == 17.1


def test_mt_bench_is_the_mean_over_both_turns_without_failed_judgments_and_repetitions(tmp_path: Path) -> None:
    path = lines(tmp_path / "gpt-4_single.jsonl", [
        judged(81, 1, 3), judged(81, 1, 8), judged(81, 2, 6), judged(82, 1, 9), judged(82, 2, -1),
    ])  # fmt: skip
    found = read_results([path])["demo-iter-00"]
    assert found == {"MT-Bench": pytest.approx(23 / 3), "MT-Bench turn 1": 8.5, "MT-Bench turn 2": 6.0}


def test_arena_hard_counts_ties_half_and_strong_verdicts_three_times(tmp_path: Path) -> None:
    # Game 1: the baseline is A. B>>A: won thrice; then A=B: half. Game 2, changed places: A>B won; B>A lost.
    path = lines(tmp_path / "m.jsonl", [battle("B>>A", "A>B"), battle("A=B", "B>A")])
    assert read_results([path])["demo-iter-00"] == {"Arena-Hard": pytest.approx(100 * (3 + 1 + 0.5 + 0) / 6)}


def test_a_game_without_a_verdict_is_left_out_as_each_version_of_the_tool_does(tmp_path: Path) -> None:
    early = lines(tmp_path / "early.jsonl", [battle("B>A", None), battle("A>B", "B>A")])
    late = lines(tmp_path / "late.jsonl", [battle("B>A", None, uid="a"), battle("A>B", "B>A", uid="b")])
    assert read_results([early])["demo-iter-00"] == {"Arena-Hard": pytest.approx(100 / 3)}
    assert read_results([late])["demo-iter-00"] == {"Arena-Hard": 0.0}


def test_a_folder_of_results_is_read_as_a_whole_and_joins_the_table(run, graph, tmp_path, capsys) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results/leaderboard.csv").write_text(LEADERBOARD + "gpt-9,99,1,verified,1,1,805,99,1\n")
    lines(tmp_path / "results/mt_bench/model_judgment/gpt-4_single.jsonl", [judged(81, 1, 8), judged(81, 2, 6)])
    assert main(["report", str(run.path), "--results", str(tmp_path / "results")]) == 0
    said = capsys.readouterr().out
    assert "14.70 ± 1.07" in said and "MT-Bench turn 2" in said
    assert "result files also name gpt-9, which are no models of this run" in said
    assert not (run.path / "report").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", "x,y\n1,2\n"), ("a.json", "[]"), ("a.json", "{}"), ("a.jsonl", '{"model": "m"}'), ("a.jsonl", "{")],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}: not a result file of AlpacaEval, MT-Bench or Arena-Hard"):
        read_results([tmp_path / name])


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a result file"):
        read_results([tmp_path / "none.csv"])
