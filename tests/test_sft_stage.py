"""Supervised fine-tuning: what is learnt of a conversation, what packs change (nothing), and what a kill costs."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model_folder
from training_tasks import (
    identical,
    killed_and_resumed,
    largest_difference,
    launch,
    logs,
    metrics,
    sft_task,
    text,
    weights,
)

from aipo_hpc.chat import load_tokenizer, prompt_ids, response_ids
from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.rows import Conversation, Message, write_rows
from aipo_hpc.stages.sft import IGNORED, SftConfig, run, sequences
from aipo_hpc.task import ADVANCED

pytest.importorskip("trl")
PLAIN: dict[str, Any] = {
    "dtype": "float32",
    "zero_stage": 0,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "max_length": 64,
    "global_batch_size": 4,
    "per_device_train_batch_size": 2,
}


def conversation(index: int) -> Conversation:
    """One or two exchanges of short texts."""
    turns = [Message("user", text(index, 3 + index % 4)), Message("assistant", text(index + 50, 2 + index % 5))]
    if index % 3 == 0:
        turns += [Message("user", text(index + 9, 3)), Message("assistant", text(index + 70, 4))]
    return Conversation(f"c{index}", turns)


CONVERSATIONS = [conversation(index) for index in range(24)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "conversations.parquet"
    write_rows(path, CONVERSATIONS, Conversation)
    return path


def mean_nll(model: Path, rows: Sequence[dict[str, list[int]]]) -> float:
    """Mean over the learnt tokens of all sequences, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    policy: Any = AutoModelForCausalLM.from_pretrained(model)
    total, tokens = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with torch.no_grad():
            table = policy(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        learnt = labels != IGNORED
        total -= float(table[learnt, labels[learnt]].sum())
        tokens += int(learnt.sum())
    return total / tokens


def test_only_what_the_assistant_says_is_learnt_and_exactly_as_generation_sees_it(model: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    turns = CONVERSATIONS[0].messages
    (row,) = sequences(tokenizer, turns, SftConfig())
    first = prompt_ids(tokenizer, turns[:1]) + response_ids(tokenizer, turns[1].content, "stop")
    asked = prompt_ids(tokenizer, turns[:3])
    answer = response_ids(tokenizer, turns[3].content, "stop")
    assert row["input_ids"] == asked + answer and row["input_ids"][: len(first)] == first
    learnt = [label for label in row["labels"] if label != IGNORED]
    assert learnt == response_ids(tokenizer, turns[1].content, "stop") + answer
    assert [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED] == learnt
    (whole,) = sequences(tokenizer, turns, SftConfig(assistant_only_loss=False))
    assert whole["labels"] == whole["input_ids"] == row["input_ids"]
    (short,) = sequences(tokenizer, turns, SftConfig(max_length=len(first)))
    assert short["input_ids"] == first


def test_a_template_that_rewrites_earlier_turns_gives_each_turn_a_sequence_of_its_own(model: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    tokenizer.chat_template = (
        "{% for message in messages[-1:] %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    turns = CONVERSATIONS[0].messages
    found = list(sequences(tokenizer, turns, SftConfig()))
    assert [row["input_ids"] for row in found] == [
        prompt_ids(tokenizer, turns[:k]) + response_ids(tokenizer, turns[k].content, "stop") for k in (1, 3)
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_that_of_each_sequence_alone_packed_or_not(
    tmp_path: Path, rows: Path, model: Path, packing: bool
) -> None:
    config = SftConfig(
        **{**PLAIN, "learning_rate": 1e-12, "global_batch_size": 24, "per_device_train_batch_size": 2}, packing=packing
    )
    task = sft_task(tmp_path / "out", rows, model)
    outcome = run(config, task)
    tokenizer = load_tokenizer(str(model))
    found = [row for each in CONVERSATIONS for row in sequences(tokenizer, each.messages, config)]
    assert outcome.counts["sequences"] == 24 and outcome.counts["steps"] == 1
    assert (outcome.counts["packs"] < 24) == packing
    (line,) = metrics(task.out)
    expected = mean_nll(model, found)
    print(f"logged {line['loss']:.6f}, sequence by sequence {expected:.6f}, {outcome.counts['packs']} packs")
    assert line["loss"] == pytest.approx(expected, rel=1e-4)


def test_training_learns_and_writes_a_model_for_the_next_stage(tmp_path: Path, rows: Path, model: Path) -> None:
    task = sft_task(tmp_path / "out", rows, model)
    outcome = run(SftConfig(**PLAIN, num_train_epochs=3.0, report_to="none"), task)
    assert set(outcome.outputs) == {
        path.relative_to(task.out).as_posix()
        for path in task.out.rglob("*")
        if path.is_file() and path.name != ADVANCED
    }
    assert outcome.rows == 24 and outcome.counts["loss_last"] < outcome.counts["loss_first"] - 0.5
    load_tokenizer(str(task.out / "model"))
    assert json.loads((task.out / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert set(weights(model)) == set(weights(task.out / "model"))


def test_kill_9_and_resume_give_the_weights_of_an_undisturbed_run(tmp_path: Path, rows: Path, model: Path) -> None:
    config = {**PLAIN, "save_steps": 1, "num_train_epochs": 2.0, "per_device_train_batch_size": 1}
    whole, resumed = killed_and_resumed(sft_task, tmp_path, rows, model, **config)
    assert identical(whole / "model", resumed / "model")
    assert [line["loss"] for line in metrics(whole)] == [line["loss"] for line in metrics(resumed)]


def test_two_processes_under_zero_2_train_as_one_without(tmp_path: Path, rows: Path, model: Path) -> None:
    pytest.importorskip("deepspeed")
    one, two = sft_task(tmp_path / "one", rows, model), sft_task(tmp_path / "two", rows, model)
    run(SftConfig(**PLAIN, packing=False), one)
    assert launch(two, num_processes=2, **{**PLAIN, "packing": False, "zero_stage": 2}) == [0, 0], logs(two)
    first, same = metrics(one.out), metrics(two.out)
    assert len(first) == len(same) == 6
    assert [line["loss"] for line in same] == pytest.approx([line["loss"] for line in first], rel=1e-4)
    assert largest_difference(one.out / "model", two.out / "model") < 1e-4


def test_adapters_work_here_too(tmp_path: Path, rows: Path, model: Path) -> None:
    pytest.importorskip("peft")
    task = sft_task(tmp_path / "out", rows, model)
    outcome = run(replace(SftConfig(**PLAIN), lora_r=4), task)
    assert "adapter/adapter_model.safetensors" in outcome.outputs
    assert not identical(model, task.out / "model")


def test_conversations_that_hold_nothing_to_learn_are_an_error_of_the_data(tmp_path: Path, model: Path) -> None:
    write_rows(
        tmp_path / "long.parquet",
        [Conversation("c", [Message("user", text(1, 90)), Message("assistant", "a")])],
        Conversation,
    )
    with pytest.raises(DataError, match=r"1 conversations hold nothing to learn within sft.max_length=64"):
        run(SftConfig(**PLAIN), sft_task(tmp_path / "out", tmp_path / "long.parquet", model))
    with pytest.raises(RecipeError, match=r"sft.max_length=1 must be 2 or more"):
        SftConfig(max_length=1)
