"""Supervised fine-tuning on conversations: rows.Conversation -> a model folder. TRL's SFTTrainer on our token ids.

    in    conversations   conversations.parquet
          policy          the model to start from
    out   model/..., metrics.jsonl and what else ``training`` writes

An assistant's turn is put to the model as generation would put it: prompt and response become ids as in ``chat``, and
later turns join the same sequence as long as the chat template continues it; where it does not (some templates rewrite
earlier turns), a turn starts a sequence of its own. The trainer packs sequences; tokens do not see other sequences.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aipo_hpc import fine_tuning
from aipo_hpc.errors import DataError
from aipo_hpc.rows import Conversation, Message, read_rows
from aipo_hpc.settings import memory_bound
from aipo_hpc.task import Outcome, Place, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not learnt."""


@dataclass(frozen=True)
class SftConfig(fine_tuning.FineTuningConfig):
    """Settings of supervised fine-tuning, which is done if ``conversations.source`` is set."""

    stage = "sft"

    learning_rate: float = 2e-5
    """Peak learning rate of AdamW."""
    global_batch_size: int = 64
    """Sequences (with packing: packs) per optimizer step, over all processes and accumulated micro-batches."""
    per_device_train_batch_size: int = memory_bound(2, divides=True)
    """Of these, per process and forward pass; must divide the global batch size together with the number of processes."""
    max_length: int = 2048
    """Longest sequence, and size of a pack, in tokens; what is longer is cut at its end."""
    packing: bool = True
    """Put several sequences into one of ``max_length`` tokens."""
    assistant_only_loss: bool = True
    """Learn what the assistant says; otherwise every token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(("max_length", self.max_length, self.max_length > 1, "2 or more"))


def run(config: SftConfig, task: Task) -> Outcome:
    """Train, write the model, and return what there is to know about it; on ranks other than 0 an empty outcome.

    Raises RecipeError if the batch sizes do not fit or the loss stops being a number, DataError if nothing can be learnt.
    """
    from aipo_hpc import training

    with training.together(config) as place:
        return _train(config, task, place)


def _train(config: SftConfig, task: Task, place: Place) -> Outcome:
    import datasets
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_config import SFTConfig

    from aipo_hpc import metrics_file, sft_trainer, training
    from aipo_hpc.chat import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(task.inputs["policy"].model)
    conversations = list(read_rows(task.inputs["conversations"].files, Conversation))
    rows = [row for each in conversations for row in sequences(tokenizer, each.messages, config)]
    learnt = [row for row in rows if any(label != IGNORED for label in row["labels"])]
    if not learnt:
        raise DataError(
            f"{task.job}: {len(conversations)} conversations hold nothing to learn within sft.max_length="
            f"{config.max_length} tokens. Raise it, or look at the conversations."
        )
    table = datasets.Dataset.from_list(learnt)
    if config.packing:
        table = pack_dataset(table, config.max_length, "bfd")
    num_steps = max(1, math.ceil(math.ceil(len(table) / config.global_batch_size) * config.num_train_epochs))
    shape = {"world_size": place.world_size, "zero_stage": config.zero_stage, "num_steps": num_steps}
    resume = training.resume_from(task, place, shape)

    # The arguments come first: they switch on ZeRO-3's sharded loading.
    arguments = training.arguments(
        SFTConfig,
        config,
        task,
        place,
        num_steps,
        max_steps=num_steps,
        max_length=None,
        padding_free=config.packing,
        packing=False,  # done above: the number of steps depends on it
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = sft_trainer.ConversationTrainer(
        model=training.load_policy(config, task.inputs["policy"].model, arguments.seed),
        args=arguments,
        train_dataset=table,
        processing_class=tokenizer,
        metrics_path=task.out / metrics_file.METRICS,
    )
    written = training.train_and_write(config, task, trainer, tokenizer, shape, resume)
    if place.rank != 0:
        return Outcome(0, ())
    first, last = trainer.metrics[0], trainer.metrics[-1]
    counts = {
        "conversations": len(conversations),
        "sequences": len(learnt),
        "dropped_nothing_to_learn": len(rows) - len(learnt),
        "tokens": sum(len(row["input_ids"]) for row in learnt),
        "tokens_learnt": sum(label != IGNORED for row in learnt for label in row["labels"]),
        "packs": len(table),
        "steps": num_steps,
        "world_size": place.world_size,
        "resumed_from_step": training.steps_done(resume),
        "loss_first": first["loss"],
        "loss_last": last["loss"],
    }
    return Outcome(len(conversations), written, counts)


def sequences(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], config: SftConfig
) -> Iterator[dict[str, list[int]]]:
    """A conversation as ``input_ids`` and ``labels``, cut to the longest length: one sequence, or several."""
    from aipo_hpc.chat import prompt_ids, response_ids

    ids: list[int] = []
    labels: list[int] = []
    for turn, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = prompt_ids(tokenizer, messages[:turn])
        response = response_ids(tokenizer, message.content, "stop")
        if prompt[: len(ids)] != ids:
            yield _cut(ids, labels, config)
            ids, labels = [], []
        asked = prompt[len(ids) :]
        labels = [*labels, *([IGNORED] * len(asked) if config.assistant_only_loss else asked), *response]
        ids = [*prompt, *response]
    yield _cut(ids, labels, config)


def _cut(ids: list[int], labels: list[int], config: SftConfig) -> dict[str, list[int]]:
    return {"input_ids": ids[: config.max_length], "labels": labels[: config.max_length]}
