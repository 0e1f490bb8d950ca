"""Objectives against numbers worked out with ``math`` alone, and against TRL where the formulas meet."""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model_folder
from training_tasks import pair

from aipo_hpc.errors import RecipeError
from aipo_hpc.objectives import OBJECTIVES, margins, objective
from aipo_hpc.objectives.batch import Batch, Extras, Ratios, Shared

# log pi(y_w), log pi(y_l), log ref(y_w), log ref(y_l), |y_w|, |y_l|
PAIRS = [(-40.0, -55.5, -42.0, -50.0, 20, 31), (-130.25, -90.0, -120.0, -101.5, 64, 40), (-7.5, -7.5, -7.5, -7.5, 3, 3)]
SETTINGS: dict[str, Any] = {"beta": 0.1, "alpha": 0.09, "lambda_": 0.5, "gamma": 0.7, "label_smoothing": 0.15}


def columns(rows: Sequence[Sequence[float]]) -> list[torch.Tensor]:
    return [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]


def of(pairs: Sequence[Sequence[float]], name: str, **changes: Any) -> list[float]:
    result = objective(name)(*columns(pairs), **{**SETTINGS, **changes})
    assert result.shape == (len(pairs),)
    return result.tolist()


def losses(name: str, **changes: Any) -> list[float]:
    return of(PAIRS, name, **changes)


EXTRAS = Extras(
    Shared(*columns([(-39.0, -30.0, -41.0, -29.0), (-80.0, -90.0, -77.0, -101.5), (-7.5, -7.5, -7.5, -7.5)])),
    torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64),
    Ratios(0.5, -0.25, 0.125),
)


