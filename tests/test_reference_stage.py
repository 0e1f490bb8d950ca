"""The reference stage: pairs in, token ids and log-probabilities out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model_folder
from training_tasks import pair, reference_task, text

from aipo_hpc import logps
from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.rows import Candidate, Message, TrainRow, read_rows
from aipo_hpc.stages.reference import ReferenceConfig, run
from aipo_hpc.task import Task

CONFIG = ReferenceConfig(dtype="float32", tokens_per_batch=128)
PAIRS = [pair(index) for index in range(11)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")


def rows(task: Task) -> list[TrainRow]:
    return list(read_rows([task.out / "rows.parquet"], TrainRow))


def test_rows_come_in_the_order_of_the_pairs_with_the_models_own_log_probabilities(tmp_path: Path, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    task = reference_task(tmp_path / "a", PAIRS, model)
    outcome = run(CONFIG, task)
    found = rows(task)
    assert [row.prompt_id for row in found] == [one.prompt_id for one in PAIRS]
    assert outcome.outputs == ("rows.parquet",) and outcome.rows == 11
    tokens = sum(2 * len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in found)
    assert outcome.counts == {"pairs": 11, "tokens": tokens, "errors": 0}
    scorer: Any = AutoModelForCausalLM.from_pretrained(model)
    for row in found[:4]:
        for ids, scored in ((row.chosen_ids, row.ref_chosen_logps), (row.rejected_ids, row.ref_rejected_logps)):
            with torch.no_grad():
                table = scorer(input_ids=torch.tensor([row.prompt_ids + ids])).logits[0].double().log_softmax(-1)
            expected = sum(float(table[len(row.prompt_ids) + i - 1, token]) for i, token in enumerate(ids))
            assert scored == pytest.approx(expected, abs=1e-4)
        shorter = (
            row.ref_chosen_logps,
            row.ref_chosen_shared_logps,
            row.ref_rejected_logps,
            row.ref_rejected_shared_logps,
        )
        if len(row.chosen_ids) > len(row.rejected_ids):
            shorter = shorter[2:] + shorter[:2]
        assert shorter[0] == shorter[1] and shorter[3] >= shorter[2]


def test_the_size_of_a_batch_changes_no_value(tmp_path: Path, model: Path) -> None:
    one, many = reference_task(tmp_path / "one", PAIRS, model), reference_task(tmp_path / "many", PAIRS, model)
    run(ReferenceConfig(dtype="float32", tokens_per_batch=1), one)
    run(ReferenceConfig(dtype="float32", tokens_per_batch=100000), many)
    assert [row.ref_chosen_logps for row in rows(one)] == pytest.approx(
        [row.ref_chosen_logps for row in rows(many)], abs=1e-4
    )


def test_shards_divide_the_pairs_into_contiguous_parts(tmp_path: Path, model: Path) -> None:
    found: list[str] = []
    for shard in range(4):
        task = reference_task(tmp_path / str(shard), PAIRS, model, shard=shard, num_shards=4)
        run(CONFIG, task)
        found += [row.prompt_id for row in rows(task)]
    assert found == [one.prompt_id for one in PAIRS]


def test_a_shard_without_pairs_writes_an_empty_file(tmp_path: Path, model: Path) -> None:
    task = reference_task(tmp_path / "a", PAIRS[:2], model, shard=0, num_shards=5)
    outcome = run(CONFIG, task)
    assert rows(task) == []
    assert outcome.counts == {"pairs": 0, "tokens": 0, "errors": 0}


def test_two_models_give_two_values(tmp_path: Path, model: Path) -> None:
    other = tiny_model_folder(tmp_path / "other", seed=5)
    first, second = reference_task(tmp_path / "a", PAIRS, model), reference_task(tmp_path / "b", PAIRS, other)
    run(CONFIG, first)
    run(CONFIG, second)
    for one, two in zip(rows(first), rows(second), strict=True):
        assert one.chosen_ids == two.chosen_ids
        assert abs(one.ref_chosen_logps - two.ref_chosen_logps) > 0.01


def test_another_reference_scores_what_the_policys_tokenizer_makes(tmp_path: Path, model: Path) -> None:
    """The policy's template and its end of sequence, the other model's likelihood."""
    other = tiny_model_folder(tmp_path / "other", seed=5)
    (other / "chat_template.jinja").unlink()
    own, task = reference_task(tmp_path / "a", PAIRS, model), reference_task(tmp_path / "b", PAIRS, other)
    task = replace(task, inputs={**task.inputs, "policy": own.inputs["policy"]})
    run(CONFIG, own)
    run(CONFIG, task)
    for mine, theirs in zip(rows(own), rows(task), strict=True):
        assert (mine.prompt_ids, mine.chosen_ids) == (theirs.prompt_ids, theirs.chosen_ids)
        assert abs(mine.ref_chosen_logps - theirs.ref_chosen_logps) > 0.01


def test_a_reference_of_other_tokens_is_refused(tmp_path: Path, model: Path) -> None:
    other = tiny_model_folder(tmp_path / "other", seed=5)
    settings = json.loads((other / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["dog"], vocabulary["the"] = vocabulary.get("the", 300), vocabulary.get("dog", 301)
    (other / "tokenizer.json").write_text(json.dumps(settings))
    task = reference_task(tmp_path / "a", PAIRS, other)
    task = replace(
        task, inputs={**task.inputs, "policy": reference_task(tmp_path / "b", PAIRS, model).inputs["policy"]}
    )
    with pytest.raises(
        DataError, match=r"has other tokens than the policy .* Set reference.model to previous, initial"
    ):
        run(CONFIG, task)


def test_a_tokenizer_that_adds_bos_gives_exactly_one(tmp_path: Path) -> None:
    task = reference_task(tmp_path / "a", PAIRS[:3], tiny_model_folder(tmp_path / "llama-like", adds_bos=True))
    run(CONFIG, task)
    for row in rows(task):
        assert row.prompt_ids[0] == 1
        assert [*row.prompt_ids, *row.chosen_ids, *row.rejected_ids].count(1) == 1


def test_the_end_of_sequence_belongs_to_a_response_only_if_the_model_ended_it(tmp_path: Path, model: Path) -> None:
    task = reference_task(tmp_path / "a", PAIRS, model)
    run(CONFIG, task)
    for one, row in zip(PAIRS, rows(task), strict=True):
        assert (row.chosen_ids[-1] == 2) == (one.chosen.finish_reason == "stop")
        assert (row.rejected_ids[-1] == 2) == (one.rejected.finish_reason == "stop")
    assert {one.rejected.finish_reason for one in PAIRS} == {"stop", "length"}


def test_log_probabilities_of_a_bfloat16_model_are_not_rounded_to_bfloat16(tmp_path: Path, model: Path) -> None:
    task = reference_task(tmp_path / "a", PAIRS, model)
    run(ReferenceConfig(dtype="bfloat16"), task)
    values = torch.tensor([row.ref_chosen_logps for row in rows(task)], dtype=torch.float64)
    assert (values.bfloat16().double() != values).any()


def test_a_pair_that_cannot_be_scored_is_a_row_with_an_error(tmp_path: Path, model: Path) -> None:
    silent = pair(3, chosen=Candidate("", "length", 0))
    endless = pair(5, messages=[Message("user", text(1, 600))])
    task = reference_task(tmp_path / "a", [*PAIRS[:3], silent, PAIRS[4], endless, PAIRS[6]], model)
    outcome = run(CONFIG, task)
    errors = {row.prompt_id: row.error for row in rows(task)}
    assert list(errors) == ["p0", "p1", "p2", "p3", "p4", "p5", "p6"]
    assert outcome.counts["errors"] == 2 and outcome.counts["pairs"] == 5
    told = {prompt_id: error for prompt_id, error in errors.items() if error is not None}
    assert told == {"p3": "chosen has no tokens", "p5": told["p5"]}
    assert "more than the model's 512" in told["p5"]


def test_a_shard_in_which_nothing_can_be_scored_fails(tmp_path: Path, model: Path) -> None:
    silent = [pair(index, rejected=Candidate("", "length", 0)) for index in range(3)]
    with pytest.raises(DataError, match=r"none of the 3 pairs .* rejected has no tokens"):
        run(CONFIG, reference_task(tmp_path / "a", silent, model))


def test_two_pairs_of_one_prompt_are_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(DataError, match="more than one pair"):
        run(CONFIG, reference_task(tmp_path / "a", [PAIRS[0], PAIRS[0]], model))


def test_an_interrupted_attempt_is_continued_to_the_same_bytes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = reference_task(tmp_path / "whole", PAIRS, model)
    run(CONFIG, undisturbed)

    calls = 0
    score = logps.response_logps

    def dies(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return score(*args)

    first = reference_task(tmp_path / "first", PAIRS, model)
    with monkeypatch.context() as patch:
        patch.setattr(logps, "response_logps", dies)
        with pytest.raises(KeyboardInterrupt):
            run(CONFIG, first)
    with (first.out / "progress.jsonl").open("a") as torn:
        torn.write('{"prompt_id": "p')
    second = reference_task(tmp_path / "second", PAIRS, model, earlier=(first.out,))
    calls = -1000
    with monkeypatch.context() as patch:
        patch.setattr(logps, "response_logps", dies)
        run(CONFIG, second)
    assert (second.out / "rows.parquet").read_bytes() == (undisturbed.out / "rows.parquet").read_bytes()
    whole = reference_task(tmp_path / "third", PAIRS, model, earlier=(second.out,))
    with monkeypatch.context() as patch:
        patch.setattr(logps, "response_logps", None)  # everything is there: no forward at all
        run(CONFIG, whole)
    assert 0 < calls + 1000 < 6


def test_a_batch_that_does_not_fit_into_memory_is_halved(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = logps.response_logps

    def small_gpu(model: Any, batch: dict[str, torch.Tensor]) -> Any:
        if len(batch["input_ids"]) > 4 or batch["input_ids"].shape[1] > 40:
            raise torch.OutOfMemoryError("out of memory")
        return score(model, batch)

    monkeypatch.setattr(logps, "response_logps", small_gpu)
    huge = pair(1, messages=[Message("user", text(1, 60))])
    task = reference_task(tmp_path / "a", [PAIRS[0], huge, *PAIRS[2:]], model)
    outcome = run(ReferenceConfig(dtype="float32", tokens_per_batch=10000), task)
    assert outcome.counts["pairs"] == 10 and outcome.counts["errors"] == 1
    assert "do not fit into memory" in str(rows(task)[1].error)


def test_a_missing_model_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        run(CONFIG, reference_task(tmp_path / "a", PAIRS, tmp_path / "nowhere"))


@pytest.mark.parametrize("wrong", [{"dtype": "float16"}, {"num_shards": 0}, {"tokens_per_batch": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        ReferenceConfig(**wrong)
