"""Engines sample responses. One file each; this is what they have in common."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar, Protocol

from aipo_hpc.errors import RecipeError
from aipo_hpc.settings import memory_bound, tuning

ENGINES = ("vllm", "transformers")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is told: which one, how it samples, how much it may take. Whoever samples extends it."""

    section: ClassVar[str] = "engine"
    """Where a recipe has these settings, for messages."""
    engine: str = "vllm"
    """vllm, or transformers (CPU, small models)."""
    temperature: float = 1.0
    """Sampling temperature (0: greedy)."""
    top_p: float = 1.0
    """Nucleus probability mass."""
    top_k: int = 0
    """Most likely tokens to draw from (0: all)."""
    max_tokens: int = 512
    """Longest response in tokens."""
    max_prompt_tokens: int = 512
    """Longest prompt in tokens."""
    dtype: str = "bfloat16"
    """Precision of the weights: bfloat16, float16 or float32."""
    batch_size: int = 16
    """Prompts per batch of the transformers engine (its floating-point results depend on it)."""
    tensor_parallel_size: int = tuning(1)
    """GPUs that hold one copy of the model (vllm)."""
    gpu_memory_utilization: float = tuning(0.9)
    """Share of the GPU's memory that vllm takes."""
    max_num_seqs: int = memory_bound(256)
    """Sequences that vllm decodes at once."""
    enforce_eager: bool = tuning(False)
    """Skip vllm's graph capture: starts faster, decodes slower."""


@dataclass(frozen=True)
class Request:
    """One candidate to sample: the prompt as token ids, and the seed of its own random numbers.

    Sampling also ends where one of the texts of ``stop`` comes up, which is not part of the completion.
    """

    prompt_id: str
    candidate: int
    prompt_token_ids: tuple[int, ...]
    seed: int
    stop: tuple[str, ...] = ()
    temperature: float | None = None
    """None: the temperature of the engine's settings."""


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

    def generate(self, requests: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Yield completions as they finish, in any order; ``requests`` holds the candidates of one prompt together.

        Requests are taken when they are begun, not before.

        A request that the engine refuses gives a Completion with an error; the others are not hurt.
        """
        ...


def load_engine(config: EngineConfig, model: str) -> Engine:
    """Load ``model`` into the engine that ``config.engine`` names. Raises RecipeError if there is none of that name."""
    check_engine(config)
    if config.engine == "vllm":
        from aipo_hpc.engines.vllm import VllmEngine

        return VllmEngine(config, model)
    from aipo_hpc.engines.transformers import TransformersEngine

    return TransformersEngine(config, model)


def temperature_of(request: Request, config: EngineConfig) -> float:
    """The temperature at which a request is sampled (0: greedy)."""
    return config.temperature if request.temperature is None else request.temperature


def prompts_per_batch(config: EngineConfig) -> int:
    """How many prompts a resumed shard asks for together: vllm batches as requests come, so there each is on its own."""
    return config.batch_size if config.engine == "transformers" else 1


def check_engine(config: EngineConfig) -> None:
    """Make sure that there is an engine called ``config.engine``, without importing it; raises RecipeError."""
    if config.engine not in ENGINES:
        close = get_close_matches(config.engine, ENGINES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"{config.section}.engine={config.engine!r}: no such engine; there are {', '.join(ENGINES)}.{hint}"
        )
