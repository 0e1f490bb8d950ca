"""The code that a model brings is run only where the recipe asks for that very model."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from aipo_hpc import own_code
from aipo_hpc.chat import load_tokenizer
from aipo_hpc.errors import DataError, DriftError
from aipo_hpc.graph import build_graph
from aipo_hpc.launch import launch
from aipo_hpc.model_files import load_model
from aipo_hpc.outside import ranker_inputs
from aipo_hpc.preflight import resolve
from aipo_hpc.recipe import Recipe
from aipo_hpc.record import read_graph
from aipo_hpc.stages.evaluate import judging

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

with Path({trace!r}).open("a") as file:
    file.write("its code was run\\n")


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What is there once the code was run."""
    return tmp_path / "trace"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path, trace: Path) -> Path:
    """A model that is nothing without the code in its folder."""
    folder = tmp_path / "own"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    named = {auto: name.replace("code.", f"code_{tmp_path.name}.") for auto, name in named.items()}
    (folder / f"code_{tmp_path.name}.py").write_text(CODE.format(trace=str(trace)))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own_llama", "auto_map": named}))
    return folder


@pytest.fixture(autouse=True)
def nothing_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_code, "_trusted", set())


def with_model(recipe: Recipe, model: Path) -> Recipe:
    return replace(recipe, model_name_or_path=str(model), iterations=1)


def test_a_launch_refuses_such_a_model_runs_none_of_its_code_and_says_what_to_set(
    small_recipe: Recipe, model: Path, trace: Path
) -> None:
    with pytest.raises(DataError, match="code of its own") as refused:
        launch(with_model(small_recipe, model))
    print(refused.value)
    assert str(model) in str(refused.value) and "trust_remote_code=True" in str(refused.value)
    assert not trace.exists()


def test_no_loader_runs_the_code_of_a_model_that_is_not_trusted(model: Path, trace: Path, tmp_path: Path) -> None:
    import torch

    own_code.trust(str(tmp_path / "another"))
    with pytest.raises(DataError, match="trust_remote_code"):
        load_model(str(model), torch.float32)
    with suppress(DataError):  # a tokenizer may need none of it
        load_tokenizer(str(model))
    assert not trace.exists()


def test_a_whole_run_uses_the_code_if_asked_to_and_its_trained_models_do_too(
    small_recipe: Recipe, model: Path, trace: Path
) -> None:
    recipe = replace(with_model(small_recipe, model), trust_remote_code=True)
    run = launch(recipe)
    assert trace.read_text().startswith("its code was run")
    graph = read_graph(run)
    (made,) = run.job("iter-00/train").done(graph.fingerprints["iter-00/train"]).values()
    names = {output.path for output in made.outputs}
    print(sorted(names))
    assert f"model/{next(model.glob('code_*.py')).name}" in names
    policies = {
        name: job.inputs["policy"].trust_remote_code for name, job in graph.jobs.items() if "policy" in job.inputs
    }
    assert set(policies.values()) == {True}
    assert not any(job.inputs["ranker"].trust_remote_code for job in graph.jobs.values() if "ranker" in job.inputs)
    with pytest.raises((DriftError, DataError)):
        launch(replace(recipe, trust_remote_code=False))


def test_whether_the_code_is_run_is_part_of_what_a_run_is(small_recipe: Recipe, tiny_model: Path) -> None:
    plain = build_graph(with_model(small_recipe, tiny_model))
    trusting = build_graph(replace(with_model(small_recipe, tiny_model), trust_remote_code=True))
    assert plain.fingerprints["iter-00/generate"] != trusting.fingerprints["iter-00/generate"]
    assert plain.fingerprints["iter-00/prompts"] == trusting.fingerprints["iter-00/prompts"]


def test_a_ranker_is_trusted_by_itself_also_as_the_judge_of_evaluate(small_recipe: Recipe) -> None:
    recipe = replace(small_recipe, rank=replace(small_recipe.rank, trust_remote_code=True))
    (ranker,) = ranker_inputs(recipe.rank).values()
    (judge,) = ranker_inputs(judging(recipe.evaluate, recipe.rank)).values()
    assert ranker is not None and ranker.trust_remote_code and ranker == judge
    resolved = resolve(build_graph(recipe))
    policy = resolved.jobs["iter-00/generate"].inputs["policy"].value
    assert own_code.is_trusted(resolved.jobs["iter-00/rank"].inputs["ranker"].value)
    assert not own_code.is_trusted(policy)
