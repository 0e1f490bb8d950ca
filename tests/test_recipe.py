"""Recipes: found by name or path, typed, and refused with the field, the value and what to do."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from aipo_hpc.errors import RecipeError
from aipo_hpc.graph import build_graph
from aipo_hpc.guard import GuardConfig
from aipo_hpc.recipe import Recipe, known_recipes, load_recipe, validate
from aipo_hpc.stages.pairs import MixConfig


@pytest.mark.parametrize("name", known_recipes())
def test_a_recipe_that_comes_along_is_valid_and_makes_a_graph(name: str) -> None:
    recipe = load_recipe(name)
    validate(recipe)
    assert recipe.name == name
    graph = build_graph(recipe)
    assert len([job for job in graph.jobs.values() if job.stage == "train"]) == recipe.iterations


@pytest.mark.parametrize(("typed", "meant"), [("ultrafedback", "ultrafeedback"), ("dmo", "demo")])
def test_an_unknown_recipe_gets_a_suggestion(typed: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe {typed!r} is not known; there are demo, .* mean {meant!r}"):
        load_recipe(typed)


def test_a_recipe_of_ones_own_is_given_by_its_path(tmp_path: Path) -> None:
    mine = tmp_path / "my-recipe.py"
    mine.write_text(
        "from dataclasses import replace\n"
        "from aipo_hpc.recipe import Recipe, load_recipe\n"
        "def recipe() -> Recipe:\n"
        "    return replace(load_recipe('demo'), name='mine', iterations=7)\n"
    )
    assert load_recipe(str(mine)).iterations == 7


def test_a_path_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such file as .*absent\.py"):
        load_recipe(str(tmp_path / "absent.py"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"does not define a function recipe\(\)"),
        ("def recipe():\n    return 3\n", r"recipe\(\) returned int, not an aipo_hpc\.recipe\.Recipe"),
        ("def recipe(:\n", r"mine\.py: .*line 1"),
        ("import not_there_at_all\n", r"mine\.py: .*not_there_at_all"),
        ("def recipe():\n    return Recipe()\n", r"mine\.py: .*'Recipe' is not defined"),
        (
            "from aipo_hpc.recipe import Recipe\ndef recipe():\n    return Recipe(bta=1)\n",
            r"mine\.py: .*unexpected keyword argument 'bta'",
        ),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_path_and_why(tmp_path: Path, text: str, message: str) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(mine))


def test_a_value_that_a_recipe_file_gets_wrong_is_named_as_such(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from aipo_hpc.recipe import Recipe\nfrom aipo_hpc.stages.train import TrainConfig\n"
        "def recipe():\n    return Recipe(train=TrainConfig(beta=0))\n"
    )
    with pytest.raises(RecipeError, match="beta=0 must be above 0"):
        load_recipe(str(mine))


Change = Callable[[Recipe], Recipe]


def generate(**fields: object) -> Change:
    """A change of the generation's settings."""
    return lambda recipe: replace(recipe, generate=replace(recipe.generate, **fields))  # type: ignore[arg-type]


