"""Make the demo's files again: the text, a small language model and a small ranker, from ``text.toml`` alone.

    python recipes/demo_assets/make.py              everything, into this folder
    python recipes/demo_assets/make.py --out DIR    ... into another one

    text.toml -> corpus.jsonl, prompts.jsonl        corpus.py
    corpus    -> policy/                            a Llama taught good and bad answers alike, so that there is
                                                    something for preference optimization to do
    corpus    -> ranker/                            a PairRM taught which of two answers is the better one

The text is the same bytes every time. The ranker is not: the trainer of its Unigram vocabulary gives another one in every
process (with one thread, too), and so other weights. The policy was the same bytes in a short training made twice on one
machine; another processor or another torch rounds differently. It takes about six minutes of one core; models
this small gain nothing from more threads, which only wait for each other on a busy machine.
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
POLICY_EPOCHS = 9
POLICY_BATCH = 32
POLICY_LEARNING_RATE = 2e-3
POLICY_GOOD_SHARE = 2
"""How often the policy reads a prompt's good answer for each time that it reads one bad answer of each of the six kinds.
All six, so that it learns that answers may be bad, not which prompts are answered badly."""
RANKER_VOCABULARY = 1536
RANKER_EPOCHS = 20
RANKER_BATCH = 12
RANKER_LEARNING_RATE = 1e-3
RANKER_HELD_OUT = 0.15
"""The share of the corpus' questions that the ranker is measured on and never trained on."""


def main() -> None:
    """Parse the command line and make the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write to (default: the script's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; another number rounds differently")
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
    if arguments.only in (None, "ranker"):
        make_ranker(pairs, arguments.out / "ranker", arguments.seed)


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
        for answer in [pair.chosen] * POLICY_GOOD_SHARE + list(pair.bad):
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


# --- the ranker ------------------------------------------------------------------------------------------------------

Comparison = tuple[str, str, str]
"""A prompt, the better answer and the worse one."""


def make_ranker(pairs: Sequence[corpus.Pair], out: Path, seed: int) -> None:
    """Train the ranker on comparisons, measure it on questions it has not seen, and write it."""
    from aipo_hpc.rankers.deberta import EncoderConfig
    from aipo_hpc.rankers.pairrm import PairRM

    rng = random.Random(seed)
    questions = sorted({pair.chosen for pair in pairs})
    held = set(rng.sample(questions, round(RANKER_HELD_OUT * len(questions))))
    seen = [pair for pair in pairs if pair.chosen not in held]
    unseen = [pair for pair in pairs if pair.chosen in held]

    tokenizer = ranker_tokenizer([text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)])
    torch.manual_seed(seed)
    config = EncoderConfig(
        vocab_size=0,  # set by the tokenizer
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        position_buckets=64,
        attention_probs_dropout_prob=0.0,
    )
    ranker = PairRM.new(config, tokenizer, drop_out=0.1)

    def loss_of(batch: list[corpus.Pair]) -> torch.Tensor:
        drawn = [comparison for pair in batch for comparison in comparisons(pair, seen, rng)]
        swapped = [rng.random() < 0.5 for _ in drawn]
        first = [worse if swap else better for (_, better, worse), swap in zip(drawn, swapped, strict=True)]
        second = [better if swap else worse for (_, better, worse), swap in zip(drawn, swapped, strict=True)]
        logits = ranker.compare([prompt for prompt, _, _ in drawn], first, second)
        sign = torch.tensor([-1.0 if swap else 1.0 for swap in swapped])
        return torch.nn.functional.softplus(-sign * logits).mean()

    fit(ranker.model, seen, loss_of, RANKER_EPOCHS, RANKER_BATCH, RANKER_LEARNING_RATE, seed, "ranker")
    ranker.save(out)
    (out / "model.safetensors").chmod(0o644)
    report_ranker(ranker, unseen, rng)


def ranker_tokenizer(texts: Sequence[str]) -> Any:
    """A Unigram vocabulary of the texts, with bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    learner: Any = Tokenizer(models.Unigram())
    learner.normalizer = normalizers.NFKC()
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=RANKER_VOCABULARY, special_tokens=tokens, unk_token="[UNK]", show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    # The trainer drops byte fallback, so the model is built once more from what it learnt.
    vocabulary = [(token, score) for token, score in json.loads(learner.to_str())["model"]["vocab"]]
    tokenizer: Any = Tokenizer(models.Unigram(vocabulary, unk_id=special.index("[UNK]"), byte_fallback=True))
    tokenizer.normalizer = learner.normalizer
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(special)
    return tokenizer


