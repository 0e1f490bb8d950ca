"""The tables at the end of a run, against counts written by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
from fakes import sentinel, write_run
from rich.table import Table

from aipo_hpc.graph import Graph, build_graph
from aipo_hpc.recipe import load_recipe
from aipo_hpc.report import final_model, guard_table, pairs_table, print_report, results_table, times_table
from aipo_hpc.sentinel import Output
from aipo_hpc.store import Run

MODEL = (Output("model/config.json", 2, "x"), Output("model/model.safetensors", 2, "x"))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return build_graph(load_recipe("demo"))


@pytest.fixture
def run(graph: Graph, tmp_path: Path) -> Run:
    return write_run(tmp_path / "run", graph)


def done(
    run: Run,
    graph: Graph,
    job: str,
    shard: int = 0,
    *,
    rows: int = 1,
    seconds: tuple[float, float] = (0.0, 1.0),
    outputs: tuple[Output, ...] = (),
    **counts: float,
) -> None:
    started, ended = seconds
    made = sentinel(graph, job, shard, outputs=outputs)
    run.job(job).publish(replace(made, counts=counts, rows=rows, started=started, ended=ended))


def row(table: Table, number: int) -> dict[str, str]:
    """A row of a table by its columns' names."""
    return {str(column.header): str(list(column.cells)[number]) for column in table.columns}


def trained(run: Run, graph: Graph, iteration: int) -> None:
    done(
        run, graph, f"iter-{iteration:02d}/train", outputs=MODEL,
        reward_accuracy=0.75, reward_margin=0.1234, loss_first=0.9, loss_last=0.71239,
    )  # fmt: skip


def evaluated(run: Run, graph: Graph, iteration: int, **counts: float) -> None:
    values = {
        "win_rate": 0.625,
        "win_rate_se": 0.0321,
        "wins": 20,
        "ties": 35,
        "losses": 5,
        "mean_length": 88.25,
        "baseline_mean_length": 90.0,
    }
    done(run, graph, f"iter-{iteration:02d}/evaluate", rows=60, **{**values, "not_judged": 4, **counts})


def test_an_empty_run_has_empty_tables_and_no_model(run, graph, capsys):
    assert [table(run, graph).row_count for table in (results_table, pairs_table)] == [0, 0]
    assert final_model(run, graph) is None
    print_report(run, graph)
    assert "no model is finished yet" in capsys.readouterr().out


def test_a_policy_has_its_win_rate_with_error_lengths_and_training(run, graph):
    done(run, graph, "iter-00/baseline", candidates=4, characters=361)
    trained(run, graph, 0)
    evaluated(run, graph, 0)
    table = results_table(run, graph)
    assert row(table, 0) == {
        "iteration": "0 (initial policy)",
        "win rate vs iteration 0": "50.0 % (itself)",
        "better, same, worse": "",
        "prompts judged": "",
        "mean response length (characters)": "90.2",
        "reward accuracy (last epoch)": "",
        "reward margin (last epoch)": "",
        "training loss first -> last": "",
    }
    assert row(table, 1) == {
        "iteration": "1 (iter-00)",
        "win rate vs iteration 0": "62.5 % ± 3.2",
        "better, same, worse": "20, 35, 5",
        "prompts judged": "60 of 64",
        "mean response length (characters)": "88.2",
        "reward accuracy (last epoch)": "0.750",
        "reward margin (last epoch)": "0.123",
        "training loss first -> last": "0.9000 -> 0.7124",
    }


def test_a_policy_that_is_trained_and_not_evaluated_says_so(run, graph):
    trained(run, graph, 0)
    assert row(results_table(run, graph), 0)["win rate vs iteration 0"] == "not evaluated"


def test_one_judged_prompt_has_a_win_rate_without_an_error(run, graph):
    trained(run, graph, 0)
    done(run, graph, "iter-00/evaluate", rows=1, win_rate=1.0, wins=1, ties=0, losses=0, mean_length=3.0, not_judged=0)
    assert row(results_table(run, graph), 0)["win rate vs iteration 0"] == "100.0 %"


def test_pairs_are_told_with_every_reason_and_what_was_cut(run, graph):
    for shard in range(2):
        done(run, graph, "iter-00/generate", shard, candidates=50, truncated=3)
        done(run, graph, "iter-00/rank", shard, truncated_candidates=1 + shard)
    done(run, graph, "iter-00/pairs", kept=20, added=7, dropped_tie=3, dropped_not_generated=2)
    assert row(pairs_table(run, graph), 0) == {
        "iteration": "1 (iter-00)",
        "prompts": "25",
        "pairs kept": "20",
        "dropped by reason": "tie 3, not_generated 2",
        "pairs added": "7",
        "candidates cut off": "6 of 100",
        "candidates the ranker saw in part": "3",
    }


def test_the_guards_values_are_told_with_the_threshold_that_one_is_beyond(run, graph):
    done(run, graph, "iter-00/pairs", kept=20, guard_length_gap=0.25, guard_tie_rate=0.625)
    assert guard_table(run, graph).row_count == 1
    found = {key: value for key, value in row(guard_table(run, graph), 0).items() if value}
    assert found == {
        "iteration": "1 (iter-00)",
        "length gap": "0.250",
        "tie rate": "tie_rate 0.625 is above guard.warn_tie_rate=0.5",
    }
    done(run, graph, "iter-00/train", outputs=MODEL, guard_reference_agreement=0.5)
    assert row(guard_table(run, graph), 0)["reference agreement"] == "0.500"


def test_a_stage_takes_from_the_first_start_to_the_last_end_of_its_shards(run, graph):
    done(run, graph, "iter-00/generate", 0, seconds=(100.0, 104.0))
    done(run, graph, "iter-00/generate", 1, seconds=(101.5, 107.25))
    first, second = (row(times_table(run, graph), number) for number in (0, 1))
    assert (first["generate"], first["rank"], second["generate"]) == ("7.2", "", "")


def test_the_final_model_is_the_newest_finished_one(run, graph, capsys):
    trained(run, graph, 0)
    assert final_model(run, graph) == str(run.path / "iter-00/train/shards/00000/one/model")
    trained(run, graph, 1)
    assert final_model(run, graph) == str(run.path / "iter-01/train/shards/00000/one/model")
    print_report(run, graph)
    assert capsys.readouterr().out.rstrip().endswith("iter-01/train/shards/00000/one/model")


def test_work_of_other_settings_is_not_reported(run, graph):
    trained(run, graph, 0)
    other = build_graph(replace(load_recipe("demo"), seed=1))
    assert final_model(run, other) is None
