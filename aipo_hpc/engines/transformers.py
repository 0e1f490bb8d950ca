"""Sampling with transformers: for CPUs, small models and tests.

Sampling is the Gumbel-max trick: greedy decoding over processed logits plus Gumbel noise draws exactly from their softmax,
and because each sequence has a noise generator of its own, its draws do not depend on its neighbours in the batch. Batches
have a fixed composition (``batch_size`` prompts in the shard's order), so a repeated shard gives the same bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aipo_hpc.chat import load_tokenizer, response_text
from aipo_hpc.engines import Completion, EngineConfig, Request, temperature_of
from aipo_hpc.own_code import is_trusted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Temperatures(LogitsProcessor):
    """Divides each row by that row's own temperature; greedy rows (0) stay as they are."""

    def __init__(self, temperatures: Sequence[float]) -> None:
        self._divisors = torch.tensor([[temperature or 1.0] for temperature in temperatures])

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """``scores``: (batch, vocabulary) logits; returned divided, same shape."""
        return scores / self._divisors.to(scores.device)


class GumbelNoise(LogitsProcessor):
    """Adds to each row Gumbel noise from that row's own generator, which makes greedy decoding sample; None: no noise."""

    def __init__(self, seeds: Sequence[int | None]) -> None:
        self._generators = [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """``scores``: (batch, vocabulary) logits; returned perturbed, same shape."""
        size = scores.shape[-1]
        noise = torch.stack(
            [
                torch.ones(size) if generator is None else torch.empty(size).exponential_(generator=generator)
                for generator in self._generators
            ]
        )
        return scores.float() - noise.log().to(scores.device)


class StopTexts(StoppingCriteria):
    """Ends each row at which one of its own texts comes up; looks at the row's last tokens alone."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stops: Sequence[Sequence[str]]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        # A token is a byte or more.
        self._tail = 1 + max((len(text.encode()) for stop in stops for text in stop), default=0)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **others: Any) -> torch.Tensor:
        """``input_ids``: (batch, tokens so far); returned: which rows end, (batch,)."""
        tails = self._tokenizer.batch_decode(input_ids[:, -self._tail :])
        ended = [first_stop(tail, stop) is not None for tail, stop in zip(tails, self._stops, strict=True)]
        return torch.tensor(ended, device=input_ids.device)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the texts begins, or None if there is none of them."""
    return min((found for stop in stops if (found := text.find(stop)) >= 0), default=None)


class TransformersEngine:
    """A causal language model in this process."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        self._config = config
        self._tokenizer = load_tokenizer(model)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, config.dtype), trust_remote_code=is_trusted(model)
        )
        self._model = loaded.to(self._device).eval()
        eos = self._model.generation_config.eos_token_id
        listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self._eos = sorted({int(token) for token in (*listed, self._tokenizer.eos_token_id)})
        # Penalties and lengths of the model's own generation config would silently join the recipe's sampling.
        self._model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        pad = self._tokenizer.pad_token_id
        self._pad = self._eos[0] if pad is None else int(pad)

    def generate(self, requests: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Yield the completions batch by batch."""
        waiting = iter(requests)
        while prompts := list(islice(waiting, self._config.batch_size)):
            yield from self._run([request for prompt in prompts for request in prompt])

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
                logits_processor=self._processors(batch),
                stopping_criteria=self._criteria([request.stop for request in batch]),
            )
        for request, row in zip(batch, output[:, width:].tolist(), strict=True):
            ends = [position for position, token in enumerate(row) if token in self._eos]
            tokens = row[: ends[0]] if ends else row
            text = response_text(self._tokenizer, tokens)
            if (end := first_stop(text, request.stop)) is not None:
                num_tokens = sum(token != self._pad for token in tokens)
                yield Completion(request, text[:end], "stop", num_tokens)
                continue
            yield Completion(request, text, "stop" if ends else "length", len(tokens) + bool(ends))

    def _criteria(self, stops: Sequence[Sequence[str]]) -> StoppingCriteriaList:
        return StoppingCriteriaList([StopTexts(self._tokenizer, stops)] if any(stops) else [])

    def _processors(self, batch: Sequence[Request]) -> LogitsProcessorList:
        config = self._config
        temperatures = [temperature_of(request, config) for request in batch]
        if not any(temperatures):
            return LogitsProcessorList()
        chain: list[LogitsProcessor] = [Temperatures(temperatures)]
        if config.top_k > 0:
            chain.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            chain.append(TopPLogitsWarper(config.top_p))
        seeds = [
            request.seed if temperature else None for request, temperature in zip(batch, temperatures, strict=True)
        ]
        return LogitsProcessorList([*chain, GumbelNoise(seeds)])
