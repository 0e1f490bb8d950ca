"""The forward over pairs against log-softmax written out in full."""

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_model_folder

from aipo_hpc import logps
from aipo_hpc.logps import ResponseLogps, collate, log_collision, response_logps, token_logps


@dataclass(frozen=True)
class Ids:
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


PAIRS = [
    Ids([1, 10, 11, 12, 13], [20, 21, 22, 2], [30, 2]),
    Ids([1, 14, 15], [23, 2], [31, 32, 33, 34, 35, 36]),
    Ids([1, 16, 17, 18, 19, 40, 41, 42], [24], [37, 38, 2]),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder(tmp_path_factory.mktemp("model")))


def both(logps: ResponseLogps) -> tuple[torch.Tensor, torch.Tensor]:
    return logps.chosen, logps.rejected


def written_out(model: Any, prompt: list[int], response: list[int]) -> float:
    """log pi(response|prompt), one sequence at a time, no padding, in fp64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
    table = torch.log_softmax(logits, dim=-1)
    return sum(float(table[len(prompt) + i - 1, token]) for i, token in enumerate(response))


def test_a_batch_holds_all_chosen_sequences_and_then_all_rejected_ones() -> None:
    batch = collate(PAIRS[:2], pad_token_id=3)
    assert batch["input_ids"].tolist() == [
        [1, 10, 11, 12, 13, 20, 21, 22, 2],
        [1, 14, 15, 23, 2, 3, 3, 3, 3],
        [1, 10, 11, 12, 13, 30, 2, 3, 3],
        [1, 14, 15, 31, 32, 33, 34, 35, 36],
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [9, 5, 7, 9]
    assert batch["prompt_lengths"].tolist() == [5, 3, 5, 3]
    assert batch["lengths"].tolist() == [4, 2, 2, 6]


def test_sums_are_those_of_each_sequence_alone(model: Any) -> None:
    with torch.no_grad():
        chosen, rejected = both(response_logps(model, collate(PAIRS)))
    assert chosen.dtype == rejected.dtype == torch.float32
    assert chosen.tolist() == pytest.approx([written_out(model, p.prompt_ids, p.chosen_ids) for p in PAIRS], abs=1e-4)
    assert rejected.tolist() == pytest.approx(
        [written_out(model, p.prompt_ids, p.rejected_ids) for p in PAIRS], abs=1e-4
    )


def test_shared_sums_end_where_the_shorter_response_does(model: Any) -> None:
    with torch.no_grad():
        logps = response_logps(model, collate(PAIRS))
    lengths = [min(len(p.chosen_ids), len(p.rejected_ids)) for p in PAIRS]
    for got, responses in (
        (logps.chosen_shared, [p.chosen_ids for p in PAIRS]),
        (logps.rejected_shared, [p.rejected_ids for p in PAIRS]),
    ):
        expected = [
            written_out(model, p.prompt_ids, ids[:m]) for p, ids, m in zip(PAIRS, responses, lengths, strict=True)
        ]
        assert got.tolist() == pytest.approx(expected, abs=1e-4)
    assert logps.weights is None


def test_weights_are_the_likelihood_per_token_relative_to_the_models_own_samples(model: Any) -> None:
    def likeness(prompt: list[int], response: list[int]) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
        table = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
        own = table.exp().square().sum(dim=-1).log()
        return float((table.gather(1, torch.tensor(response)[:, None])[:, 0] - own).mean())

    logps = response_logps(model, collate(PAIRS), weights=True)
    assert logps.weights is not None and not logps.weights.requires_grad and logps.chosen.requires_grad
    expected = [math.exp(likeness(p.prompt_ids, p.chosen_ids) + likeness(p.prompt_ids, p.rejected_ids)) for p in PAIRS]
    assert logps.weights.tolist() == pytest.approx(expected, rel=1e-4)
    print(f"weights of three random pairs: {expected}")


def test_the_chance_that_two_samples_agree_is_exact_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 5, 11) * 5
    expected = torch.softmax(logits, -1).square().sum(-1).log()
    for elements in (1, 25, 10**6):
        monkeypatch.setattr(logps, "_CHUNK_ELEMENTS", elements)
        torch.testing.assert_close(log_collision(logits), expected)


def test_a_model_that_cannot_leave_out_logits_gives_the_same(model: Any) -> None:
    def forward(input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        return SimpleNamespace(logits=model(input_ids=input_ids, attention_mask=attention_mask).logits)

    class Stubborn:
        def __init__(self) -> None:
            self.forward = forward

        def __call__(self, **kwargs: Any) -> Any:
            return self.forward(**kwargs)

    batch = collate(PAIRS)
    with torch.no_grad():
        expected, got = (torch.cat(both(response_logps(each, batch))) for each in (model, Stubborn()))
    assert got.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_logits_before_the_shortest_prompts_end_are_not_asked_for() -> None:
    asked: list[int] = []

    class Watched:
        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool, logits_to_keep: int) -> Any:
            asked.append(logits_to_keep)
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50)[:, -logits_to_keep:])

        __call__ = forward

    chosen = response_logps(Watched(), collate(PAIRS[:1])).chosen
    assert asked == [9 - 4]
    assert chosen.tolist() == pytest.approx([-4 * torch.tensor(50.0).log().item()])


def test_token_log_probabilities_are_log_softmax_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    expected = torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1)
    for elements in (1, 25, 10**6):
        monkeypatch.setattr(logps, "_CHUNK_ELEMENTS", elements)
        torch.testing.assert_close(token_logps(logits, targets), expected)


def test_the_gradient_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logps, "_CHUNK_ELEMENTS", 20)
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (2, 5))
    assert torch.autograd.gradcheck(lambda logits: token_logps(logits, targets), (logits,))


def test_the_backward_pass_leaves_the_logits_alone() -> None:
    logits = torch.randn(2, 5, 7, requires_grad=True)
    before = logits.detach().clone()
    token_logps(logits, torch.randint(0, 7, (2, 5))).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.detach().equal(before)


def test_bfloat16_logits_are_normalised_and_summed_in_fp32() -> None:
    logits = torch.randn(2, 300, 512).mul(4).bfloat16()
    targets = torch.randint(0, 512, (2, 300))
    got = token_logps(logits, targets)
    assert got.dtype == torch.float32
    expected = torch.log_softmax(logits.double(), -1).gather(-1, targets[..., None]).squeeze(-1)
    assert float((got.double() - expected).abs().max()) < 1e-5


def test_padding_never_changes_a_result(model: Any, tmp_path: Path) -> None:
    long = Ids([1, *range(50, 120)], [25, 26, 2], [39, 2])
    with torch.no_grad():
        alone = torch.cat(both(response_logps(model, collate(PAIRS[:1], pad_token_id=0))))
        together = response_logps(model, collate([PAIRS[0], long], pad_token_id=99))
        beside = torch.cat([part[:1] for part in both(together)])
    assert beside.tolist() == pytest.approx(alone.tolist(), abs=1e-4)
