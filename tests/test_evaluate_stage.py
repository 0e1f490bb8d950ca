"""The evaluate stage: two answers to each held-out prompt, judged, and what is made of the verdicts."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pairrm_checkpoint import Checkpoint

from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.length_control import length_controlled
from aipo_hpc.rankers import from_texts
from aipo_hpc.rankers.pairrm import PairRM
from aipo_hpc.rows import Candidate, Message, Responses, Verdict, read_rows, write_rows
from aipo_hpc.stages import evaluate
from aipo_hpc.stages.evaluate import EvaluateConfig
from aipo_hpc.task import Input, Outcome, Task

CONFIG = EvaluateConfig(ranker="pairrm")


def answer(number: int, text: str | None) -> Responses:
    """An answer to prompt ``number``; None: there is none."""
    prompt = f"Question {number}: why does water boil?"
    candidates = [] if text is None else [Candidate(text, "stop", len(text))]
    return Responses(
        f"p{number}", prompt, [Message("user", prompt)], candidates, "prompt too long" if text is None else None
    )


def task(folder: Path, mine: Sequence[str | None], theirs: Sequence[str | None], judge: Path) -> Task:
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in (("answers", mine), ("baseline", theirs)):
        write_rows(folder / f"{name}.parquet", [answer(*each) for each in enumerate(texts)], Responses)
    (folder / "out").mkdir()
    inputs = {name: Input(shards={0: (folder / f"{name}.parquet",)}) for name in ("answers", "baseline")}
    return Task("iter-00/evaluate", 0, 0, 1, 7, {**inputs, "ranker": Input(value=str(judge))}, folder / "out")


def verdicts(job: Task) -> list[Verdict]:
    return list(read_rows([job.out / evaluate.VERDICTS], Verdict))


def evaluated(
    folder: Path, mine: Sequence[str | None], theirs: Sequence[str | None], judge: Path
) -> tuple[Outcome, list[Verdict]]:
    job = task(folder, mine, theirs, judge)
    return evaluate.run(CONFIG, job), verdicts(job)


def verdict(win: float, length: int = 4, baseline_length: int = 6) -> Verdict:
    return Verdict("p", "why", "mine", "theirs", win - 0.5, win, length, baseline_length)


def test_win_rate_and_its_standard_error_are_the_mean_over_prompts_and_the_mean_s():
    found = evaluate.summarize([verdict(1.0, 2), verdict(1.0, 4), verdict(0.5, 6, 3), verdict(0.0, 8, 9)])
    # wins 1, 1, 1/2, 0: mean 0.625, variance (2 * 0.375^2 + 0.125^2 + 0.625^2) / 3
    error = math.sqrt((2 * 0.375**2 + 0.125**2 + 0.625**2) / 3) / 2
    fit = length_controlled([1.0, 1.0, 0.5, 0.0], [-4, -2, 3, -1])
    assert fit is not None
    assert found == {
        "win_rate": 0.625,
        "win_rate_se": pytest.approx(error),
        "length_controlled_win_rate": pytest.approx(fit.win_rate),
        "length_controlled_win_rate_se": pytest.approx(fit.standard_error),
        "length_slope": pytest.approx(fit.slope),
        "wins": 2,
        "ties": 1,
        "losses": 1,
        "mean_length": 5.0,
        "baseline_mean_length": 6.0,
    }
    print(f"wins 1, 1, 1/2, 0: win rate 0.625 ± {error:.4f}")


def test_one_verdict_has_no_standard_error():
    assert "win_rate_se" not in evaluate.summarize([verdict(1.0)])


def test_without_a_loss_nothing_tells_what_length_did_and_no_figure_is_given():
    found = evaluate.summarize([verdict(1.0, 2), verdict(1.0, 4), verdict(1.0, 6, 3), verdict(1.0, 8, 9)])
    assert found["win_rate"] == 1.0 and not [name for name in found if name.startswith("length_")]


@pytest.mark.parametrize(
    ("mine", "theirs", "scores", "win"),
    [
        ("a", "b", (0.2, -0.2), 1.0),
        ("a", "b", (-0.2, 0.2), 0.0),
        ("a", "b", (0.2, 0.2), 0.5),
        ("same", "same", (0.3, -0.3), 0.5),  # the ranker's favour for a place decides nothing
    ],
)
def test_the_higher_score_wins_and_a_tie_counts_half(mine, theirs, scores, win):
    found = evaluate.judge(answer(0, mine), mine, theirs, scores)
    assert (found.win, found.margin) == (win, scores[0] - scores[1])
    assert (found.length, found.baseline_length) == (len(mine), len(theirs))


def test_verdicts_follow_the_ranker_whichever_policy_gave_the_answer(ranker_checkpoint: Checkpoint, tmp_path):
    mine = ["It is hot.", "no", "The pressure is lower on a mountain.", "same"]
    theirs = ["I do not know", "Because of the pressure of the air.", "0 1 2", "same"]
    outcome, found = evaluated(tmp_path / "one", mine, theirs, ranker_checkpoint.pairrm)
    swapped, other = evaluated(tmp_path / "other", theirs, mine, ranker_checkpoint.pairrm)
    ranker = PairRM.load(str(ranker_checkpoint.pairrm))
    prompts = [answer(number, "").prompt for number in range(4)]
    expected = ranker.rank(from_texts(prompts, list(zip(mine, theirs, strict=True))))
    assert [row.margin for row in found] == pytest.approx([each.scores[0] - each.scores[1] for each in expected])
    assert [row.win for row in found] == [float(row.margin > 0) for row in found[:3]] + [0.5]
    assert [row.win + back.win for row, back in zip(found, other, strict=True)] == [1.0] * 4
    assert outcome.counts["win_rate"] + swapped.counts["win_rate"] == pytest.approx(1.0)
    assert [(row.response, row.baseline_response) for row in found] == list(zip(mine, theirs, strict=True))
    assert outcome.counts == json.loads((tmp_path / "one" / "out" / evaluate.METRICS).read_text())


def test_only_prompts_that_both_policies_answered_are_judged_and_the_others_are_counted(ranker_checkpoint, tmp_path):
    outcome, found = evaluated(
        tmp_path, ["yes", None, "maybe", "so"], ["no", "no", None, "why"], ranker_checkpoint.pairrm
    )
    assert [row.prompt_id for row in found] == ["p0", "p3"]
    assert (outcome.rows, outcome.counts["not_judged"]) == (2, 2)


def test_without_a_single_common_answer_the_error_tells_the_first_reasons(ranker_checkpoint, tmp_path):
    with pytest.raises(DataError, match=r"iter-00/evaluate: no held-out prompt was answered by both .*prompt too long"):
        evaluated(tmp_path, ["yes", None], [None, "no"], ranker_checkpoint.pairrm)


def test_a_ranker_that_can_compare_nothing_is_an_error_with_its_own_words(ranker_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(PairRM, "_logits", lambda self, rows, positions: torch.full((len(rows),), float("nan")))
    with pytest.raises(DataError, match=r"iter-00/evaluate: the ranker could not compare .*finite"):
        evaluated(tmp_path, ["yes"], ["no"], ranker_checkpoint.pairrm)


def test_an_unknown_judge_is_refused(ranker_checkpoint, tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'pairrm'"):
        evaluate.run(EvaluateConfig(ranker="pair-rm"), task(tmp_path, ["yes"], ["no"], ranker_checkpoint.pairrm))