def comparisons(pair: corpus.Pair, pairs: Sequence[corpus.Pair], rng: random.Random) -> list[Comparison]:
    """Comparisons on one prompt: with its own rejected answer, and with two of the answers ``spoilt`` makes."""
    wrong = list(spoilt(pair, pairs, rng).values())
    return [(pair.prompt, pair.chosen, worse) for worse in (pair.rejected, *rng.sample(wrong, min(2, len(wrong))))]


def spoilt(pair: corpus.Pair, pairs: Sequence[corpus.Pair], rng: random.Random) -> dict[str, str]:
    """Wrong answers to a prompt, made from good ones: by what is wrong with them."""
    words = pair.chosen.split()
    alike = [other for other in pairs if other.chosen[:4] == pair.chosen[:4] and other.chosen != pair.chosen]
    far = rng.choice([other for other in rng.sample(pairs, 8) if other.chosen != pair.chosen]).chosen
    near = rng.choice(alike).chosen if alike else far
    cut = rng.randint(2, len(words) - 2)
    tail = near.split()
    mixed = [*words[:cut], *tail[min(cut, len(tail) - 1) :]]
    start = rng.randint(1, len(words) - 4)
    shuffled_part = rng.sample(words[start : start + 4], 4)
    garbled = [*words[:start], *shuffled_part, *words[start + 4 :]]
    wrong = {
        "cut short": " ".join(words[: rng.randint(2, len(words) - 1)]),
        "another answer": rng.choice([near, far]),
        "two answers mixed": " ".join(mixed),
        "words in disorder": " ".join(garbled),
    }
    return {how: text for how, text in wrong.items() if text != pair.chosen}


def report_ranker(ranker: Any, unseen: Sequence[corpus.Pair], rng: random.Random) -> None:
    """Print how often the better of two answers wins, on prompts whose good answer the ranker has never seen."""
    from aipo_hpc.rankers import from_texts

    right: dict[str, list[float]] = {}
    for pair in unseen:
        worse = {pair.failure: pair.rejected, **spoilt(pair, unseen, rng)}
        rankings = ranker.rank(from_texts([pair.prompt] * len(worse), [[pair.chosen, text] for text in worse.values()]))
        for how, ranking in zip(worse, rankings, strict=True):
            right.setdefault(how, []).append(float(ranking.ranks[0] < ranking.ranks[1]))
    own = [value for how in corpus.FAILURES for value in right[how]]
    print(f"ranker: accuracy on the corpus' own pairs, {len(own)} held out: {sum(own) / len(own):.3f}")
    for how, values in right.items():
        print(f"ranker:   {how:18} {sum(values) / len(values):.3f} of {len(values)}")


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
        if epoch % 2 == 1 or epoch == epochs - 1:
            print(
                f"{name}: epoch {epoch + 1}/{epochs} loss {total / steps:.3f} ({time.monotonic() - started:.0f} s)",
                flush=True,
            )


def shuffled(examples: Sequence[Any], batch_size: int, rng: random.Random) -> Iterator[list[Any]]:
    """Yield the examples in random batches."""
    order = rng.sample(range(len(examples)), len(examples))
    for start in range(0, len(order), batch_size):
        yield [examples[index] for index in order[start : start + batch_size]]


if __name__ == "__main__":
    main()
