"""A reward model: any sequence classification model with one logit, which is the score of a conversation with its answer.

The conversation is put to it by its own chat template, as ids in one step, so that no second beginning-of-sequence token
slips in; an answer that is too long is cut, not the template around it. A checkpoint without a trained head is refused:
transformers would draw one at random.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from aipo_hpc.chat import conversation_ids, load_tokenizer
from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.own_code import is_trusted
from aipo_hpc.rankers import NO_CANDIDATES, NOT_FINITE, TOO_LONG, Ranking, failed, ranks_of
from aipo_hpc.rankers.batching import token_batches
from aipo_hpc.rankers.config import SingleConfig
from aipo_hpc.rankers.fitting import fit
from aipo_hpc.rows import Message, Responses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}
_NO_LIMIT = 10**9
"""What tokenizers say that know none is larger."""


def load(config: SingleConfig, model: str, seed: int) -> "RewardModel":
    """Load the ranker that the settings name; nothing in it is drawn.

    Raises DataError for a model that cannot be loaded, has not one logit, no trained head or no chat template.
    """
    from transformers import AutoModelForSequenceClassification

    if config.dtype not in DTYPES:
        raise RecipeError(f"rank.dtype={config.dtype!r}: choose one of {', '.join(DTYPES)}")
    tokenizer = load_tokenizer(model, config.revision)
    try:
        loaded, info = AutoModelForSequenceClassification.from_pretrained(
            model,
            revision=config.revision,
            dtype=DTYPES[config.dtype],
            output_loading_info=True,
            trust_remote_code=is_trusted(model),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"reward model {model!r} cannot be loaded: {error}\n"
            "Give the folder or hub name of a sequence classification model with one logit."
        ) from error
    if loaded.config.num_labels != 1:
        raise DataError(
            f"reward model {model!r} has {loaded.config.num_labels} logits where a reward has one. Give another model, or "
            "use ranker=judge for a language model."
        )
    if info["missing_keys"]:
        raise DataError(
            f"reward model {model!r}: its checkpoint lacks {sorted(info['missing_keys'])[:3]}, which would be drawn at "
            "random. Give a model that was trained as a reward model."
        )
    return RewardModel(loaded, tokenizer, max_length=config.max_length, tokens_per_batch=config.tokens_per_batch)


class RewardModel:
    """A sequence classification model with its tokenizer."""

    prompts_per_call = 64

    def __init__(
        self,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).eval()
        self._config = model.config.get_text_config()
        self._pad_token_id: int | None = self._config.pad_token_id
        self._tokenizer = tokenizer
        own = getattr(self._config, "max_position_embeddings", None) or _NO_LIMIT
        self._max_length = min(max_length or _NO_LIMIT, own, int(min(tokenizer.model_max_length, _NO_LIMIT)))
        self._tokens_per_batch = tokens_per_batch or _TOKENS_PER_BATCH[self._device.type]

    def rank(self, rows: Sequence[Responses]) -> list[Ranking]:
        """Score each candidate; a prompt that cannot be ranked gets a Ranking with an error."""
        read = [self._read(row) for row in rows]
        ids = list(dict.fromkeys(chain.from_iterable(each[0] for each in read if not isinstance(each, str))))
        scores = dict(zip(ids, self.scores(ids), strict=True))
        return [
            failed(each) if isinstance(each, str) else _ranking([scores[one] for one in each[0]], each[1])
            for each in read
        ]

    def scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The logit of each sequence of token ids; float32 whatever the model's precision."""
        found = [math.nan] * len(sequences)
        for batch in token_batches([len(ids) for ids in sequences], self._tokens_per_batch):
            rows = [sequences[index] for index in batch]
            pad = self._filler(rows)
            input_ids = torch.full((len(rows), len(rows[0])), pad)
            mask = torch.zeros_like(input_ids)
            for line, seen, ids in zip(input_ids, mask, rows, strict=True):
                line[: len(ids)] = torch.tensor(ids)
                seen[: len(ids)] = 1
            with torch.inference_mode():
                logits = self._model(input_ids=input_ids.to(self._device), attention_mask=mask.to(self._device)).logits
            for index, score in zip(batch, logits[:, 0].float().tolist(), strict=True):
                found[index] = score
        return found

    def _read(self, row: Responses) -> tuple[list[tuple[int, ...]], list[bool]] | str:
        """Token ids of the conversation with each candidate, and which were cut; or why that is not possible."""
        from jinja2 import TemplateError

        if not row.candidates:
            return NO_CANDIDATES
        ids, truncated = [], []
        for candidate in row.candidates:

            def encode(texts: Sequence[str]) -> list[int]:
                return conversation_ids(self._tokenizer, [*row.messages, Message("assistant", texts[0])])

            try:
                fitted = fit(self._tokenizer, encode, [candidate.response], self._max_length)
            except (TemplateError, UnicodeError, TypeError, ValueError) as error:
                return f"chat template: {error}"
            if fitted is None:
                return TOO_LONG
            ids.append(tuple(fitted[0]))
            truncated.append(fitted[1][0])
        return ids, truncated

    def _filler(self, rows: Sequence[Sequence[int]]) -> int:
        """What to pad with.

        Causal models read the logit at the last token that is not the padding token of their config. Where there is
        none, they read the very last token, and take no batch: then it is a token that no row of this batch ends with.
        """
        if self._pad_token_id is not None:
            return self._pad_token_id
        last = {ids[-1] for ids in rows}
        self._config.pad_token_id = next(token for token in range(len(last) + 1) if token not in last)
        return int(self._config.pad_token_id)


def _ranking(scores: Sequence[float], truncated: Sequence[bool]) -> Ranking:
    if not all(map(math.isfinite, scores)):
        return failed(NOT_FINITE)
    return Ranking(tuple(scores), ranks_of(scores), tuple(truncated))
