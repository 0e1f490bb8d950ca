"""What the demo comes with: the text is what its script composes, the files are small, the ranker knows good from bad."""

import importlib.util
import json
import random
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from aipo_hpc.chat import load_tokenizer, prompt_ids
from aipo_hpc.rankers import from_texts
from aipo_hpc.rankers.pairrm import PairRM
from aipo_hpc.recipe import load_recipe
from aipo_hpc.rows import Message

ASSETS = Path(__file__).parents[1] / "recipes" / "demo_assets"


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpus", ASSETS / "corpus.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "corpus", module)  # its dataclasses look there
        spec.loader.exec_module(module)
    return module


def prompts() -> list[str]:
    return [json.loads(line)["prompt"] for line in (ASSETS / "prompts.jsonl").read_text().splitlines()]


def test_the_text_is_what_its_script_composes(corpus, tmp_path):
    corpus.write(tmp_path, *corpus.compose(ASSETS / "text.toml", 0))
    for name in ("corpus.jsonl", "prompts.jsonl"):
        assert (tmp_path / name).read_bytes() == (ASSETS / name).read_bytes(), f"run make.py: {name} is not its own"


def test_no_prompt_is_one_that_the_models_were_taught():
    taught = {json.loads(line)["prompt"] for line in (ASSETS / "corpus.jsonl").read_text().splitlines()}
    assert len(taught) > 500 and len(set(prompts())) == 280
    assert not taught & set(prompts())


def test_the_files_are_below_ten_megabytes_together():
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    print(f"demo assets: {size / 1e6:.1f} MB")
    assert size < 10e6


def test_the_ranker_prefers_good_answers_to_every_kind_of_bad_one(corpus):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = random.Random(1)
    world = tomllib.loads((ASSETS / "text.toml").read_text(encoding="utf-8"))
    everything = list(corpus.items(world))
    item_of = {prompt: item for item in everything for prompt in item.prompts}
    ranker = PairRM.load(str(ASSETS / "ranker"))
    some = prompts()[:40]
    for failure in corpus.FAILURES:
        answers = [
            (item_of[prompt].answer, corpus.spoil(item_of[prompt], failure, everything, world["bad"], rng))
            for prompt in some
        ]
        share = sum(ranking.ranks[0] < ranking.ranks[1] for ranking in ranker.rank(from_texts(some, answers))) / len(
            some
        )
        print(f"{failure:10} {share:.3f} of {len(some)} prompts whose wording is new to the ranker")
        assert share >= 0.75
    torch.set_num_threads(before)


def test_the_demos_prompts_fit_its_limits():
    recipe = load_recipe("demo")
    tokenizer = load_tokenizer(recipe.model_name_or_path)
    longest = max(len(prompt_ids(tokenizer, [Message("user", prompt)])) for prompt in prompts())
    assert longest <= recipe.generate.max_prompt_tokens == recipe.pairs.max_prompt_tokens
