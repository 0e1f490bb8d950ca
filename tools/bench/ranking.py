"""Measure PairRM against llm-blender in one run: the same checkpoint, prompts, machine and number of threads.

    python tools/bench/ranking.py --prompts FILE --checkpoint DIR [--num-prompts 64] [--num-candidates 5]

FILE holds one JSON object per line (.gz is read too) with "prompt" and "candidates": texts, or objects with "response".
DIR is a PairRM checkpoint; with ``--make HIDDENxLAYERS`` a random one is written there first, its vocabulary trained on
FILE. Times are CPU seconds of the process, so a busy machine spoils them less than it would wall time; loading is not
counted. llm-blender runs as its users run it, ``Blender.rank(batch_size=8)``; agreement is also given at batch size 1,
where it cuts candidates by the same budget.
"""

import argparse
import gzip
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from aipo_hpc.rankers import from_texts
from aipo_hpc.rankers.deberta import EncoderConfig
from aipo_hpc.rankers.llm_blender import LLMBlender
from aipo_hpc.rankers.pairrm import PairRM


def read_prompts(path: Path, num_prompts: int, num_candidates: int) -> tuple[list[str], list[list[str]]]:
    """Read the first prompts of a file that have enough candidates."""
    prompts, candidates = [], []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            texts = [item if isinstance(item, str) else item["response"] for item in row["candidates"]]
            if len(texts) >= num_candidates and len(prompts) < num_prompts:
                prompts.append(row["prompt"])
                candidates.append(texts[:num_candidates])
    return prompts, candidates


def make_checkpoint(folder: Path, shape: str, texts: Sequence[str], vocab_size: int) -> None:
    """Write a random ranker of ``shape`` HIDDENxLAYERS with a Unigram vocabulary trained on ``texts``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    tokenizer.decoder = decoders.Metaspace()  # type: ignore[assignment]
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token="[UNK]", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    hidden, layers = map(int, shape.split("x"))
    torch.manual_seed(0)
    ranker = PairRM.new(EncoderConfig(0, hidden, layers, max(1, hidden // 64), 4 * hidden), tokenizer)
    with torch.no_grad():
        for parameter in ranker.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # scores far enough apart to compare ranks
    ranker.save(folder)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return a call's result and its CPU seconds."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def agreement(ours: Sequence[Any], theirs: Sequence[Any]) -> str:
    """Compare two lists of rankings: how many are the same, and how far the scores are apart."""
    same = sum(list(a.ranks) == list(b.ranks) for a, b in zip(ours, theirs, strict=True))
    apart = max(abs(x - y) for a, b in zip(ours, theirs, strict=True) for x, y in zip(a.scores, b.scores, strict=True))
    return f"same ranks for {same} of {len(ours)} prompts, largest score difference {apart:.1e}"


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--make", metavar="HIDDENxLAYERS", help="write a random checkpoint first")
    parser.add_argument("--vocab-size", type=int, default=8000, help="vocabulary of a made checkpoint")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--num-candidates", type=int, default=5)
    parser.add_argument("--max-chars", type=int, help="cut candidates to this many characters")
    parser.add_argument("--tokens-per-batch", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bfloat16", action="store_true", help="also measure and compare bfloat16")
    parser.add_argument("--exact", action="store_true", help="also compare with llm-blender at batch size 1")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    prompts, candidates = read_prompts(arguments.prompts, arguments.num_prompts, arguments.num_candidates)
    candidates = [[text[: arguments.max_chars] for text in texts] for texts in candidates]
    if arguments.make:
        texts = [*prompts, *(text for several in candidates for text in several)]
        make_checkpoint(arguments.checkpoint, arguments.make, texts, arguments.vocab_size)

    ours = PairRM.load(str(arguments.checkpoint), tokens_per_batch=arguments.tokens_per_batch)
    reference = LLMBlender.load(str(arguments.checkpoint))
    parameters = sum(parameter.numel() for parameter in ours.model.parameters())
    lengths = [
        len(encoded.source) + 2 * len(ids)
        for encoded in (ours.tokens.encode(*item) for item in zip(prompts, candidates, strict=True))
        for ids in encoded.different
    ]
    print(
        f"{len(prompts)} prompts x {arguments.num_candidates} candidates, {parameters / 1e6:.1f}M parameters, "
        f"about {sum(lengths) / len(lengths):.0f} tokens a comparison, {arguments.threads} thread(s), {ours.device}"
    )
    ours.rank(from_texts(prompts[:2], candidates[:2]))
    reference.blender.rank(prompts[:2], candidates[:2], batch_size=8, disable_tqdm=True)

    rankings, seconds = timed(lambda: ours.rank(from_texts(prompts, candidates)))
    report("aipo_hpc pairrm float32", len(prompts), seconds)
    theirs, reference_seconds = timed(
        lambda: reference.blender.rank(prompts, candidates, batch_size=8, disable_tqdm=True)
    )
    report("llm-blender, batch 8", len(prompts), reference_seconds)
    same = sum(list(row.ranks) == list(ranks) for row, ranks in zip(rankings, theirs.tolist(), strict=True))
    print(f"speedup {reference_seconds / seconds:.2f}x; same ranks for {same} of {len(prompts)} prompts")
    if arguments.exact:
        print("against llm-blender, batch 1:", agreement(rankings, reference.rank(from_texts(prompts, candidates))))
    if arguments.bfloat16:
        low = PairRM.load(str(arguments.checkpoint), dtype="bfloat16", tokens_per_batch=arguments.tokens_per_batch)
        low_rankings, low_seconds = timed(lambda: low.rank(from_texts(prompts, candidates)))
        report("aipo_hpc pairrm bfloat16", len(prompts), low_seconds)
        print("bfloat16 against float32:", agreement(rankings, low_rankings))


def report(name: str, num_prompts: int, seconds: float) -> None:
    """Print one measurement."""
    print(f"{name:26} {seconds:8.1f} CPU s  {num_prompts / seconds:8.2f} prompts/s")


if __name__ == "__main__":
    main()