def logistic(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def log1pexp(z: float) -> float:
    return math.log(1 + math.exp(z))


def softened(z: float, eps: float = 0.15) -> float:
    return (1 - eps) * log1pexp(-z) + eps * log1pexp(z)


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


def test_sigmoid_norm_takes_rewards_per_token() -> None:
    expected = [softened(5.0 * ((pw - rw) / lw - (pl - rl) / ll - 0.7)) for pw, pl, rw, rl, lw, ll in PAIRS]
    assert losses("sigmoid_norm", beta=5.0) == pytest.approx(expected, abs=1e-12)


def test_robust_is_the_unbiased_estimate_of_dpo_under_flipped_labels() -> None:
    expected = []
    for pw, pl, rw, rl, _, _ in PAIRS:
        z = 0.1 * ((pw - pl) - (rw - rl) - 0.7)
        expected.append((0.85 * log1pexp(-z) - 0.15 * log1pexp(z)) / 0.7)
    assert losses("robust") == pytest.approx(expected, abs=1e-12)
    # If labels are flipped with probability eps, its expectation is DPO's loss with the true label.
    swapped = [(pl, pw, rl, rw, ll, lw) for pw, pl, rw, rl, lw, ll in PAIRS]
    mixed = [
        0.85 * a + 0.15 * b for a, b in zip(losses("robust", gamma=0), of(swapped, "robust", gamma=0), strict=True)
    ]
    assert mixed == pytest.approx(losses("sigmoid", gamma=0, label_smoothing=0), abs=1e-12)


def test_hinge_costs_nothing_beyond_a_margin_of_one() -> None:
    # deltas are 7.5, -21.75 and 0
    assert losses("hinge", gamma=0) == pytest.approx([1 - 0.75, 1 + 2.175, 1.0], abs=1e-12)
    assert losses("hinge") == pytest.approx([1 - 0.68, 1 + 2.245, 1.07], abs=1e-12)
    assert losses("hinge", beta=0.2, gamma=0)[0] == 0.0


def test_ipo_draws_the_summed_margin_to_half_of_one_over_beta() -> None:
    assert losses("ipo") == pytest.approx([(7.5 - 0.7 - 5) ** 2, (-21.75 - 0.7 - 5) ** 2, (0 - 0.7 - 5) ** 2], abs=1e-9)


def test_r_dpo_penalises_length_by_asking_less_of_a_longer_chosen_response() -> None:
    expected = [softened(0.1 * ((pw - pl) - (rw - rl) - 0.7) + 0.002 * (lw - ll)) for pw, pl, rw, rl, lw, ll in PAIRS]
    assert losses("r_dpo", alpha=0.002) == pytest.approx(expected, abs=1e-12)
    longer = losses("r_dpo", alpha=0.002)[1] - losses("sigmoid")[1]  # |y_w| = 64, |y_l| = 40
    shorter = losses("r_dpo", alpha=0.002)[0] - losses("sigmoid")[0]  # |y_w| = 20, |y_l| = 31
    assert longer < 0 < shorter


def test_ld_dpo_counts_tokens_beyond_the_shared_length_by_alpha() -> None:
    # The shared part of the longer response; of the shorter one it is the whole.
    shared = [(-40.0, -35.0, -42.0, -33.0), (-80.0, -90.0, -77.0, -101.5), (-7.5, -7.5, -7.5, -7.5)]
    extras = Extras(shared=Shared(*columns(shared)))
    expected = []
    for whole, part in zip(PAIRS, shared, strict=True):
        pw, pl, rw, rl = (p + 0.3 * (w - p) for w, p in zip(whole[:4], part, strict=True))
        expected.append(softened(0.1 * ((pw - pl) - (rw - rl) - 0.7)))
    assert losses("ld_dpo", alpha=0.3, extras=extras) == pytest.approx(expected, abs=1e-12)
    assert losses("ld_dpo", alpha=1.0, extras=extras) == pytest.approx(losses("sigmoid"), abs=1e-12)


def test_wpo_is_dpo_weighted_by_pair() -> None:
    weights = [0.25, 1.5, 0.01]
    expected = [
        weight * softened(0.1 * ((pw - pl) - (rw - rl) - 0.7))
        for weight, (pw, pl, rw, rl, _, _) in zip(weights, PAIRS, strict=True)
    ]
    assert losses("wpo", extras=Extras(weights=torch.tensor(weights).double())) == pytest.approx(expected, abs=1e-7)


def test_kto_pair_compares_each_response_with_the_divergence_on_the_other_kind() -> None:
    # log-ratios: chosen 2, -10.25, 0; rejected -5.5, 11.5, 0. A negative mean counts as 0.
    extras = Extras(ratios=Ratios(chosen=-2.75, rejected=2.0, running=9.0))
    expected = [
        (2 - logistic(0.1 * (chosen - 2.0)) - logistic(0.1 * (0.0 - rejected))) / 2
        for chosen, rejected in ((2.0, -5.5), (-10.25, 11.5), (0.0, 0.0))
    ]
    assert losses("kto_pair", extras=extras) == pytest.approx(expected, abs=1e-12)


def test_bco_pair_classifies_rewards_around_their_running_mean() -> None:
    extras = Extras(ratios=Ratios(chosen=5.0, rejected=6.0, running=-1.5))
    expected = [
        log1pexp(-(0.1 * chosen + 0.15)) + log1pexp(0.1 * rejected + 0.15)
        for chosen, rejected in ((2.0, -5.5), (-10.25, 11.5), (0.0, 0.0))
    ]
    assert losses("bco_pair", extras=extras) == pytest.approx(expected, abs=1e-12)


def test_sppo_hard_draws_each_log_ratio_to_its_side() -> None:
    expected = [(2 - 5) ** 2 + (-5.5 + 5) ** 2, (-10.25 - 5) ** 2 + (11.5 + 5) ** 2, 50.0]
    assert losses("sppo_hard") == pytest.approx(expected, abs=1e-9)


def test_nca_pair_also_holds_the_chosen_reward_down() -> None:
    expected = [
        log1pexp(-0.1 * chosen) + 0.5 * log1pexp(0.1 * chosen) + 0.5 * log1pexp(0.1 * rejected)
        for chosen, rejected in ((2.0, -5.5), (-10.25, 11.5), (0.0, 0.0))
    ]
    assert losses("nca_pair") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "name", ["aipo", "alpha_dpo", "sigmoid", "nll_loss", "robust", "sigmoid_norm", "r_dpo", "ld_dpo", "wpo"]
)
def test_a_pair_on_which_policy_and_reference_agree_costs_ln_2(name: str) -> None:
    settings = {"alpha": 0.0, "lambda_": 0.0, "gamma": 0.0, "label_smoothing": 0.0}
    assert losses(name, extras=EXTRAS, **settings)[2] == pytest.approx(math.log(2), abs=1e-15)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_margins_give_finite_losses_and_gradients(name: str) -> None:
    chosen = torch.tensor([-1e4, -1.0], requires_grad=True)
    rejected = torch.tensor([-1.0, -1e4], requires_grad=True)
    lengths, weights = torch.tensor([5, 5]), torch.tensor([1e-30, 1e8])
    extras = Extras(Shared(chosen, rejected, rejected.detach(), chosen.detach()), weights, Ratios(1e4, -1e4, 1e4))
    result = objective(name)(
        chosen, rejected, rejected.detach(), chosen.detach(), lengths, lengths, **SETTINGS, extras=extras
    )
    gradients = torch.autograd.grad(result.sum(), (chosen, rejected))
    assert result.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    assert name == "hinge" or any(bool((gradient != 0).any()) for gradient in gradients)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_table_tells_what_a_formula_reads(name: str) -> None:
    line, found = objective(name), losses(name, extras=EXTRAS)
    for setting, other in {"alpha": 0.01, "lambda_": 0.2, "gamma": 0.3, "label_smoothing": 0.05}.items():
        changed = losses(name, extras=EXTRAS, **{setting: other}) != found
        assert changed == (setting in line.uses), setting
    for extra in ("shared", "weights", "ratios"):
        without = replace(EXTRAS, **{extra: None})
        if extra in line.needs:
            with pytest.raises(TypeError, match=f"{name} needs extras: {extra}"):
                losses(name, extras=without)
        else:
            assert losses(name, extras=without) == found


