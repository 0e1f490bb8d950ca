"""Sampling with transformers: for CPUs, small models and tests.

Sampling is the Gumbel-max trick: greedy decoding over processed logits plus Gumbel noise draws exactly from their softmax,
and because each sequence has a noise generator of its own, its draws do not depend on its neighbours in the batch. Batches
have a fixed composition (``batch_size`` prompts in the shard's order), so a repeated shard gives the same bytes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aipo_hpc.chat import load_tokenizer
from aipo_hpc.engines import Completion, EngineConfig, Request


class GumbelNoise(LogitsProcessor):
    """Adds to each row Gumbel noise from that row's own generator, which makes greedy decoding sample."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """``scores``: (batch, vocabulary) logits; returned perturbed, same shape."""
        noise = torch.stack(
            [torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in self._generators]
        )
        return scores.float() - noise.log().to(scores.device)


class TransformersEngine:
    """A causal language model in this process."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        self._config = config
        self._tokenizer = load_tokenizer(model)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, config.dtype))
        self._model = loaded.to(self._device).eval()
        eos = self._model.generation_config.eos_token_id
        listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self._eos = sorted({int(token) for token in (*listed, self._tokenizer.eos_token_id)})
        # Penalties and lengths of the model's own generation config would silently join the recipe's sampling.
        self._model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        pad = self._tokenizer.pad_token_id
        self._pad = self._eos[0] if pad is None else int(pad)

    def generate(self, requests: Sequence[Sequence[Request]]) -> Iterator[Completion]:
        """Yield the completions batch by batch."""
        for start in range(0, len(requests), self._config.batch_size):
            batch = [request for prompt in requests[start : start + self._config.batch_size] for request in prompt]
            yield from self._run(batch)

    def _run(self, batch: Sequence[Request]) -> Iterator[Completion]:
        width = max(len(request.prompt_token_ids) for request in batch)
        ids = torch.full((len(batch), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            length = len(request.prompt_token_ids)
            ids[row, width - length :] = torch.tensor(request.prompt_token_ids)
            mask[row, width - length :] = 1
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                do_sample=False,
                max_new_tokens=self._config.max_tokens,
                eos_token_id=self._eos,
                pad_token_id=self._pad,
                logits_processor=self._processors([request.seed for request in batch]),
            )
        for request, row in zip(batch, output[:, width:].tolist(), strict=True):
            ends = [position for position, token in enumerate(row) if token in self._eos]
            tokens = row[: ends[0]] if ends else row
            text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
            yield Completion(request, text, "stop" if ends else "length", len(tokens) + bool(ends))

    def _processors(self, seeds: Sequence[int]) -> LogitsProcessorList:
        config = self._config
        if config.temperature == 0:
            return LogitsProcessorList()
        chain: list[LogitsProcessor] = [TemperatureLogitsWarper(config.temperature)]
        if config.top_k > 0:
            chain.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            chain.append(TopPLogitsWarper(config.top_p))
        return LogitsProcessorList([*chain, GumbelNoise(seeds)])
