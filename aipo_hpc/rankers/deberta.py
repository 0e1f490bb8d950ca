"""The DeBERTa-v3 encoder, reduced to what a pair ranker needs and ordered for speed.

Same parameters, names and numbers as ``DebertaV2Model`` in transformers with ``relative_attention``, ``share_att_key``,
``pos_att_type`` c2p and p2c and ``norm_rel_ebd`` layer_norm (He et al. 2021, "DeBERTaV3", arXiv 2111.09543). What differs
is the work done:

* the position projections depend on the weights alone, so they are computed once per call of the ranker, not per batch;
* only the distances that occur in a batch are scored, and both position terms go into one additive bias, so attention
  itself is PyTorch's fused kernel (``scaled_dot_product_attention``);
* the last layer computes its output only where it is read.

Shapes: B sequences, L tokens, H heads of width D, E = H x D, Q positions to read, R relative distances.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aipo_hpc.errors import DataError

Positions = list[tuple[Tensor, Tensor]]
"""Per layer the projected relative position embeddings: as keys and as queries, each (H, 2 x buckets, D)."""

_HEAD_WIDTH = 64
"""Every released DeBERTa has heads of this width; needed where a checkpoint carries no configuration."""

_SCORES_AT_ONCE = {"cpu": 2**21, "cuda": 2**28}
"""Attention scores (B x H x Q x L) computed at once, a few heads at a time if need be: on a CPU what its caches hold, about
a fifth faster than all heads of a long sequence together; on a GPU a bound on memory (1 GB a tensor in float32)."""


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes of a DeBERTa-v3 encoder, under the names of the Hugging Face configuration."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    position_buckets: int = 256
    """Relative distances are told apart exactly up to half of this, in logarithmic steps beyond."""
    max_position_embeddings: int = 512
    """The distance at which the logarithmic steps end; not a limit on the length of a sequence."""
    layer_norm_eps: float = 1e-7
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1

    def to_dict(self) -> dict[str, Any]:
        """The configuration of the equivalent ``DebertaV2Model``."""
        return {"model_type": "deberta-v2", **asdict(self), **_FAMILY, "max_relative_positions": -1, "pad_token_id": 0}

    @staticmethod
    def from_dict(values: Mapping[str, Any], where: str) -> "EncoderConfig":
        """Read a Hugging Face configuration; ``where`` names it in errors.

        Raises:
            DataError: a size is missing, or the encoder is not of the DeBERTa-v3 family.
        """
        for name, wanted in _FAMILY.items():
            found = values.get(name, wanted)
            if name == "pos_att_type" and isinstance(found, str):
                found = found.split("|")
            same = sorted(found) == sorted(wanted) if isinstance(wanted, list) else found == wanted
            if not same:
                raise DataError(
                    f"{where}: {name} is {found!r}, a DeBERTa-v3 encoder has {wanted!r}; "
                    "use a PairRM checkpoint built on deberta-v3, or ranker=llm_blender for another encoder"
                )
        sizes = {name: values[name] for name in EncoderConfig.__dataclass_fields__ if values.get(name) is not None}
        if values.get("max_relative_positions", -1) > 0:
            sizes["max_position_embeddings"] = values["max_relative_positions"]
        try:
            return EncoderConfig(**sizes)
        except TypeError as error:
            raise DataError(f"{where}: {error}; copy the encoder's full config.json there") from error

    @staticmethod
    def from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> "EncoderConfig":
        """Infer the sizes from an encoder's tensors, with heads 64 wide and the published constants for the rest."""
        vocab_size, hidden_size = shapes["embeddings.word_embeddings.weight"]
        layers = {int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layer.")}
        return EncoderConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=len(layers),
            num_attention_heads=max(1, hidden_size // _HEAD_WIDTH),
            intermediate_size=shapes["encoder.layer.0.intermediate.dense.weight"][0],
            position_buckets=shapes["encoder.rel_embeddings.weight"][0] // 2,
        )


_FAMILY: dict[str, Any] = {
    "relative_attention": True,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "hidden_act": "gelu",
}


def log_buckets(num_distances: int, position_buckets: int, max_position: int) -> Tensor:
    """Return the bucket of each distance 0, 1, ..., ``num_distances`` - 1 as int64 (R,).

    It is the distance itself up to half of the buckets, then logarithmic steps that end at ``max_position``. Negative
    distances have the negated bucket.
    """
    distance = torch.arange(num_distances, dtype=torch.float32)
    half = position_buckets // 2
    last = torch.log(torch.tensor((max_position - 1) / half))
    steps = torch.ceil(torch.log(distance.clamp(min=half) / half) / last * (half - 1)) + half
    return torch.where(distance <= half, distance, steps).long()


class SelfAttention(nn.Module):
    """Disentangled attention: content to content, content to position and position to content."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.value_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = config.attention_probs_dropout_prob
        self.scale = (3 * config.hidden_size // config.num_attention_heads) ** -0.5

    def positions(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Project relative position embeddings (R, E) to keys and queries (H, R, D), already scaled."""
        keys = self._heads(self.key_proj(embeddings)[None])[0] * self.scale
        queries = self._heads(self.query_proj(embeddings)[None])[0] * self.scale
        return keys, queries

    def forward(
        self, states: Tensor, read: Tensor, keys: Tensor, queries: Tensor, index: Tensor, padding: Tensor | None
    ) -> Tensor:
        """Attend from the states ``read`` (B, Q, E) to all ``states`` (B, L, E); returns (B, Q, E).

        ``keys`` and ``queries`` are position projections (H, R, D), ``index`` (B or 1, 1, Q, L) says which of the R
        applies to a query and a key, ``padding`` (B, L) is true at tokens nobody may attend to.
        """
        query, key = self._heads(self.query_proj(read)), self._heads(self.key_proj(states))
        value = self._heads(self.value_proj(states))
        scores_per_head = query.shape[0] * query.shape[2] * key.shape[2]
        together = max(1, _SCORES_AT_ONCE.get(query.device.type, _SCORES_AT_ONCE["cuda"]) // scores_per_head)
        mixed = []
        for first in range(0, self.num_heads, together):
            some = slice(first, first + together)
            part = query[:, some], key[:, some], value[:, some], keys[some], queries[some]
            mixed.append(self._attend(*part, index, padding))
        return torch.cat(mixed, dim=1).transpose(1, 2).flatten(2)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        queries: Tensor,
        index: Tensor,
        padding: Tensor | None,
    ) -> Tensor:
        """Attend with some of the heads; the first three are (B, H, Q or L, D), the result is (B, H, Q, D)."""
        index = index.expand(*query.shape[:2], -1, -1)
        bias = torch.matmul(query, keys.transpose(-1, -2)).gather(-1, index)
        by_key = torch.matmul(key, queries.transpose(-1, -2)).gather(-1, index.transpose(-1, -2))
        bias = bias.add_(by_key.transpose(-1, -2))
        if padding is not None:
            bias = bias.masked_fill_(padding[:, None, None, :], float("-inf"))
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=self.scale)

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], self.num_heads, -1).transpose(1, 2)


