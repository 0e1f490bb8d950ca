"""PairRM: compares two candidate responses at a time and ranks by the sum of all comparisons.

LLM-Blender, Jiang et al. 2023, arXiv 2306.02561. One comparison is the token sequence

    [CLS] <|source|> prompt [SEP]  [CLS] <|candidate1|> candidate i [SEP]  [CLS] <|candidate2|> candidate j [SEP]

With s, a, b the last hidden states at the three prefix tokens, m[i, j] = head([s, a]) - head([s, b]) says by how much
candidate i beats j. Both orders of each pair are compared; score i = mean over j of m[i, j] - m[j, i]. n candidates cost
n (n - 1) passes of the encoder.

What is cut: a prompt to ``source_maxlength`` tokens (1224), a candidate to ``candidate_maxlength`` (412) plus half of what
its own prompt leaves over. The budget is that of the prompt alone; llm-blender takes the longest prompt of the batch, and
so agrees exactly at ``batch_size=1`` only.

The verdict on a prompt does not depend on which other prompts are ranked with it, but for floating-point noise: matrix
kernels add in another order for another batch shape, about 1e-6 in a score at float32. Two candidates whose scores are
closer than that may swap ranks; equal candidates are scored once, and so tie exactly.
"""

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.rankers import NO_CANDIDATES, NOT_FINITE, Ranking, failed, pairrm_folder, ranks_of
from aipo_hpc.rankers.batching import token_batches
from aipo_hpc.rankers.config import SingleConfig
from aipo_hpc.rankers.deberta import Encoder, EncoderConfig, Positions
from aipo_hpc.rankers.pairrm_tokens import Comparison, Encoded, PairTokens
from aipo_hpc.rows import Responses

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}


class PairRMModel(nn.Module):
    """The network: an encoder and a head; parameter names are those of the published checkpoint."""

    def __init__(self, config: EncoderConfig, n_tasks: int = 1, drop_out: float = 0.05) -> None:
        super().__init__()
        self.pretrained_model = Encoder(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(drop_out),
            nn.Linear(2 * config.hidden_size, config.hidden_size),
            nn.Tanh(),
            nn.Dropout(drop_out),
            nn.Linear(config.hidden_size, n_tasks),
        )

    def forward(
        self, input_ids: Tensor, padding: Tensor | None, prefixes: Tensor, positions: Positions | None = None
    ) -> Tensor:
        """Return one logit per comparison (B,), positive where the first candidate is better; always float32.

        ``input_ids`` (B, L); ``padding`` (B, L) is true at padding, None without; ``prefixes`` (B, 3) are the positions
        of the prefix tokens; ``positions`` may be given to reuse ``pretrained_model.positions()``.
        """
        states = self.pretrained_model(input_ids, padding, prefixes, positions).float()
        source, first, second = states.unbind(1)
        left = self.head_layer(torch.cat([source, first], dim=-1))
        right = self.head_layer(torch.cat([source, second], dim=-1))
        logits: Tensor = (left - right).mean(-1)
        return logits


def load(config: SingleConfig, model: str, seed: int) -> "PairRM":
    """Load the ranker that the settings name; nothing in it is drawn."""
    return PairRM.load(model, revision=config.revision, dtype=config.dtype, tokens_per_batch=config.tokens_per_batch)


