"""Make the demo's files again: the text, a small language model and a small ranker, from ``text.toml`` alone.

    python recipes/demo_assets/make.py              everything, into this folder
    python recipes/demo_assets/make.py --out DIR    ... into another one

    text.toml -> corpus.jsonl, prompts.jsonl        corpus.py
    corpus    -> policy/                            a Llama taught good and bad answers alike, so that there is
                                                    something for preference optimization to do
    corpus    -> ranker/                            a PairRM taught which of two answers is the better one

Same seed, same number of threads and same machine: same bytes. Another processor or another torch rounds differently,
so there the weights differ in their last digits and the figures slightly.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import corpus
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
POLICY_VOCABULARY = 1536
POLICY_EPOCHS = 24
POLICY_BATCH = 32
POLICY_LEARNING_RATE = 2e-3


def main() -> None:
    """Parse the command line and make the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write to (default: the script's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="torch threads; another number rounds differently")
    parser.add_argument("--only", choices=["text", "policy", "ranker"], help="make one part, from the text as composed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)

    pairs, prompts = corpus.compose(HERE / "text.toml", arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only in (None, "text"):
        corpus.write(arguments.out, pairs, prompts)
        print(f"text: {len(pairs)} pairs, {len(prompts)} prompts")
    if arguments.only in (None, "policy"):
        make_policy(pairs, prompts, arguments.out / "policy", arguments.seed)


# --- the policy ------------------------------------------------------------------------------------------------------


def make_policy(pairs: Sequence[corpus.Pair], prompts: Sequence[str], out: Path, seed: int) -> None:
    """Train the language model on every prompt with its good and with its bad answer, and write it."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = policy_tokenizer([text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)])
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    examples = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            prompt_ids = chat_ids(tokenizer, pair.prompt)
            examples.append((prompt_ids, [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]))

    def loss_of(batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        ids = [torch.tensor(prompt + answer) for prompt, answer in batch]
        labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in batch]
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
        targets = pad(labels, batch_first=True, padding_value=-100)
        loss: torch.Tensor = model(input_ids=input_ids, attention_mask=mask, labels=targets).loss
        return loss

    fit(model, examples, loss_of, POLICY_EPOCHS, POLICY_BATCH, POLICY_LEARNING_RATE, seed, "policy")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.8,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    report_policy(model, tokenizer, prompts, seed)


def policy_tokenizer(texts: Sequence[str]) -> "PreTrainedTokenizerFast":
    """A byte-level BPE vocabulary of the texts: every other text in the world becomes bytes, none becomes unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=POLICY_VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special[3:],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat_ids(tokenizer: "PreTrainedTokenizerFast", prompt: str) -> list[int]:
    """A prompt as the policy reads it, up to where the answer starts."""
    turn = [{"role": "user", "content": prompt}]
    encoded: Any = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def report_policy(model: Any, tokenizer: Any, prompts: Sequence[str], seed: int) -> None:
    """Print what the policy answers to prompts it was not taught."""
    torch.manual_seed(seed)
    model.eval()
    ended, lengths = 0, []
    for number, prompt in enumerate(prompts[:60]):
        ids = torch.tensor([chat_ids(tokenizer, prompt)])
        with torch.no_grad():
            answer = model.generate(ids, do_sample=True, temperature=0.8, top_k=0, max_new_tokens=64)[0, ids.shape[1] :]
        ended += int(answer[-1] == tokenizer.eos_token_id)
        text = tokenizer.decode(answer, skip_special_tokens=True)
        lengths.append(len(text))
        if number < 12:
            print(f"policy: {prompt}\n    {text}")
    print(f"policy: {ended} of {len(lengths)} answers end by themselves; {sum(lengths) / len(lengths):.0f} characters")


# --- training --------------------------------------------------------------------------------------------------------


def fit(
    model: torch.nn.Module,
    examples: Sequence[Any],
    loss_of: Callable[[list[Any]], torch.Tensor],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    name: str,
) -> None:
    """AdamW with a short warm-up and a cosine to zero over shuffled batches."""
    rng = random.Random(seed)
    num_steps = epochs * -(-len(examples) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=num_steps, pct_start=0.05, cycle_momentum=False
    )
    model.train()
    started, total = time.monotonic(), 0.0
    for epoch in range(epochs):
        total, steps = 0.0, 0
        for batch in shuffled(examples, batch_size, rng):
            loss = loss_of(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total, steps = total + loss.item(), steps + 1
        if epoch % 4 == 3 or epoch == epochs - 1:
            print(f"{name}: epoch {epoch + 1}/{epochs} loss {total / steps:.3f} ({time.monotonic() - started:.0f} s)")


def shuffled(examples: Sequence[Any], batch_size: int, rng: random.Random) -> Iterator[list[Any]]:
    """Yield the examples in random batches."""
    order = rng.sample(range(len(examples)), len(examples))
    for start in range(0, len(order), batch_size):
        yield [examples[index] for index in order[start : start + batch_size]]


if __name__ == "__main__":
    main()
