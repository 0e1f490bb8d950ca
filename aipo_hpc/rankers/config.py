"""Which rankers there are, and their settings.

``RankConfig`` and ``EvaluateConfig`` extend ``RankerConfig``; the model of a ranker is an input of its job, known by what it
holds, so that where it lies is no setting of the job.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, ClassVar

from aipo_hpc.engines import EngineConfig, check_engine
from aipo_hpc.errors import RecipeError
from aipo_hpc.settings import memory_bound

POLICY = "policy"
"""As a model's name: the policy of the iteration judges itself (in ``evaluate``: the initial policy does)."""


@dataclass(frozen=True)
class Kind:
    """One line of the table of rankers: its module, and whether its model is put to conversations or is a causal LM."""

    module: str
    chat: bool = False
    """The model's tokenizer needs a chat template."""
    judge: bool = False
    """The model is a language model that is asked: it has settings of its own, and may be the policy."""


RANKERS: Mapping[str, Kind] = {
    "pairrm": Kind("aipo_hpc.rankers.pairrm"),
    "llm_blender": Kind("aipo_hpc.rankers.llm_blender"),
    "reward_model": Kind("aipo_hpc.rankers.reward_model", chat=True),
    "judge": Kind("aipo_hpc.rankers.judge", chat=True, judge=True),
    "pairwise_judge": Kind("aipo_hpc.rankers.pairwise_judge", chat=True, judge=True),
}
ENSEMBLE = "ensemble"
COMBINATIONS = ("rank_average", "majority")


@dataclass(frozen=True)
class JudgeConfig(EngineConfig):
    """How a language model that judges is asked. Three replies a candidate are self-rewarding's (arXiv 2401.10020)."""

    section: ClassVar[str] = "rank.judge"
    num_samples: int = 3
    """Replies per question, averaged."""
    temperature: float = 0.7
    """Sampling temperature of the replies (0: greedy; then one sample says all)."""
    top_p: float = 0.9
    """Nucleus probability mass."""
    max_tokens: int = 512
    """Longest reply in tokens."""
    max_prompt_tokens: int = 4096
    """Longest question in tokens: rubric, conversation and response; longer responses are cut, and counted."""


@dataclass(frozen=True)
class SingleConfig:
    """One ranker and its model."""

    ranker: str = "pairrm"
    """Which ranker: pairrm, llm_blender, reward_model, judge, pairwise_judge, ensemble."""
    model_name_or_path: str = ""
    """The ranker's model: a folder or a model id on the hub; for a judge also 'policy', the iteration's own."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub (None: its main branch)."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the ranker's model."""
    dtype: str = "float32"
    """Precision of pairrm's and reward_model's arithmetic: float32 (the reference), bfloat16 or float16 (faster)."""
    tokens_per_batch: int | None = memory_bound(None, unset=2048)
    """Tokens of one forward pass, padding included (None: 2048 on a CPU, 16384 on a GPU)."""
    max_length: int | None = None
    """Longest conversation in tokens that reward_model reads (None: as long as the model can)."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass(frozen=True)
class MemberConfig(SingleConfig):
    """A ranker of an ensemble."""

    name: str = ""
    """Its name in the ensemble (empty: the ranker's)."""

    @property
    def label(self) -> str:
        """The name that it goes by."""
        return self.name or self.ranker


@dataclass(frozen=True)
class RankerConfig(SingleConfig):
    """A ranker, which may be an ensemble of others."""

    members: tuple[MemberConfig, ...] = ()
    """The rankers of an ensemble, each with its own model (set in a recipe file)."""
    combine: str = "rank_average"
    """How an ensemble decides: rank_average (mean of the members' ranks) or majority (of the members, pair by pair)."""


def models(config: RankerConfig) -> dict[str, SingleConfig]:
    """The models that a job with this ranker needs: the name of the input, and the settings of the ranker that reads it."""
    if config.ranker != ENSEMBLE:
        return {"ranker": config}
    return {f"ranker.{member.label}": member for member in config.members}


def without_models(config: Any) -> Any:
    """Settings without what is not content: where models lie, and how a judge is asked where there is none."""
    plain = replace(config, model_name_or_path="", revision=None, trust_remote_code=False)
    if config.ranker not in RANKERS or not RANKERS[config.ranker].judge:
        plain = replace(plain, judge=JudgeConfig())
    if isinstance(config, RankerConfig):
        ensemble = config.ranker == ENSEMBLE
        members = tuple(map(without_models, config.members)) if ensemble else ()
        plain = replace(plain, members=members, combine=config.combine if ensemble else RankerConfig.combine)
    return plain


def check_ranker(config: RankerConfig, section: str = "rank") -> None:
    """Make sure that the settings make sense, without importing a ranker; raises RecipeError for the first that does not."""
    _check_single(config, section, (*RANKERS, ENSEMBLE))
    if config.ranker != ENSEMBLE:
        return
    if config.combine not in COMBINATIONS:
        raise RecipeError(
            f"{section}.combine={config.combine!r}: no such way to combine; there are {', '.join(COMBINATIONS)}."
        )
    if len(config.members) < 2:
        raise RecipeError(
            f"{section}.ranker='ensemble' with {len(config.members)} members: give {section}.members of at least two "
            "MemberConfig, each with its ranker and model_name_or_path, in a recipe file."
        )
    labels = [member.label for member in config.members]
    for number, member in enumerate(config.members):
        where = f"{section}.members[{number}]"
        _check_single(member, where, tuple(RANKERS))
        if labels.count(member.label) > 1:
            raise RecipeError(f"{where}: two members are called {member.label!r}; give each a name of its own.")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", member.label):
            raise RecipeError(f"{where}.name={member.label!r}: use letters, digits, _ and - only.")


def check_models(config: RankerConfig, section: str = "rank") -> None:
    """Make sure that every ranker has a model; raises RecipeError."""
    for name, single in models(config).items():
        where = f"{section}.model_name_or_path" if name == "ranker" else f"the model_name_or_path of {section}'s {name}"
        if not single.model_name_or_path:
            raise RecipeError(f"{where} is not set: give the ranker's model, a path or hub name.")
        if single.model_name_or_path == POLICY and not RANKERS[single.ranker].judge:
            raise RecipeError(f"{where}='policy': a policy can be a judge or pairwise_judge, not a {single.ranker}.")


def _check_single(config: SingleConfig, section: str, known: tuple[str, ...]) -> None:
    if config.ranker not in known:
        close = get_close_matches(config.ranker, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise RecipeError(f"{section}.ranker={config.ranker!r}: unknown ranker; {hint}known: {', '.join(known)}")
    if config.ranker != ENSEMBLE and RANKERS[config.ranker].judge:
        check_engine(config.judge)
    judge = config.judge
    wrong = [
        (judge.num_samples < 1, f"judge.num_samples={judge.num_samples}: must be at least 1."),
        (judge.temperature < 0, f"judge.temperature={judge.temperature}: must not be negative."),
        (judge.max_tokens < 1, f"judge.max_tokens={judge.max_tokens}: must be at least 1."),
        (judge.max_prompt_tokens < 1, f"judge.max_prompt_tokens={judge.max_prompt_tokens}: must be at least 1."),
        (
            config.tokens_per_batch is not None and config.tokens_per_batch < 1,
            f"tokens_per_batch={config.tokens_per_batch}: give a positive number or None.",
        ),
        (
            config.max_length is not None and config.max_length < 1,
            f"max_length={config.max_length}: give a positive number or None.",
        ),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise RecipeError(f"{section}.{message}")
