"""PairRM through its authors' package, llm-blender 0.0.2: the reference that our own implementation is held against.

The package was written for transformers 4. ``load`` mends, without touching its files, what has changed since:

1. ``transformers.utils.hub.TRANSFORMERS_CACHE``, which it imports, is gone;
2. ``batch_encode_plus``, which its collator calls, is gone;
3. ``from_pretrained`` keeps the precision on disk: the fp16 base model would round the fp32 ranker without a word;
4. ``DebertaV2Tokenizer`` is rebuilt without the checkpoint's character map, so non-ASCII text gets other token ids.

With the base model in reach (``model_name`` in the checkpoint's config.json is a local folder) it is loaded as the package
does; otherwise the encoder is built from the checkpoint's own sizes, since its weights replace the base model's anyway.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.rankers import NO_CANDIDATES, NOT_FINITE, Ranking, failed, pairrm_folder
from aipo_hpc.rankers.config import SingleConfig
from aipo_hpc.rankers.pairrm_tokens import PairTokens, clean_text
from aipo_hpc.rows import Responses


def load(config: SingleConfig, model: str, seed: int) -> "LLMBlender":
    """Load the ranker that the settings name; nothing in it is drawn."""
    return LLMBlender.load(model, revision=config.revision, dtype=config.dtype)


class LLMBlender:
    """Ranks one prompt at a time: in larger batches the package cuts candidates by the longest prompt of the batch."""

    prompts_per_call = 16

    def __init__(self, blender: Any, tokens: PairTokens) -> None:
        self.blender = blender
        """The package's ``Blender``, ranker loaded."""
        self._tokens = tokens

    @classmethod
    def load(cls, model_name_or_path: str, *, revision: str | None = None, dtype: str = "float32") -> "LLMBlender":
        """Load a checkpoint in the ``PairRM`` format from a folder or the model hub.

        Raises:
            RecipeError: llm-blender is not installed, or a dtype other than float32 is asked for.
            DataError: a file is missing or unreadable.
        """
        import torch

        if dtype != "float32":
            raise RecipeError(f"rank: dtype is {dtype!r}; the reference ranker llm_blender computes in float32 only")
        package = _import()
        folder = pairrm_folder.find(model_name_or_path, revision)
        settings = pairrm_folder.read_settings(folder)
        if "architectures" in settings:
            raise DataError(
                f"{folder / pairrm_folder.CONFIG}: this is the PairRM-hf format, which llm-blender does not read; "
                "use ranker=pairrm, or the checkpoint in the PairRM format (llm-blender/PairRM)"
            )
        tokenizer = pairrm_folder.read_tokenizer(folder, settings)
        blender = package.Blender(blender_config=package.BlenderConfig(use_tqdm=False))
        with _mended(folder, settings):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            blender.loadranker(str(folder), device=device, fp16=False)
        return cls(blender, PairTokens(tokenizer, settings["source_maxlength"], settings["candidate_maxlength"]))

    def rank(self, rows: Sequence[Responses]) -> list[Ranking]:
        """Rank each prompt's candidates; a prompt that cannot be ranked gets a Ranking with an error."""
        return [self._rank(row.prompt, [candidate.response for candidate in row.candidates]) for row in rows]

    def _rank(self, prompt: str, texts: Sequence[str]) -> Ranking:
        import numpy as np
        from llm_blender.blender.blender import get_ranks_from_scores

        if not texts:
            return failed(NO_CANDIDATES)
        encoded = self._tokens.encode(prompt, texts)
        scores = np.zeros(1)
        if len(texts) > 1:
            cleaned = [clean_text(text) for text in texts]
            (scores,) = self.blender.rank([clean_text(prompt)], [cleaned], return_scores=True, batch_size=1)
        if not np.isfinite(scores).all():
            return failed(NOT_FINITE)
        ranks = tuple(int(rank) for rank in get_ranks_from_scores(scores))
        return Ranking(tuple(map(float, scores)), ranks, encoded.truncated, prompt_truncated=encoded.prompt_truncated)


def _import() -> ModuleType:
    """Import the package with mends 1 and 2, which only give back names that are gone."""
    import transformers
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers import PreTrainedTokenizerBase

    if not hasattr(transformers.utils.hub, "TRANSFORMERS_CACHE"):
        transformers.utils.hub.TRANSFORMERS_CACHE = HF_HUB_CACHE  # type: ignore[attr-defined]
    if not hasattr(PreTrainedTokenizerBase, "batch_encode_plus"):
        PreTrainedTokenizerBase.batch_encode_plus = PreTrainedTokenizerBase.__call__  # type: ignore[attr-defined]
    try:
        with _without("vllm"):
            import llm_blender
            import safetensors.torch  # noqa: F401  the package uses it without importing it
    except ImportError as error:
        raise RecipeError(
            f"ranker llm_blender needs the package llm-blender ({error}); "
            "install aipo_hpc[llm-blender], or use ranker=pairrm, which gives the same ranks without it"
        ) from error
    package: ModuleType = llm_blender
    return package


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Hide an optional package: llm-blender imports vLLM where it is installed, slowly, and for generation only."""
    hidden = name not in sys.modules
    if hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[name]


@contextlib.contextmanager
def _mended(folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Mends 3 and 4, for the loading of one checkpoint."""
    import torch
    from llm_blender.blender import blender_utils
    from llm_blender.pair_ranker import model_util
    from transformers import AutoModel, DebertaV2Config, DebertaV2Model, PreTrainedTokenizerFast

    def build_tokenizer(model_name: str, **_: Any) -> Any:
        return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=pairrm_folder.read_tokenizer(folder, settings),
            cls_token=pairrm_folder.CLS,
            sep_token=pairrm_folder.SEP,
            pad_token=pairrm_folder.PAD,
            unk_token=pairrm_folder.UNK,
        )

    def build_pretrained_model(model_type: str, model_name: str, **_: Any) -> Any:
        if (Path(model_name) / pairrm_folder.CONFIG).is_file() and Path(model_name) != folder:
            model = AutoModel.from_pretrained(model_name, dtype=torch.float32, trust_remote_code=False)
        else:
            sizes = pairrm_folder.encoder_config(folder, settings, pairrm_folder.read_tensors(folder))
            model = DebertaV2Model(DebertaV2Config(**sizes.to_dict()))  # type: ignore[no-untyped-call]
        model.config.out_hidden_state_size = model.config.hidden_size
        return model

    with (
        mock.patch.object(blender_utils, "build_tokenizer", build_tokenizer),
        mock.patch.object(model_util, "build_pretrained_model", build_pretrained_model),
    ):
        yield
