"""Preference data instead of sampled and ranked answers: what the pairs stage is given, and what the graph leaves out."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_chat_formats import ULTRAFEEDBACK, ULTRAFEEDBACK_BINARIZED

from aipo_hpc.chat import load_tokenizer, response_ids
from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.graph import build_graph
from aipo_hpc.launch import launch
from aipo_hpc.ledger import counts
from aipo_hpc.recipe import Recipe, load_recipe, validate
from aipo_hpc.rows import Message, Prompt, Ranked, read_rows, write_rows
from aipo_hpc.selection import choose
from aipo_hpc.stages.preferences import PREFERENCES, PreferencesConfig, ranks, run
from aipo_hpc.task import Input, Outcome, Task


def preferred(
    folder: Path,
    model: Path,
    rows: Sequence[dict[str, Any]],
    held_out: Sequence[str] = (),
    part: str = "",
    **config: Any,
) -> tuple[list[Ranked], Outcome]:
    folder.mkdir()
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [Prompt(f"h{number}", text, [Message("user", text)]) for number, text in enumerate(held_out)]
    write_rows(folder / "held_out.parquet", prompts, Prompt)
    inputs = {
        "source": Input(value=f"{folder / 'p.jsonl'}{part}"),
        "held_out": Input(shards={0: (folder / "held_out.parquet",)}),
        "policy": Input(value=str(model)),
    }
    outcome = run(PreferencesConfig(**config), Task("iter-00/preferences", 0, 0, 1, 5, inputs, folder))
    return list(read_rows([folder / PREFERENCES], Ranked)), outcome


def test_ultrafeedbacks_answers_are_ranked_by_their_scores(tmp_path: Path, tiny_model: Path) -> None:
    rows, outcome = preferred(tmp_path / "a", tiny_model, [ULTRAFEEDBACK, ULTRAFEEDBACK_BINARIZED])
    by_prompt = {row.prompt: row for row in rows}
    four, two = by_prompt["Name a river."], by_prompt["Why is the sky blue?"]
    assert (four.scores, four.ranks) == ([8.5, 4, 1, 8.5], [1, 3, 4, 1])
    assert (two.prompt_id, two.scores, two.ranks) == ("f0e37e9f", [8.5, 3.0], [1, 2])
    pair = choose(two)
    assert not isinstance(pair, str)
    assert (pair.chosen.response, pair.rejected.response) == ("Short waves scatter more.", "It is not.")
    tokenizer = load_tokenizer(str(tiny_model))
    assert pair.chosen.num_tokens == len(response_ids(tokenizer, pair.chosen.response, "stop"))
    assert dict(outcome.counts) == {"prompts": 2, "candidates": 6}
    [other], _ = preferred(tmp_path / "b", tiny_model, [ULTRAFEEDBACK], score="fine-grained_score")
    assert other.ranks == [2, 3, 4, 1]


def test_held_out_prompts_are_left_out_by_text_and_several_pairs_of_a_prompt_are_kept(
    tmp_path: Path, tiny_model: Path
) -> None:
    pairs = [{"prompt": text, "chosen": "yes", "rejected": "no"} for text in ("Why?", "Where?", "Why?", "When?")]
    rows, outcome = preferred(tmp_path / "a", tiny_model, pairs, held_out=["When?"])
    ids = sorted(row.prompt_id for row in rows if row.prompt == "Why?")
    assert len(rows) == 3 and ids[1] == f"{ids[0]}-2"
    assert outcome.counts["held_out"] == 1
    with pytest.raises(DataError, match="all prompts with preferences are held out"):
        preferred(tmp_path / "b", tiny_model, pairs[:1], held_out=["Why?"])


def test_unusable_rows_are_refused_or_counted_and_a_part_of_a_source_is_used(tmp_path: Path, tiny_model: Path) -> None:
    pairs = [{"prompt": f"Why {number}?", "chosen": "yes", "rejected": "no"} for number in range(10)]
    with pytest.raises(DataError, match=r"p\.jsonl, line 11: no column 'completions', and none of chosen, rejected"):
        preferred(tmp_path / "a", tiny_model, [*pairs, {"prompt": "a"}])
    rows, outcome = preferred(tmp_path / "b", tiny_model, [*pairs, {"prompt": "a"}], skip_unusable=True)
    assert len(rows) == 10 and outcome.counts["unusable"] == 1
    half, _ = preferred(tmp_path / "c", tiny_model, pairs, part=":0.5")
    again, _ = preferred(tmp_path / "d", tiny_model, pairs[::-1], part=":0.5")
    assert len(half) == 5 and half == again
    with pytest.raises(DataError, match="no preferences in it"):
        preferred(tmp_path / "e", tiny_model, [])


def test_equal_scores_share_the_better_rank() -> None:
    assert ranks([1, 3, 3, 0]) == [3, 1, 1, 4]


def offline(recipe: Recipe, source: str) -> Recipe:
    return replace(recipe, preferences=replace(recipe.preferences, source=source))


def test_with_preferences_nothing_is_sampled_or_ranked(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").touch()
    graph = build_graph(offline(load_recipe("demo"), str(tmp_path / "p.jsonl")))
    names = [name.split("/")[1] for name in graph.jobs]
    assert names == [
        "prompts", "baseline", "preferences", *2 * ["pairs", "reference", "train", "answers", "evaluate"]
    ]  # fmt: skip
    for iteration in (0, 1):
        assert graph.jobs[f"iter-{iteration:02d}/pairs"].edges["ranked"].job == "iter-00/preferences"
    assert graph.jobs["iter-00/preferences"].resources is None, "datasets are read where there is a network"


def test_new_prompts_beside_preferences_are_refused() -> None:
    recipe = offline(load_recipe("demo"), "some/data")
    with pytest.raises(RecipeError, match="nothing is sampled then, so new prompts are of no use"):
        validate(replace(recipe, instruct=replace(recipe.instruct, num_prompts=4)))


def test_an_offline_iteration_trains_on_a_datasets_own_pairs(small_recipe: Recipe, tmp_path: Path) -> None:
    with Path(small_recipe.prompts).open() as lines:
        prompts = [json.loads(line) for line in lines][:24]
    rows = [
        {"prompt": row["prompt"], "prompt_id": row["prompt_id"], "chosen": "The red dog.", "rejected": f"No {number}."}
        for number, row in enumerate(prompts)
    ]
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = replace(offline(small_recipe, str(path)), iterations=1)
    run = launch(recipe)
    graph = build_graph(recipe)
    found = counts(run, graph, "iter-00/preferences")
    assert found["prompts"] + found["held_out"] == 24 and found["held_out"] == 6
    assert counts(run, graph, "iter-00/pairs")["kept"] == 18
    assert counts(run, graph, "iter-00/evaluate")


def test_the_sources_order_is_kept_if_asked_for_also_in_a_part(tmp_path: Path, tiny_model: Path) -> None:
    pairs = [{"prompt": f"Why {number}?", "chosen": "yes", "rejected": "no"} for number in range(10)]
    rows, _ = preferred(tmp_path / "a", tiny_model, pairs, in_order=True)
    assert [row.prompt for row in rows] == [row["prompt"] for row in pairs]
    half, _ = preferred(tmp_path / "b", tiny_model, pairs, part=":0.5", in_order=True)
    shuffled, _ = preferred(tmp_path / "c", tiny_model, pairs, part=":0.5")
    assert [row.prompt for row in half] == sorted(row.prompt for row in shuffled) and len(half) == 5