def test_what_is_logged_as_regularization_is_what_the_setting_adds() -> None:
    batch = Batch(*columns(PAIRS), **SETTINGS)
    assert margins.alpha_term(batch).tolist() == pytest.approx([-0.1 * 0.09 * (r[2] - r[3]) for r in PAIRS], abs=1e-12)
    assert margins.likelihood_term(batch).tolist() == pytest.approx(
        [0.5 * 2.0, 0.5 * 130.25 / 64, 0.5 * 2.5], abs=1e-12
    )
    assert margins.length_term(batch).tolist() == pytest.approx([0.09 * -11, 0.09 * 24, 0.0], abs=1e-12)


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


@pytest.fixture(scope="module")
def trl_batch(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from TRL's settings to its loss on four pairs, and the same pairs as our columns and extras."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM

    from aipo_hpc.chat import load_tokenizer, prompt_ids, response_ids
    from aipo_hpc.logps import collate, response_logps

    folder = tmp_path_factory.mktemp("trl")
    policy: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder(folder / "policy", seed=1)).eval()
    ref: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder(folder / "reference", seed=2)).eval()
    tokenizer = load_tokenizer(str(folder / "policy"))
    rows = [
        Ids(
            prompt_ids(tokenizer, one.messages),
            response_ids(tokenizer, one.chosen.response, "stop"),
            response_ids(tokenizer, one.rejected.response, "stop"),
        )
        for one in map(pair, range(4))
    ]
    table = [
        {"prompt": tokenizer.decode(row.prompt_ids), "chosen": one.chosen.response, "rejected": one.rejected.response}
        for row, one in zip(rows, map(pair, range(4)), strict=True)
    ]

    def theirs(**settings: Any) -> float:
        trainer = trl.DPOTrainer(
            model=policy,
            ref_model=ref,
            args=trl.DPOConfig(
                output_dir=str(folder / "out"),
                use_cpu=True,
                bf16=False,
                report_to="none",
                per_device_train_batch_size=4,
                gradient_checkpointing=False,
                max_length=None,
                **settings,
            ),
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(table),
        )
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["input_ids"].shape == collate(rows)["input_ids"].shape
        with torch.no_grad():
            return float(trainer.compute_loss(policy.eval(), batch))

    batch = collate(rows)
    with torch.no_grad():
        ours, reference = response_logps(policy, batch, weights=True), response_logps(ref, batch)
    shared = Shared(ours.chosen_shared, ours.rejected_shared, reference.chosen_shared, reference.rejected_shared)
    lengths = batch["lengths"].chunk(2)
    sums = (ours.chosen, ours.rejected, reference.chosen, reference.rejected)
    return theirs, (*sums, *lengths), Extras(shared, ours.weights, Ratios())


@dataclass(frozen=True)
class Ids:
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("sigmoid", {}, {"loss_type": ["sigmoid"]}),
        ("aipo", {}, {"loss_type": ["sigmoid"]}),
        ("hinge", {}, {"loss_type": ["hinge"]}),
        ("robust", {"label_smoothing": 0.2}, {"loss_type": ["robust"], "label_smoothing": 0.2}),
        ("sppo_hard", {}, {"loss_type": ["sppo_hard"]}),
        ("nca_pair", {}, {"loss_type": ["nca_pair"]}),
        # TRL's has no shift, which ours has not either before the first step.
        ("bco_pair", {}, {"loss_type": ["bco_pair"]}),
        ("sigmoid_norm", {}, {"loss_type": ["sigmoid_norm"]}),
        ("ld_dpo", {"alpha": 0.4}, {"loss_type": ["sigmoid"], "ld_alpha": 0.4}),
        ("wpo", {}, {"loss_type": ["sigmoid"], "use_weighting": True}),
    ],
)
def test_trls_loss_on_the_same_models_and_pairs_is_ours(
    trl_batch: Any, monkeypatch: pytest.MonkeyPatch, name: str, ours: dict[str, float], theirs: dict[str, Any]
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    trl_loss, tensors, extras = trl_batch
    settings = {"beta": 0.1, "alpha": 0.0, "lambda_": 0.0, "gamma": 0.0, "label_smoothing": 0.0, **ours}
    mine = float(objective(name)(*tensors, **settings, extras=extras).mean())
    other = trl_loss(beta=0.1, **theirs)
    print(f"{name}: ours {mine:.7f}, TRL's {other:.7f}")
    assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_trls_ipo_is_per_token_and_ours_is_of_sums_as_in_the_paper(trl_batch: Any) -> None:
    trl_loss, tensors, _ = trl_batch
    pw, pl, rw, rl, lw, ll = tensors
    per_token = (((pw - rw) / lw - (pl - rl) / ll - 5) ** 2).mean()
    # TRL counts the mask before it is shifted, which is the same number of tokens.
    assert trl_loss(beta=0.1, loss_type=["ipo"]) == pytest.approx(float(per_token), rel=1e-5)
    settings = {"beta": 0.1, "alpha": 0.0, "lambda_": 0.0, "gamma": 0.0, "label_smoothing": 0.0}
    assert float(objective("ipo")(*tensors, **settings).mean()) != pytest.approx(float(per_token), rel=0.1)