class PairRM:
    """A ranker. ``load`` or ``new`` makes one; ``rank`` uses it; ``compare`` trains it; ``save`` writes it."""

    prompts_per_call = 16

    def __init__(
        self,
        model: PairRMModel,
        tokenizer: Tokenizer,
        settings: dict[str, Any],
        *,
        tokens_per_batch: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.model = model.to(device)
        self.settings = settings
        self.device = torch.device(device)
        self.tokens_per_batch = tokens_per_batch or _TOKENS_PER_BATCH[self.device.type]
        self.tokens = PairTokens(tokenizer, settings["source_maxlength"], settings["candidate_maxlength"])

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        tokens_per_batch: int | None = None,
        device: str | None = None,
    ) -> "PairRM":
        """Load a checkpoint, in the ``PairRM`` or the ``PairRM-hf`` format, from a folder or the model hub.

        Args:
            model_name_or_path: a folder, or a model id such as ``llm-blender/PairRM``.
            revision: branch, tag or commit on the hub.
            dtype: float32 (the reference), bfloat16 or float16; the lower ones are faster and change some ranks.
            tokens_per_batch: tokens of one forward pass, padding included (None: 2048 on a CPU, 16384 on a GPU).
            device: None takes a GPU if there is one.

        Raises:
            DataError: a file is missing, unreadable, or does not hold such a ranker.
            RecipeError: an unknown dtype, or a batch of no tokens.
        """
        if dtype not in DTYPES:
            raise RecipeError(f"rank: dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
        if tokens_per_batch is not None and tokens_per_batch < 1:
            raise RecipeError(f"rank: tokens_per_batch is {tokens_per_batch}; give a positive number or None")
        folder = pairrm_folder.find(model_name_or_path, revision)
        settings = pairrm_folder.read_settings(folder)
        tokenizer = pairrm_folder.read_tokenizer(folder, settings)
        tensors = pairrm_folder.read_tensors(folder)
        config = pairrm_folder.encoder_config(folder, settings, tensors)
        if tokenizer.get_vocab_size() > config.vocab_size:
            raise DataError(
                f"ranker folder {folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model "
                f"{config.vocab_size} embeddings; the two files belong to different checkpoints"
            )
        with torch.device("meta"):
            model = PairRMModel(config, settings["n_tasks"], settings["drop_out"])
        _assign(model, tensors, folder / pairrm_folder.TENSORS)
        model.eval().pretrained_model.to(DTYPES[dtype])
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model, tokenizer, settings, tokens_per_batch=tokens_per_batch, device=device)

    @classmethod
    def new(cls, config: EncoderConfig, tokenizer: Tokenizer, **settings: Any) -> "PairRM":
        """Make an untrained ranker on the CPU.

        The prefix tokens are added to ``tokenizer`` if it lacks them, and the vocabulary size of ``config`` is set to the
        result; ``settings`` override those of the published ranker.
        """
        pairrm_folder.prepare_tokenizer(tokenizer)
        config = EncoderConfig(**{**config.__dict__, "vocab_size": tokenizer.get_vocab_size()})
        settings = pairrm_folder.RANKER_SETTINGS | settings
        return cls(PairRMModel(config, settings["n_tasks"], settings["drop_out"]), tokenizer, settings)

    def save(self, folder: Path) -> None:
        """Write the ranker in the published format: ``config.json``, ``model.safetensors``, ``tokenizer.json``."""
        config = self.model.pretrained_model.config
        pairrm_folder.write(folder, self.settings, config, self.model.state_dict(), self.tokens.tokenizer)

    def compare(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """Compare two candidates per prompt in one batch; returns logits (B,), differentiable in training mode."""
        rows = []
        for prompt, *pair in zip(prompts, first, second, strict=True):
            encoded = self.tokens.encode(prompt, pair)
            left, right = (encoded.different[index] for index in encoded.which)
            rows.append((encoded.source, left, right))
        return self._logits(rows, None)

    def rank(self, rows: Sequence[Responses]) -> list[Ranking]:
        """Rank each prompt's candidates by the prompt's text; one that cannot be ranked gets a Ranking with an error."""
        encoded = [self.tokens.encode(row.prompt, [each.response for each in row.candidates]) for row in rows]
        wins = [torch.zeros(len(item.different), len(item.different), dtype=torch.float64) for item in encoded]
        pairs = [
            (number, i, j)
            for number, item in enumerate(encoded)
            for i in range(len(item.different))
            for j in range(len(item.different))
            if i != j
        ]
        comparisons = [_comparison(encoded[number], i, j) for number, i, j in pairs]
        batches = list(token_batches([sum(map(len, parts)) for parts in comparisons], self.tokens_per_batch))
        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode():
            positions = self.model.pretrained_model.positions()
            logits = [self._logits([comparisons[index] for index in batch], positions) for batch in batches]
            values = torch.cat(logits).tolist() if logits else []
        self.model.train(was_training)
        for index, value in zip(chain.from_iterable(batches), values, strict=True):
            number, i, j = pairs[index]
            wins[number][i, j] = value
        return [_ranking(item, matrix) for item, matrix in zip(encoded, wins, strict=True)]

    def _logits(self, rows: Sequence[Comparison], positions: Positions | None) -> Tensor:
        input_ids, padding, prefixes = self.tokens.batch(rows)
        padding = None if padding is None else padding.to(self.device)
        logits: Tensor = self.model(input_ids.to(self.device), padding, prefixes.to(self.device), positions)
        return logits


def _comparison(encoded: Encoded, i: int, j: int) -> Comparison:
    return encoded.source, encoded.different[i], encoded.different[j]


def _ranking(encoded: Encoded, wins: Tensor) -> Ranking:
    """Turn the matrix of comparisons between the different candidates into scores and ranks of all candidates."""
    if not encoded.which:
        return failed(NO_CANDIDATES)
    if not bool(torch.isfinite(wins).all()):
        return failed(NOT_FINITE)
    # Equal candidates beat each other by the same amount either way, so they add nothing to each other's score.
    times = torch.bincount(torch.tensor(encoded.which)).double()
    by_difference = ((wins - wins.T) @ times / len(encoded.which)).tolist()
    scores = tuple(by_difference[index] for index in encoded.which)
    assert all(map(math.isfinite, scores))
    return Ranking(scores, ranks_of(scores), encoded.truncated, prompt_truncated=encoded.prompt_truncated)


def _assign(model: PairRMModel, tensors: dict[str, Tensor], path: Path) -> None:
    """Give ``model`` the tensors of a checkpoint, in float32, after checking names and shapes."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"lacks {name}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"has the unknown {name}" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"has {name} of shape {found[name]} instead of {wanted[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(
            f"{path}: {'; '.join(problems[:3])}{more}; this is not a PairRM checkpoint of the sizes in its config.json"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
