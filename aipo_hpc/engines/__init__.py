"""Engines sample responses. One file each; this is what they have in common."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Protocol

from aipo_hpc.errors import RecipeError

if TYPE_CHECKING:
    from aipo_hpc.stages.generate import GenerateConfig

ENGINES = ("vllm", "transformers")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Request:
    """One candidate to sample: the prompt as token ids, and the seed of its own random numbers."""

    prompt_id: str
    candidate: int
    prompt_token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """What became of a request. ``finish_reason``: ``stop`` or ``length``; with an ``error``, the text is empty."""

    request: Request
    text: str
    finish_reason: str
    num_tokens: int
    error: str | None = None


class Engine(Protocol):
    """A loaded model."""

    def generate(self, requests: Sequence[Sequence[Request]]) -> Iterator[Completion]:
        """Yield completions as they finish, in any order; ``requests`` holds the candidates of one prompt together.

        A request that the engine refuses gives a Completion with an error; the others are not hurt.
        """
        ...


def load_engine(config: "GenerateConfig", model: str) -> Engine:
    """Load ``model`` into the engine that ``config.engine`` names."""
    if config.engine == "vllm":
        from aipo_hpc.engines.vllm import VllmEngine

        return VllmEngine(config, model)
    if config.engine == "transformers":
        from aipo_hpc.engines.transformers import TransformersEngine

        return TransformersEngine(config, model)
    raise unknown_engine(config.engine)


def prompts_per_batch(config: "GenerateConfig") -> int:
    """How many prompts a resumed shard asks for together: vllm batches as requests come, so there each is on its own."""
    return config.batch_size if config.engine == "transformers" else 1


def unknown_engine(name: str) -> RecipeError:
    """The error for an engine that is not there."""
    close = get_close_matches(name, ENGINES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return RecipeError(f"generate.engine={name!r}: no such engine; there are {', '.join(ENGINES)}.{hint}")
