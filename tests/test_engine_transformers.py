"""Sampling with transformers: the right distribution, each sequence on its own, and the end of a response."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model_folder

from aipo_hpc.engines import Completion, Request, load_engine
from aipo_hpc.engines.transformers import GumbelNoise, TransformersEngine
from aipo_hpc.errors import RecipeError
from aipo_hpc.stages.generate import GenerateConfig

PROMPT = tuple(range(30, 42))
# Upper 0.1 % points of the chi-square distribution by degrees of freedom.
CHI_SQUARE_999 = {9: 27.88, 19: 43.82}


def config(**changes: Any) -> GenerateConfig:
    settings = {"engine": "transformers", "dtype": "float32", "max_tokens": 16, "temperature": 0.9, "top_k": 0}
    return GenerateConfig(**{**settings, **changes})


def requests(number: int, prompt: tuple[int, ...] = PROMPT, first_seed: int = 0) -> list[list[Request]]:
    return [[Request(f"p{index}", 0, prompt, first_seed + index)] for index in range(number)]


def sampled(engine: TransformersEngine, asked: list[list[Request]]) -> list[Completion]:
    return list(engine.generate(asked))


def logits(model: Path, prompt: tuple[int, ...] = PROMPT) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        return loaded(input_ids=torch.tensor([prompt])).logits[0, -1].double()  # type: ignore[no-any-return]


def test_one_step_is_drawn_from_the_softmax_at_the_temperature_within_the_top_k(tiny_model: Path) -> None:
    number, top_k, temperature = 4000, 10, 1.7
    engine = TransformersEngine(
        config(max_tokens=1, temperature=temperature, top_k=top_k, batch_size=1000), str(tiny_model)
    )
    best = torch.topk(logits(tiny_model) / temperature, top_k)
    expected: Counter[str] = Counter()  # two tokens that are no text by themselves may read the same
    for token, share in zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True):
        expected[engine._tokenizer.decode([token], skip_special_tokens=True)] += number * share  # type: ignore[assignment]
    assert len(expected) > 5 and min(expected.values()) > 5
    seen = Counter(done.text for done in sampled(engine, requests(number)))
    assert set(seen) <= set(expected)
    statistic = sum((seen[text] - share) ** 2 / share for text, share in expected.items())
    assert statistic < CHI_SQUARE_999[9]


def test_gumbel_noise_draws_from_the_softmax_and_leaves_excluded_tokens_out() -> None:
    scores = torch.linspace(-2, 2, 20).repeat(8000, 1)
    scores[:, 7] = -torch.inf
    drawn = GumbelNoise(range(8000))(torch.zeros(8000, 1, dtype=torch.long), scores).argmax(-1)  # type: ignore[arg-type]
    expected = 8000 * scores[0].double().softmax(-1)
    seen = torch.bincount(drawn, minlength=20).double()
    assert seen[7] == 0
    kept = expected > 0
    assert float(((seen - expected)[kept] ** 2 / expected[kept]).sum()) < CHI_SQUARE_999[19]


def test_nucleus_sampling_keeps_to_the_smallest_set_that_holds_the_mass(tiny_model: Path) -> None:
    engine = TransformersEngine(config(max_tokens=1, temperature=1.0, top_p=0.5, batch_size=500), str(tiny_model))
    shares = logits(tiny_model).softmax(-1).sort(descending=True)
    size = int((shares.values.cumsum(-1) < 0.5).sum()) + 1
    allowed = {engine._tokenizer.decode([token], skip_special_tokens=True) for token in shares.indices[:size].tolist()}
    seen = {done.text for done in sampled(engine, requests(500))}
    assert seen <= allowed
    assert len(seen) > 1


def test_a_sequence_draws_the_same_alone_and_among_neighbours_of_other_lengths(tiny_model: Path) -> None:
    asked = [[Request(f"p{n}", k, PROMPT[: 3 + n], 10 * n + k) for k in range(2)] for n in range(9)]
    together = sampled(TransformersEngine(config(batch_size=9), str(tiny_model)), asked)
    alone = sampled(TransformersEngine(config(batch_size=1), str(tiny_model)), asked)
    assert {(done.request, done.text, done.finish_reason, done.num_tokens) for done in together} == {
        (done.request, done.text, done.finish_reason, done.num_tokens) for done in alone
    }


def test_the_same_request_gives_the_same_text_and_another_seed_another(tiny_model: Path) -> None:
    engine = TransformersEngine(config(), str(tiny_model))
    first, again, other = (sampled(engine, requests(4, first_seed=seed)) for seed in (0, 0, 100))
    assert first == again
    assert not {done.text for done in first} & {done.text for done in other}


def test_temperature_zero_is_greedy_decoding(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine = TransformersEngine(config(temperature=0.0, top_k=50), str(tiny_model))
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for done in sampled(engine, [[Request(f"p{n}", 0, PROMPT[n:], n)] for n in range(5)]):
        ids = torch.tensor([done.request.prompt_token_ids])
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        assert done.text == engine._tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def ended_by(folder: Path, eos: int | list[int], prompt: tuple[int, ...] = PROMPT) -> tuple[list[Completion], int]:
    """Greedy responses of a model whose generation config lists ``eos``, and the id of its tokenizer's own."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": eos}))
    engine = TransformersEngine(config(temperature=0.0), str(folder))
    return sampled(engine, [[Request("p", 0, prompt, 0)]]), int(engine._tokenizer.eos_token_id)  # type: ignore[arg-type]


