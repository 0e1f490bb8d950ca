"""Measure the generate stage with vLLM against one raw ``LLM.generate`` call on the same prompts and sampling.

    python tools/bench/generation.py [--make HIDDENxLAYERS] [--num-prompts 128] [--n 4] [--max-tokens 64] [--repeats 5]

Both use the same engine in the same process and take turns, with an empty prefix cache each: the stage as a worker runs it
(Parquet in, chat template, one seeded request per candidate, every finished prompt appended and made durable, Parquet out),
and one call of ``LLM.generate`` on the token ids of the same requests. The engine's start is measured by itself. Rates are
tokens per second of wall time, and tokens per CPU second of this process and the engine's, which a busy machine spoils less.

The model is the demo's policy (0.8 million parameters: the engine is as fast as it can be, so whatever the stage adds shows)
or, with --make, a random Llama of that shape with the same tokenizer, heads 64 wide, which is closer to a model of use.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aipo_hpc import engines
from aipo_hpc.engines import Request
from aipo_hpc.engines.vllm import VllmEngine
from aipo_hpc.processes import descendants
from aipo_hpc.rows import Message, Prompt, write_rows
from aipo_hpc.stages import generate
from aipo_hpc.stages.generate import GenerateConfig
from aipo_hpc.task import Input, Task

ASSETS = Path(__file__).parents[2] / "recipes" / "demo_assets"
SEED = 7


def make_model(folder: Path, shape: str) -> None:
    """Write a random Llama of ``shape`` HIDDENxLAYERS with the tokenizer of the demo's policy."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "policy")
    hidden, layers = map(int, shape.split("x"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_prompts(path: Path, num_prompts: int) -> None:
    """Write the demo's prompts, over again with a number in front once they are used up."""
    lines = (ASSETS / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    rows = []
    for number in range(num_prompts):
        lap, position = divmod(number, len(texts))
        text = f"{lap}. {texts[position]}" if lap else texts[position]
        rows.append(Prompt(f"p{number}", text, [Message("user", text)]))
    write_rows(path, rows, Prompt)


def cpu_seconds() -> float:
    """CPU seconds of this process and all below it so far."""
    ticks = 0
    for pid in (os.getpid(), *descendants(os.getpid())):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def timed(call: Callable[[], int]) -> tuple[int, float, float]:
    """Tokens that a call made, and its wall and CPU seconds."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    tokens = call()
    return tokens, time.perf_counter() - wall, cpu_seconds() - cpu


class Recorded:
    """The engine; keeps the requests that the stage makes, so that the raw call gets the very same."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self.requests: list[Request] = []

    def generate(self, requests: Any) -> Any:
        if self.requests:
            return self._engine.generate(requests)
        prompts = [list(several) for several in requests]
        self.requests = [request for several in prompts for request in several]
        return self._engine.generate(prompts)


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", metavar="HIDDENxLAYERS", help="a random model instead of the demo's policy")
    parser.add_argument("--num-prompts", type=int, default=128)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(arguments, Path(scratch))


def measure(arguments: argparse.Namespace, scratch: Path) -> None:
    """Start the engine, let both ways take turns, print each and the ratios."""
    from vllm import SamplingParams

    model = ASSETS / "policy"
    if arguments.make:
        model = scratch / "model"
        make_model(model, arguments.make)
    write_prompts(scratch / "prompts.parquet", arguments.num_prompts)
    config = GenerateConfig(
        engine="vllm",
        n=arguments.n,
        temperature=0.9,
        max_tokens=arguments.max_tokens,
        max_prompt_tokens=448,
        dtype=arguments.dtype,
        max_num_seqs=arguments.max_num_seqs,
        enforce_eager=True,
    )
    started = time.perf_counter()
    engine = VllmEngine(config, str(model))
    start = time.perf_counter() - started
    llm = engine._llm
    recorded = Recorded(engine)
    engines.load_engine = lambda config, model: recorded
    inputs = {
        "prompts": Input(shards={0: (scratch / "prompts.parquet",)}),
        "policy": Input(value=str(model)),
    }

    def stage(name: str) -> int:
        out = scratch / name
        out.mkdir()
        outcome = generate.run(config, Task("iter-00/generate", 0, 0, 1, SEED, inputs, out))
        assert outcome.counts["errors"] == 0
        return int(outcome.counts["tokens"])

    def raw() -> int:
        prompts: Any = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in recorded.requests]
        params = [
            SamplingParams(
                temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, max_tokens=config.max_tokens,
                seed=request.seed,
            )
            for request in recorded.requests
        ]  # fmt: skip
        return sum(
            len(sample.token_ids) for done in llm.generate(prompts, params, use_tqdm=False) for sample in done.outputs
        )

    stage("warm-up")
    raw()
    print(
        f"{arguments.num_prompts} prompts x {arguments.n} candidates, up to {arguments.max_tokens} tokens, "
        f"max_num_seqs {arguments.max_num_seqs}, {arguments.dtype}, model {arguments.make or 'demo policy'}"
    )
    print(f"engine start {start:.1f} s (not counted below)")
    wall_ratios, cpu_ratios = [], []
    for repeat in range(arguments.repeats):
        rates: dict[str, tuple[float, float]] = {}
        # The order changes from turn to turn: neither way is always the first.
        for way in ("stage", "raw")[:: 1 if repeat % 2 else -1]:
            llm.reset_prefix_cache()
            tokens, wall, cpu = timed((lambda name=f"out-{repeat}": stage(name)) if way == "stage" else raw)
            rates[way] = tokens / wall, tokens / cpu
            print(f"  {way:5} {tokens:7} tokens {wall:7.2f} s {tokens / wall:9.0f}/s {tokens / cpu:9.0f}/CPU s")
        wall_ratios.append(rates["stage"][0] / rates["raw"][0])
        cpu_ratios.append(rates["stage"][1] / rates["raw"][1])
    for name, ratios in (("wall", wall_ratios), ("CPU", cpu_ratios)):
        print(
            f"stage / raw by {name} time: median {statistics.median(ratios):.3f} "
            f"({', '.join(f'{ratio:.3f}' for ratio in ratios)})"
        )


if __name__ == "__main__":
    main()
