"""A whole run that starts with supervised fine-tuning, trains adapters, and keeps the fine-tuned model as the reference."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from aipo_hpc.launch import launch
from aipo_hpc.recipe import Recipe
from aipo_hpc.stages.sft import SftConfig

pytest.importorskip("trl")
pytest.importorskip("peft")


def test_sft_makes_iteration_0_and_adapters_are_trained_from_it(tmp_path: Path, small_recipe: Recipe) -> None:
    chats = tmp_path / "chats.jsonl"
    prompts = [json.loads(line)["prompt"] for line in Path(small_recipe.prompts).read_text().splitlines()[:16]]
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "I do not know."}]}
        for prompt in prompts
    ]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = launch(
        replace(
            small_recipe,
            iterations=2,
            conversations=replace(small_recipe.conversations, source=str(chats)),
            sft=SftConfig(
                learning_rate=1e-3,
                global_batch_size=4,
                per_device_train_batch_size=2,
                max_length=256,
                dtype="float32",
                zero_stage=0,
                gradient_checkpointing=False,
                resources=small_recipe.train.resources,
            ),
            reference=replace(small_recipe.reference, model="initial"),
            train=replace(small_recipe.train, lora_r=4),
        )
    )
    for job in ("iter-00/sft", "iter-00/baseline", "iter-01/train", "iter-01/evaluate"):
        record = run.job(job).read_job()
        assert record is not None
        (sentinel, *_) = run.job(job).done(record["fingerprint"]).values()
        if job == "iter-01/train":
            names = {output.path for output in sentinel.outputs}
            assert {"model/config.json", "adapter/adapter_model.safetensors"} <= names
            # The policy has left the reference in the first iteration.
            assert sentinel.inputs["policy"]["job"] == "iter-00/train"
    reference = run.job("iter-01/reference").read_job()
    assert reference is not None and reference["inputs"]["reference"]["job"] == "iter-00/sft"
