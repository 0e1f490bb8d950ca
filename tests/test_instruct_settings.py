"""Settings of self-instruct that are refused before anything is submitted."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest

from aipo_hpc.errors import RecipeError
from aipo_hpc.recipe import Recipe, load_recipe, validate


def with_instruct(clusters: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    demo = load_recipe("demo")
    return replace(
        demo,
        instruct=replace(demo.instruct, **{"num_prompts": 20, **changes}),
        clusters=replace(demo.clusters, **(clusters or {})),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "vlm"}, "instruct.engine='vlm': no such engine"),
        ({"temperature": 0}, "instruct.temperature=0: must be above 0."),
        ({"top_p": 0}, "instruct.top_p=0: must be in (0, 1]."),
        ({"top_k": -1}, "instruct.top_k=-1: must be 0 (all tokens) or more."),
        ({"dtype": "half"}, "instruct.dtype='half': must be one of bfloat16"),
        ({"num_seeds": 0}, "instruct.num_seeds=0: must be at least 1."),
        ({"num_shards": 0}, "instruct.num_shards=0: must be at least 1."),
        ({"num_prompts": -5}, "instruct.num_prompts=-5: must be at least 1."),
        ({"num_machine_seeds": 9}, "instruct.num_machine_seeds=9: must be between 0 and instruct.num_seeds=8."),
        ({"near_duplicate": 0}, "instruct.near_duplicate=0: must be in (0, 1]"),
        ({"surplus": -0.1}, "instruct.surplus=-0.1: must be 0 or more."),
        ({"min_share": 1.5}, "instruct.min_share=1.5: must be between 0 and 1."),
        ({"max_calls_per_prompt": 0.2}, "instruct.max_calls_per_prompt=0.2: too few calls"),
        ({"max_task_tokens": 3}, "instruct.max_task_tokens=3: is below instruct.min_task_tokens=4."),
        ({"clusters": {"embeddings": "tfidf"}}, "clusters.embeddings='tfidf': must be one of tf-idf, sentence-"),
        (
            {"clusters": {"num_clusters": 9, "embeddings": "bert"}},
            "clusters.model_name_or_path='': clusters.embeddings=bert needs one",
        ),
        (
            {"clusters": {"num_clusters": 9, "model_name_or_path": "a/b"}},
            "clusters.model_name_or_path='a/b': clusters.embeddings=tf-idf has no model.",
        ),
        (
            {"clusters": {"num_clusters": 9}, "num_per_cluster": 2},
            "instruct.num_per_cluster=2 of clusters.num_clusters=9 makes 18 prompts at most, instruct.num_prompts=20",
        ),
        (
            {"clusters": {"num_clusters": 5}, "num_per_cluster": 9},
            "instruct.num_shards=8: with instruct.num_per_cluster, every shard needs a cluster of its own",
        ),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        validate(with_instruct(**changes))
    assert message in str(raised.value)


def test_a_number_of_prompts_for_generation_beside_it_is_refused() -> None:
    recipe = with_instruct()
    with pytest.raises(RecipeError, match=r"generate\.num_prompts=5: with self-instruct, instruct\.num_prompts tells"):
        validate(replace(recipe, generate=replace(recipe.generate, num_prompts=5)))


def test_libraries_that_are_missing_are_named_with_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    needs_all = {"num_clusters": 9, "embeddings": "sentence-transformers", "model_name_or_path": "a/b"}
    with pytest.raises(RecipeError, match=r"instruct needs datasketch and sentence_transformers, not installed"):
        validate(with_instruct(needs_all))
    validate(with_instruct(near_duplicate=1))
    recipe = with_instruct()
    validate(replace(recipe, slurm=replace(recipe.slurm, python="srun python")))
