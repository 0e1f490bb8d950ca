"""Any recipe in miniature: the same jobs and objectives with tiny models on few prompts, by its fields alone.

The policy's weights are random, but some of its tokens are whole lines of a judge, so that it can judge itself.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_models import tiny_model_folder, tiny_tokenizer_folder

from aipo_hpc.rankers.config import POLICY
from aipo_hpc.recipe import Recipe, load_recipe
from aipo_hpc.resources import Resources

ONE_CORE = Resources(cpus_per_task=1, time=30)
PROMPTS = 14
HELD_OUT = 4


def miniature_policy(folder: Path) -> Path:
    """A random chat model that says "Score: 3" and the like now and then."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_model_folder(folder, layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [f"\nScore: {points}\n" for points in range(6)]
    tokenizer.add_tokens(lines)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) <= model.config.vocab_size
    model.config.max_position_embeddings = 8192
    words = [number for token, number in tokenizer.get_vocab().items() if token.startswith("Ġ") and token[1:].isalpha()]
    rows = {"words": words, "lines": tokenizer.convert_tokens_to_ids(lines), "end": [tokenizer.eos_token_id]}
    with torch.no_grad():
        output = model.get_output_embeddings().weight
        random = output.clone()
        output.zero_()
        # Larger weights make a token very likely in some places and very unlikely in others.
        for kind, strength in (("words", 3), ("lines", 4), ("end", 3)):
            output[rows[kind]] = random[rows[kind]] * strength
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def miniature_reward_model(folder: Path) -> Path:
    """A random sequence classifier with one logit."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tiny_tokenizer_folder(folder, adds_bos=True)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        num_labels=1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def miniature_preferences(path: Path) -> Path:
    """Preference data as UltraFeedback has it."""
    rows = []
    for number in range(PROMPTS):
        question, texts = (
            f"what does dog {number} see",
            {"chosen": "one red fish", "rejected": "the moon " * (number + 1)},
        )
        asked = {"role": "user", "content": question}
        answers = {name: [asked, {"role": "assistant", "content": text}] for name, text in texts.items()}
        rows.append({"prompt_id": f"own-{number}", "prompt": question, **answers})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def miniature(recipe: Recipe, models: Path, run_dir: Path) -> Recipe:
    """The recipe with tiny models, few prompts, short answers and one core; what it is about stays."""
    demo = load_recipe("demo")
    rankers = {"pairrm": demo.rank.model_name_or_path, "reward_model": str(models / "reward_model")}

    def ranking(config: Any) -> Any:
        judged_by_itself = config.model_name_or_path in (POLICY, "")
        return replace(
            config,
            model_name_or_path=config.model_name_or_path if judged_by_itself else rankers[config.ranker],
            dtype="float32",
            tokens_per_batch=2048,
            judge=replace(config.judge, engine="transformers", dtype="float32", max_tokens=32),
            resources=ONE_CORE,
        )

    return replace(
        recipe,
        model_name_or_path=str(models / "policy"),
        prompts=demo.prompts,
        iterations=1,
        cluster="inline",
        run_dir=str(run_dir),
        poll_seconds=0.05,
        data=replace(recipe.data, limit=PROMPTS, num_held_out=HELD_OUT),
        preferences=replace(
            recipe.preferences,
            source=str(miniature_preferences(run_dir.with_suffix(".jsonl"))) if recipe.preferences.source else "",
        ),
        instruct=replace(
            recipe.instruct,
            engine="transformers",
            dtype="float32",
            num_prompts=min(recipe.instruct.num_prompts, PROMPTS - HELD_OUT),
            num_shards=1,
            num_seeds=min(recipe.instruct.num_seeds, 3),
            max_tokens=24,
            min_share=0.3,
            resources=ONE_CORE,
            collect_resources=ONE_CORE,
        ),
        generate=replace(
            recipe.generate, engine="transformers", dtype="float32", num_shards=1, max_tokens=10, resources=ONE_CORE
        ),
        rank=ranking(recipe.rank),
        pairs=replace(recipe.pairs, resources=ONE_CORE),
        reference=replace(recipe.reference, num_shards=1, dtype="float32", tokens_per_batch=4096, resources=ONE_CORE),
        train=replace(
            recipe.train,
            global_batch_size=4,
            per_device_train_batch_size=4,
            dtype="float32",
            gradient_checkpointing=False,
            zero_stage=0,
            resources=ONE_CORE,
        ),
        evaluate=replace(ranking(recipe.evaluate), num_shards=1),
    )
