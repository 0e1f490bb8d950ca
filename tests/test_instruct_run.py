"""Whole runs whose prompts the policy makes."""

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import listing_model_folder, task

from aipo_hpc.graph import build_graph
from aipo_hpc.launch import launch
from aipo_hpc.ledger import counts
from aipo_hpc.recipe import Recipe
from aipo_hpc.report import new_prompts_table
from aipo_hpc.rows import Prompt, Responses, read_rows
from aipo_hpc.store import Run

pytestmark = pytest.mark.timeout(1800)
"""Whole runs: minutes on a busy machine."""


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that goes on with lists of tasks."""
    return listing_model_folder(tmp_path_factory.mktemp("model") / "listing")


@pytest.fixture
def recipe(small_recipe: Recipe, listing: Path, tmp_path: Path) -> Recipe:
    """Two iterations on twelve prompts that the policy makes, from seeds in two clusters."""
    draw = random.Random(1)
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in sorted({task(draw) for _ in range(40)})))
    return replace(
        small_recipe,
        model_name_or_path=str(listing),
        prompts=str(seeds),
        iterations=2,
        data=replace(small_recipe.data, limit=None),
        clusters=replace(small_recipe.clusters, num_clusters=2),
        instruct=replace(
            small_recipe.instruct, engine="transformers", dtype="float32", num_prompts=12, num_shards=2, batch_size=8,
            max_tokens=60, max_prompt_tokens=300, temperature=1.0, top_p=1.0, max_calls_per_prompt=12, near_duplicate=0.9,
        ),
    )  # fmt: skip


def prompts(run: Run, names: Iterable[str]) -> list[str]:
    graph_files = [path for name in names for path in sorted((run.path / name).glob("shards/*/*/prompts.parquet"))]
    return [row.prompt for row in read_rows(graph_files, Prompt)]


def test_two_iterations_answer_prompts_of_the_policys_own_making(recipe: Recipe) -> None:
    run = launch(recipe)
    graph = build_graph(recipe)
    first, second = (prompts(run, [f"iter-{number:02d}/collect"]) for number in (0, 1))
    for number in (0, 1):
        made = counts(run, graph, f"iter-{number:02d}/instruct")
        print(f"iteration {number}: { ({name: int(value) for name, value in made.items()}) }")
    table = new_prompts_table(run, graph)
    assert table.row_count == 2
    assert list(table.columns[3].cells) == ["12", "12"] and "empty" in str(list(table.columns[4].cells)[1])
    assert len(first) == len(second) == len({*first, *second}) - len(first) == 12
    answered = [
        row.prompt
        for path in sorted(run.path.glob("iter-01/generate/shards/*/*/rows.parquet"))
        for row in read_rows([path], Responses)
    ]
    assert sorted(answered) == sorted(second)
    assert counts(run, graph, "iter-01/pairs")["kept"] > 0

    extended = launch(replace(recipe, iterations=3, drive="prepare"))
    assert prompts(extended, ["iter-00/collect", "iter-01/collect"]) == first + second