class Residual(nn.Module):
    """A linear map, added to its layer's input and normalized."""

    def __init__(self, width: int, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """Project, add the residual and normalize: (..., width) and (..., hidden) to (..., hidden)."""
        normalized: Tensor = self.LayerNorm(self.dropout(self.dense(states)) + residual)
        return normalized


class Layer(nn.Module):
    """One layer, with the parameter names of transformers."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        output = Residual(config.hidden_size, config)
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": output})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = Residual(config.intermediate_size, config)

    def forward(self, states: Tensor, read: Tensor, *positions: Tensor, padding: Tensor | None) -> Tensor:
        """Compute the layer's output at the states ``read`` (B, Q, E) of ``states`` (B, L, E)."""
        attended = self.attention["output"](self.attention["self"](states, read, *positions, padding), read)
        output: Tensor = self.output(F.gelu(self.intermediate["dense"](attended)), attended)
        return output


class Encoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        words = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.embeddings = nn.ModuleDict({"word_embeddings": words, "LayerNorm": norm})
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = nn.ModuleDict(
            {
                "layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
                "rel_embeddings": nn.Embedding(2 * config.position_buckets, config.hidden_size),
                "LayerNorm": nn.LayerNorm(config.hidden_size, config.layer_norm_eps),
            }
        )
        self.apply(_initialize)

    def positions(self) -> Positions:
        """The position projections of every layer. They change only with the weights: compute once, use many times."""
        embeddings = self.dropout(self.encoder["LayerNorm"](self.encoder["rel_embeddings"].weight))
        return [layer.attention["self"].positions(embeddings) for layer in self._layers]

    def forward(
        self, input_ids: Tensor, padding: Tensor | None, read: Tensor, positions: Positions | None = None
    ) -> Tensor:
        """Return the last hidden states (B, Q, E) at the token positions ``read`` (B, Q).

        ``input_ids`` is (B, L); ``padding`` (B, L) is true at padding (None: there is none). Padding is never attended
        to, so a sequence's states do not depend on the rest of the batch beyond floating-point noise.
        """
        states: Tensor = self.dropout(self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](input_ids)))
        index, window = self._relative_index(input_ids.shape[1], input_ids.device)
        index_read = index[read][:, None]
        last = len(self._layers) - 1
        for number, (layer, (keys, queries)) in enumerate(
            zip(self._layers, positions or self.positions(), strict=True)
        ):
            near = keys[:, window], queries[:, window]
            if number < last:
                states = layer(states, states, *near, index[None, None], padding=padding)
            else:
                at = read[:, :, None].expand(-1, -1, states.shape[-1])
                states = layer(states, states.gather(1, at), *near, index_read, padding=padding)
        return states

    @property
    def _layers(self) -> list[Any]:
        layers: Any = self.encoder["layer"]
        return list(layers)

    def _relative_index(self, length: int, device: torch.device) -> tuple[Tensor, slice]:
        """Which position embedding applies to (query, key), counted within the slice of those that occur at all."""
        span = self.config.position_buckets
        buckets = log_buckets(length, span, self.config.max_position_embeddings).to(device)
        token = torch.arange(length, device=device)
        distance = token[:, None] - token[None, :]
        bucket = buckets[distance.abs()] * distance.sign()
        index = (bucket + span).clamp(0, 2 * span - 1)
        reach = min(int(buckets[-1]), span)
        window = slice(span - reach, min(span + reach + 1, 2 * span))
        return index - window.start, window


def _initialize(module: nn.Module) -> None:
    """Fresh weights as transformers draws them; a loaded checkpoint replaces all of them."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
