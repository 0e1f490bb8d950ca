"""Tiny chat models made from nothing, as folders: same arguments, same bytes.

Hidden size 128 with 4 heads gives a head dimension of 32, the smallest that every inference engine accepts on a CPU.
"""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_WORDS = """
    what why how who where is are was were the a an of to in and or not red blue green small large old new
    dog cat bird fish tree river stone house city moon sun star rain snow fire water eats sees finds likes makes
    one two three four five six seven eight nine ten write tell explain list name answer question story reason
""".split()


def tiny_tokenizer_folder(folder: Path, *, adds_bos: bool = False) -> Path:
    """Train a byte-level BPE tokenizer of 512 tokens with bos, eos, pad and a chat template, and save it in ``folder``.

    With ``adds_bos`` it prepends the bos token to whatever it encodes, as the tokenizers of Llama and Mistral do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [" ".join(_WORDS[(i * j) % len(_WORDS)] for j in range(1, 12)) + "." for i in range(1, 400)]
    tokenizer.train_from_iterator(corpus, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return folder


def tiny_model_folder(folder: Path, *, seed: int = 0, layers: int = 2, adds_bos: bool = False) -> Path:
    """Write a Llama of about 0.6 million random parameters, with its tokenizer, into ``folder``."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tiny_tokenizer_folder(folder, adds_bos=adds_bos)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        # Larger than the usual initialisation, so that answers differ clearly in likelihood.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.08)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model.save_pretrained(folder)
    return folder


def listing_model_folder(folder: Path) -> Path:
    """Write a tiny model that goes on with numbered lists of tasks: what follows a token is drawn by the token alone.

    Its one layer adds nothing, so all it learns is which token follows which, in seconds.
    """
    import torch

    from aipo_hpc.instruct_filters import request_text

    tiny_model_folder(folder, layers=1)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    draw = random.Random(0)
    lists = [request_text([task(draw) for _ in range(8)]).replace("\n9.", "") for _ in range(200)]
    follows = torch.full((512, 512), 1e-4)
    for text in lists:
        ids = tokenizer(text)["input_ids"]
        for before, after in pairwise(ids):
            follows[before, after] += 1
    follows /= follows.sum(1, keepdim=True)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    parts = [model.model.embed_tokens.weight, model.lm_head.weight]
    optimizer = torch.optim.Adam(parts, lr=0.02)
    for _ in range(150):
        logits = model.lm_head(model.model.norm(model.model.embed_tokens.weight))
        loss = -(follows * logits.log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def task(draw: random.Random) -> str:
    """A task of a few words."""
    verb, thing = (
        draw.choice(("Tell", "Write", "Explain", "Name", "List")),
        draw.choice(("story", "reason", "question")),
    )
    colours, animals = ("red", "blue", "green", "small", "large"), ("dog", "cat", "bird", "fish", "tree", "river")
    return f"{verb} one {thing} of the {draw.choice(colours)} {draw.choice(animals)} and the {draw.choice(animals)}."