def test_a_response_ends_at_any_token_of_the_generation_config_and_at_the_tokenizers(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    [endless], own = ended_by(folder, 2)
    assert (endless.finish_reason, endless.num_tokens) == ("length", 16)
    assert own == 2
    engine = TransformersEngine(config(temperature=0.0), str(folder))
    ids = torch.tensor([PROMPT])
    output = engine._model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, eos_token_id=2
    )[0, len(PROMPT) :].tolist()
    third = output[3]
    first = output.index(third)
    [ended], _ = ended_by(folder, [2, third])
    assert (ended.finish_reason, ended.num_tokens) == ("stop", first + 1)
    assert ended.text == engine._tokenizer.decode(output[:first], skip_special_tokens=True)
    # The tokenizer's own token ends a response even if the generation config names another.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    token = engine._tokenizer.convert_ids_to_tokens(third)
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": token}))
    [by_tokenizer], _ = ended_by(folder, 2)
    assert (by_tokenizer.finish_reason, by_tokenizer.num_tokens) == ("stop", first + 1)


def test_sampling_ends_where_a_stop_text_comes_up_whatever_its_neighbours_do(tiny_model: Path) -> None:
    engine = TransformersEngine(config(max_tokens=40), str(tiny_model))
    plain = sampled(engine, requests(4))
    assert all(done.finish_reason == "length" for done in plain)
    stops = [(), (plain[1].text[9:13],), (plain[2].text[20:23], "not there"), ("not there",)]
    asked = [[replace(each, stop=stop)] for [each], stop in zip(requests(4), stops, strict=True)]
    found = sampled(engine, asked)
    for done, whole, stop in zip(found, plain, stops, strict=True):
        ends = [whole.text.index(text) for text in stop if text in whole.text]
        assert done.text == whole.text[: min(ends, default=None)]
        assert done.finish_reason == ("stop" if ends else "length")
        assert (done.num_tokens < whole.num_tokens) == bool(ends)


def test_penalties_of_the_models_generation_config_do_not_change_what_is_sampled(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    plain = sampled(TransformersEngine(config(), str(folder)), requests(3))
    path = folder / "generation_config.json"
    penalties = {
        "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 1,
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 3,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **penalties}))
    assert sampled(TransformersEngine(config(), str(folder)), requests(3)) == plain


def test_an_unknown_engine_is_named_with_the_known_ones(tiny_model: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        load_engine(config(engine="transformer"), str(tiny_model))
    assert str(raised.value) == (
        "generate.engine='transformer': no such engine; there are vllm, transformers. Did you mean 'transformers'?"
    )
