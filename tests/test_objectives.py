"""Objectives against numbers worked out with ``math`` alone, and against TRL where the formulas meet."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model_folder
from training_tasks import pair

from aipo_hpc.errors import RecipeError
from aipo_hpc.objectives import OBJECTIVES, objective

# log pi(y_w), log pi(y_l), log ref(y_w), log ref(y_l), |y_w|, |y_l|
PAIRS = [(-40.0, -55.5, -42.0, -50.0, 20, 31), (-130.25, -90.0, -120.0, -101.5, 64, 40), (-7.5, -7.5, -7.5, -7.5, 3, 3)]
SETTINGS = {"beta": 0.1, "alpha": 0.09, "lambda_": 0.5, "gamma": 0.7, "label_smoothing": 0.15}


def losses(name: str, **changes: float) -> list[float]:
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*PAIRS, strict=True)]
    result = objective(name)(*columns, **{**SETTINGS, **changes})
    assert result.shape == (len(PAIRS),)
    return result.tolist()


def softened(z: float, eps: float = 0.15) -> float:
    return (1 - eps) * math.log(1 + math.exp(-z)) + eps * math.log(1 + math.exp(z))


def test_aipo_is_the_papers_formula() -> None:
    expected = [softened(0.1 * ((pw - pl) - 1.09 * (rw - rl) - 0.7)) - 0.5 / lw * pw for pw, pl, rw, rl, lw, _ in PAIRS]
    assert losses("aipo") == pytest.approx(expected, abs=1e-12)


def test_aipo_of_one_pair_worked_out_on_paper() -> None:
    # s_theta = 15.5, s_ref = 8, so 0.1 * (15.5 - 1.09 * 8) = 0.678; the likelihood term is 0.5 / 20 * 40 = 1.
    assert losses("aipo", gamma=0, label_smoothing=0)[0] == pytest.approx(math.log(1 + math.exp(-0.678)) + 1, abs=1e-12)


def test_alpha_dpo_is_aipo_without_the_likelihood_term() -> None:
    assert losses("alpha_dpo") == pytest.approx(losses("aipo", lambda_=0), abs=1e-12)
    expected = [softened(0.1 * ((pw - pl) - 1.09 * (rw - rl) - 0.7)) for pw, pl, rw, rl, _, _ in PAIRS]
    assert losses("alpha_dpo") == pytest.approx(expected, abs=1e-12)


def test_sigmoid_is_dpo_and_ignores_alpha_and_lambda() -> None:
    expected = [softened(0.1 * ((pw - pl) - (rw - rl) - 0.7)) for pw, pl, rw, rl, _, _ in PAIRS]
    assert losses("sigmoid") == pytest.approx(expected, abs=1e-12)
    assert losses("aipo", alpha=0, lambda_=0) == losses("sigmoid")


def test_nll_loss_is_dpo_and_the_chosen_responses_likelihood_per_token() -> None:
    expected = [softened(0.1 * ((pw - pl) - (rw - rl) - 0.7)) - 0.5 * pw / lw for pw, pl, rw, rl, lw, _ in PAIRS]
    assert losses("nll_loss") == pytest.approx(expected, abs=1e-12)


def test_simpo_needs_no_reference_and_does_not_multiply_gamma_by_beta() -> None:
    expected = [softened(2.0 * (pw / lw - pl / ll) - 0.7) for pw, pl, _, _, lw, ll in PAIRS]
    assert losses("simpo", beta=2.0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["aipo", "alpha_dpo", "sigmoid", "nll_loss"])
def test_a_pair_on_which_policy_and_reference_agree_costs_ln_2(name: str) -> None:
    assert losses(name, alpha=0, lambda_=0, gamma=0, label_smoothing=0)[2] == pytest.approx(math.log(2), abs=1e-15)


def test_extreme_margins_give_finite_losses_and_gradients() -> None:
    chosen = torch.tensor([-1e4, -1.0], requires_grad=True)
    other, length = torch.tensor([-1.0, -1e4]), torch.tensor([5, 5])
    for name in OBJECTIVES:
        result = objective(name)(chosen, other, other, chosen.detach(), length, length, **SETTINGS)
        (gradient,) = torch.autograd.grad(result.sum(), chosen)
        assert result.isfinite().all() and gradient.isfinite().all()


def test_an_unknown_objective_is_refused_with_the_nearest_and_the_list() -> None:
    with pytest.raises(
        RecipeError, match=r"'aipoo' .*Did you mean 'aipo'\? .*aipo, alpha_dpo, sigmoid, nll_loss, simpo"
    ):
        objective("aipoo")


def test_names_are_listed_without_importing_torch() -> None:
    code = (
        "import sys; from aipo_hpc.objectives import OBJECTIVES; import aipo_hpc.stages.train, aipo_hpc.stages.reference;"
        "assert 'aipo' in OBJECTIVES; assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_trls_dpo_loss_on_the_same_model_and_batch_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM

    from aipo_hpc.chat import load_tokenizer, prompt_ids, response_ids
    from aipo_hpc.logps import collate, response_logps
    from aipo_hpc.rows import TrainRow

    folder = tiny_model_folder(tmp_path / "policy", seed=1)
    policy: Any = AutoModelForCausalLM.from_pretrained(folder)
    ref: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder(tmp_path / "reference", seed=2))
    tokenizer = load_tokenizer(str(folder))
    pairs = [pair(index) for index in range(4)]
    rows = [
        TrainRow(
            one.prompt_id,
            prompt_ids(tokenizer, one.messages),
            response_ids(tokenizer, one.chosen.response, "stop"),
            response_ids(tokenizer, one.rejected.response, "stop"),
            0.0,
            0.0,
        )
        for one in pairs
    ]
    table = datasets.Dataset.from_list(
        [
            {
                "prompt": tokenizer.decode(row.prompt_ids),
                "chosen": one.chosen.response,
                "rejected": one.rejected.response,
            }
            for row, one in zip(rows, pairs, strict=True)
        ]
    )
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=ref,
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            beta=0.1,
            loss_type=["sigmoid"],
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=4,
            gradient_checkpointing=False,
            max_length=None,
        ),
        processing_class=tokenizer,
        train_dataset=table,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == collate(rows)["input_ids"].shape
    with torch.no_grad():
        theirs = float(trainer.compute_loss(policy.eval(), batch))
        ours_batch = collate(rows)
        columns = [*response_logps(policy, ours_batch), *response_logps(ref.eval(), ours_batch)]
    lengths = ours_batch["lengths"].chunk(2)
    settings = {"beta": 0.1, "alpha": 0.0, "lambda_": 0.0, "gamma": 0.0, "label_smoothing": 0.0}
    for name in ("sigmoid", "aipo"):
        assert float(objective(name)(*columns, *lengths, **settings).mean()) == pytest.approx(theirs, abs=1e-6)
    assert theirs != pytest.approx(math.log(2), abs=1e-2)
