"""A small, random but seeded PairRM checkpoint in the published format, with the base model that llm-blender asks for.

Built with transformers and plain JSON, not with the code under test. Two heads of 64, three layers: the smallest sizes
that every format and the inference from shapes have in common.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PREFIXES = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]

TEXT = """
A ranker reads a question and two answers and says which answer is better. It reads them together, so that every word of
one answer can be weighed against every word of the other. A good answer is correct, complete and short; a poor one
repeats the question, wanders off, or stops in the middle of a sentence. Water boils at one hundred degrees Celsius at
sea level, and at a lower temperature on a mountain, because the pressure of the air is lower there. To sort a list of
numbers, split it in two halves, sort each half, and merge the halves. Bread needs flour, water, salt, yeast and time.
Die Antwort ist größer als die Frage, und über den Flüssen wird es kühler. Où est la bibliothèque? À côté du café.
¿Cuántos años tienes? Mañana será otro día. Быстрая лиса прыгает через ленивую собаку. 今日は天気がいいので散歩します。
水在一百度时沸腾。Ελληνικά γράμματα και αριθμοί: 0 1 2 3 4 5 6 7 8 9. def f(x): return [x ** 2 for x in range(10)]
"""


@dataclass(frozen=True)
class Checkpoint:
    """Where the parts were written."""

    pairrm: Path
    """The published ``PairRM`` format: a ranker's settings, no encoder's."""
    hf: Path
    """The same tensors in the ``PairRM-hf`` format."""
    base: Path
    """The base model, half precision on disk like the published one."""


def build_tokenizer(vocab_size: int = 400) -> Tokenizer:
    """Train a Unigram vocabulary on the text above. NFKC stands for the published tokenizer's character map."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(left=False, right=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token="[UNK]", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def build_checkpoint(folder: Path, seed: int = 0, layers: int = 3, hidden: int = 128) -> Checkpoint:
    """Write the three folders below ``folder``; the same seed gives the same tensors."""
    from transformers import DebertaV2Config, DebertaV2Model

    where = Checkpoint(folder / "PairRM", folder / "PairRM-hf", folder / "base")
    tokenizer = build_tokenizer()
    size_of_base = tokenizer.get_vocab_size()
    tokenizer.add_tokens(PREFIXES)
    ids = [tokenizer.token_to_id(token) for token in PREFIXES]
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 2 * hidden,
        "position_buckets": 256,
        "relative_attention": True,
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
        "max_position_embeddings": 512,
        "max_relative_positions": -1,
        "layer_norm_eps": 1e-7,
    }
    base = DebertaV2Model(DebertaV2Config(vocab_size=size_of_base, **sizes))
    base.half().save_pretrained(where.base)

    model = DebertaV2Model(DebertaV2Config(vocab_size=tokenizer.get_vocab_size(), **sizes))
    tensors = {f"pretrained_model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {
        "head_layer.1.weight": torch.empty(hidden, 2 * hidden),
        "head_layer.1.bias": torch.empty(hidden),
        "head_layer.4.weight": torch.empty(1, hidden),
        "head_layer.4.bias": torch.empty(1),
    }
    random = torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        # Wider than a fresh model's, so that scores differ by much more than rounding.
        noise = torch.randn(tensors[name].shape, generator=random) * 0.1
        tensors[name] = noise + 1 if name.endswith("LayerNorm.weight") else noise

    ranker = {
        "ranker_type": "pairranker",
        "model_type": "deberta",
        "model_name": str(where.base),
        "cache_dir": None,
        "load_checkpoint": None,
        "source_maxlength": 1224,
        "candidate_maxlength": 412,
        "n_tasks": 1,
        "drop_out": 0.05,
        "inference_mode": "bubble",
        "fp16": True,
        "device": None,
    }
    names = ["source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id"]
    full = {
        "architectures": ["DebertaV2PairRM"],
        "model_type": "deberta-v2",
        "vocab_size": tokenizer.get_vocab_size(),
        "n_tasks": 1,
        "drop_out": 0.05,
        "sep_token_id": tokenizer.token_to_id("[SEP]"),
        **sizes,
        "pos_att_type": "p2c|c2p",
        **dict(zip(names, ids, strict=True)),
    }
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    for path, config in ((where.pairrm, ranker), (where.hf, full)):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
        save_file(tensors, path / "model.safetensors")
        tokenizer.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "DebertaV2Tokenizer", **special}))
    return where