WRONG: list[tuple[Change, str]] = [
    (lambda recipe: replace(recipe, model_name_or_path=""), "model_name_or_path is not set"),
    (lambda recipe: replace(recipe, prompts=""), "prompts is not set"),
    (lambda recipe: replace(recipe, rank=replace(recipe.rank, model_name_or_path="")), "rank.model_name_or_path is not"),
    (lambda recipe: replace(recipe, iterations=0), "iterations=0: must be at least 1"),
    (generate(n=1), "generate.n=1: .* at least 2"),
    (generate(temperature=-1.0), "generate.temperature=-1.0: must"),
    (generate(temperature=0.0), "generate.temperature=0 samples the same candidate"),
    (generate(temperature=float("nan")), "generate.temperature=nan: must"),
    (generate(top_p=0.0), "generate.top_p=0.0: must be in"),
    (generate(top_k=-1), "generate.top_k=-1: must"),
    (generate(num_shards=0), "generate.num_shards=0: must be at least 1"),
    (generate(max_tokens=0), "generate.max_tokens=0: must be at least 1"),
    (generate(max_prompt_tokens=0), "generate.max_prompt_tokens=0: must be at least 1"),
    (generate(num_prompts=0), "generate.num_prompts=0: must be at least 1"),
    (generate(dtype="bf16"), "generate.dtype='bf16': must be one of bfloat16, float16, float32"),
    (lambda recipe: replace(recipe, rank=replace(recipe.rank, dtype="fp8")), "rank.dtype='fp8': must be one of"),
    (generate(engine="vlm"), r"generate\.engine='vlm': no such engine; there are vllm, transformers\. .*'vllm'"),
    (lambda recipe: replace(recipe, rank=replace(recipe.rank, ranker="pairm")), "rank.ranker='pairm'.*'pairrm'"),
    (lambda recipe: replace(recipe, evaluate=replace(recipe.evaluate, ranker="gpt")), "ranker='gpt'.*known: pairrm"),
    (lambda recipe: replace(recipe, rank=replace(recipe.rank, num_shards=3)), "rank.num_shards=3: must equal"),
    (lambda recipe: replace(recipe, pairs=replace(recipe.pairs, selection="random")), "pairs.selection='random'"),
    (
        lambda recipe: replace(recipe, pairs=replace(recipe.pairs, mix=(MixConfig(name="uf"),))),
        "pairs.mix has a dataset without a source",
    ),
    (
        lambda recipe: replace(recipe, pairs=replace(recipe.pairs, decontaminate="a.jsonl:0.5")),
        "pairs.decontaminate='a.jsonl:0.5': a part of a list",
    ),
    (
        lambda recipe: replace(recipe, train=replace(recipe.train, guard=GuardConfig(stop_tie_rate=0.9))),
        r"thresholds of the guard are set by the recipe's guard\.\*",
    ),
    (lambda recipe: replace(recipe, data=replace(recipe.data, num_held_out=0)), "data.num_held_out=0: must be at least 1"),
    (lambda recipe: replace(recipe, data=replace(recipe.data, limit=0)), "data.limit=0: must be at least 1"),
    (lambda recipe: replace(recipe, evaluate=replace(recipe.evaluate, num_shards=0)), "evaluate.num_shards=0: must be"),
    (lambda recipe: replace(recipe, name="a/b"), "name='a/b': "),
    (lambda recipe: replace(recipe, name=".."), "name='..': "),
    (
        lambda recipe: replace(recipe, train=replace(recipe.train, resources=replace(recipe.train.resources, nodes=3))),
        "train.global_batch_size=16 is not a multiple of 48",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_value_that_makes_no_sense_is_refused_by_name(change: Change, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate(change(load_recipe("demo")))


TRAIN: list[tuple[dict[str, object], str]] = [
    ({"loss_type": "aippo"}, r"loss_type='aippo' is not an objective\. Did you mean 'aipo'\?"),
    ({"beta": 0.0}, r"train\.beta=0\.0 must be above 0"),
    ({"beta": -0.1}, r"train\.beta=-0\.1 must be above 0"),
    ({"beta": float("nan")}, r"train\.beta=nan must be above 0"),
    ({"label_smoothing": 0.5}, r"train\.label_smoothing=0\.5 must be from 0 to below 0\.5"),
    ({"zero_stage": 4}, r"train\.zero_stage=4 must be 0, 1, 2 or 3"),
]


@pytest.mark.parametrize(("fields", "message"), TRAIN, ids=[message for _, message in TRAIN])
def test_a_value_of_training_that_makes_no_sense_is_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(load_recipe("demo").train, **fields)  # type: ignore[arg-type]


def test_shapes_of_jobs_that_cannot_be_are_refused() -> None:
    recipe = load_recipe("demo")
    for fields, message in (
        ({"nodes": 0}, "nodes=0"),
        ({"time": 0}, "time=0"),
        ({"gpus_per_node": -1}, "gpus_per_node=-1"),
    ):
        resources = replace(recipe.generate.resources, **fields)  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match=f"generate.resources.{message}: must be"):
            validate(replace(recipe, generate=replace(recipe.generate, resources=resources)))
