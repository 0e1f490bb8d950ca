"""The forward pass over pairs: log-probabilities of responses, for the reference stage and for training alike.

A batch of B pairs is one forward over 2B sequences, all chosen ones first and then all rejected ones, padded on the
right to the longest:

    row 0       prompt prompt chosen chosen chosen <eos>
    row 1       prompt chosen chosen <eos>  pad    pad
    row 2       prompt prompt rejected <eos> pad   pad      (the pair of row 0)
    row 3       prompt rejected rejected    pad    pad      (the pair of row 1)
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**25
"""Logits turned to fp32 at a time (128 MiB)."""


class TokenisedPair(Protocol):
    """What a batch is made of: sequences of token ids, as in ``rows.TrainRow``."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The prompt, up to where the response starts."""
        ...

    @property
    def chosen_ids(self) -> Sequence[int]:
        """The preferred response."""
        ...

    @property
    def rejected_ids(self) -> Sequence[int]:
        """The other response."""
        ...


def collate(pairs: Sequence[TokenisedPair], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Pad B pairs to one batch of integer tensors.

    ``input_ids`` and ``attention_mask`` have shape (2B, length); ``prompt_lengths`` and ``lengths``, the number of
    prompt tokens and of response tokens of each sequence, have shape (2B,). Padding never changes a result: it stands
    behind everything a causal model may look at. Prompts and responses have at least one token each.
    """
    prompts = [pair.prompt_ids for pair in pairs] * 2
    responses = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    input_ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        input_ids[row, : len(prompt)] = torch.as_tensor(prompt, dtype=torch.long)
        input_ids[row, len(prompt) : end] = torch.as_tensor(response, dtype=torch.long)
        attention_mask[row, :end] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts]),
        "lengths": torch.tensor([len(response) for response in responses]),
    }


@dataclass(frozen=True)
class ResponseLogps:
    """Log-probabilities of B pairs, each of shape (B,), in nats, fp32 (fp64 if the model is)."""

    chosen: Tensor
    """log pi(chosen|prompt), summed over all response tokens."""
    rejected: Tensor
    chosen_shared: Tensor
    """The same over the first tokens only, as many as the shorter response of the pair has."""
    rejected_shared: Tensor
    weights: Tensor | None
    """If asked for: exp of the sum over both responses of the mean over tokens of log(pi(y_t) / sum_v pi(v)^2), without
    a gradient. About 1 for samples of the policy itself, less for what it would hardly say."""


def response_logps(model: Any, batch: dict[str, Tensor], *, weights: bool = False) -> ResponseLogps:
    """Run the model over a batch of pairs; the weights of WPO only if asked for, since they go over the logits again.

    ``batch`` comes from ``collate`` and lies on the model's device. Logits are asked for only from the end of the batch's
    shortest prompt on, if the model can leave out the others.
    """
    input_ids, prompt_lengths, lengths = batch["input_ids"], batch["prompt_lengths"], batch["lengths"]
    start = int(prompt_lengths.min()) - 1
    kwargs: dict[str, Any] = {}
    if _can_leave_out_logits(model):
        kwargs["logits_to_keep"] = input_ids.shape[1] - start
    output = model(input_ids=input_ids, attention_mask=batch["attention_mask"], use_cache=False, **kwargs)
    logits = output.logits[:, -(input_ids.shape[1] - start) :]
    # Position i predicts token i + 1, so the last position predicts nothing that is known.
    position = torch.arange(start + 1, input_ids.shape[1], device=input_ids.device)
    wanted = (position >= prompt_lengths[:, None]) & (position < (prompt_lengths + lengths)[:, None])
    logps = token_logps(logits[:, :-1], input_ids[:, start + 1 :]).masked_fill(~wanted, 0.0)
    chosen, rejected = logps.sum(dim=1).chunk(2)
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    shared = logps.masked_fill(position >= (prompt_lengths + shorter)[:, None], 0.0)
    chosen_shared, rejected_shared = shared.sum(dim=1).chunk(2)
    pair_weights = None
    if weights:
        with torch.no_grad():
            likely = (logps - log_collision(logits[:, :-1])).masked_fill(~wanted, 0.0)
            chosen_mean, rejected_mean = (likely.sum(dim=1) / lengths).chunk(2)
            pair_weights = (chosen_mean + rejected_mean).exp()
    return ResponseLogps(chosen, rejected, chosen_shared, rejected_shared, pair_weights)


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-softmax of ``logits`` (rows, length, vocabulary) at ``targets`` (rows, length), computed in fp32.

    Returns shape (rows, length). Neither the log-softmax nor an fp32 copy of the logits ever exists as a whole, forward
    or backward: both go through the vocabulary a chunk of tokens at a time.
    """
    logps: Tensor = _TokenLogps.apply(logits, targets)  # type: ignore[no-untyped-call]
    return logps


def log_collision(logits: Tensor) -> Tensor:
    """Tell log sum_v p(v)^2, of shape (rows, length): how likely two samples of a token agree. In fp32, chunk by chunk."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    found = torch.empty(logits.shape[:2], dtype=precise, device=logits.device)
    for row, span in _chunks(logits):
        chunk = logits[row, span].to(precise)
        found[row, span] = (2 * chunk).logsumexp(dim=-1) - 2 * chunk.logsumexp(dim=-1)
    return found


class _TokenLogps(torch.autograd.Function):
    """d log p(target) / d logits = one_hot(target) - softmax(logits), rebuilt from the saved log-normaliser."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        precise = torch.promote_types(logits.dtype, torch.float32)
        normaliser = torch.empty(targets.shape, dtype=precise, device=logits.device)
        for row, span in _chunks(logits):
            normaliser[row, span] = logits[row, span].to(precise).logsumexp(dim=-1)
        ctx.save_for_backward(logits, targets, normaliser)
        return logits.gather(-1, targets[..., None]).squeeze(-1).to(precise) - normaliser

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, normaliser = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for row, span in _chunks(logits):
            chunk = (logits[row, span].to(normaliser.dtype) - normaliser[row, span, None]).exp_().neg_()
            chunk.scatter_add_(-1, targets[row, span, None], torch.ones_like(chunk[:, :1]))
            grad_logits[row, span] = chunk.mul_(grad[row, span, None]).to(logits.dtype)
        return grad_logits, None


def _chunks(logits: Tensor) -> list[tuple[int, slice]]:
    rows, length, vocabulary = logits.shape
    step = max(1, _CHUNK_ELEMENTS // vocabulary)
    return [(row, slice(at, min(at + step, length))) for row in range(rows) for at in range(0, length, step)]


def _can_leave_out_logits(model: Any) -> bool:
    """Whether the model's forward, below any wrapper of data parallelism or adapters, knows ``logits_to_keep``."""
    inner = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
