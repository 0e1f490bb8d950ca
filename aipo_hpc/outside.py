"""What comes from outside a run: models and datasets, where they are and what they are."""

import dataclasses
from dataclasses import dataclass

from aipo_hpc import sources
from aipo_hpc.chat_templates import read_template, template_digest
from aipo_hpc.identity import identify
from aipo_hpc.rankers.config import POLICY, RankerConfig, models
from aipo_hpc.recipe import Recipe


@dataclass(frozen=True)
class Outside:
    """An input from outside the run: where it is now, and what it is (its identity, which is in the fingerprint)."""

    value: str
    identity: str
    revision: str | None = None
    chat_template: str | None = None
    """Text of the chat template that a model is used with in place of its own."""
    trust_remote_code: bool = False
    """Whether the code that comes with a model is run."""


def outside(name: str, revision: str | None = None) -> Outside:
    """A model or dataset from outside the run, with its identity."""
    return Outside(name, identify(name, revision), revision)


def trusting(source: Outside, trust_remote_code: bool) -> Outside:
    """A model whose own code is run, if so asked: that is another model than without."""
    if not trust_remote_code:
        return source
    return dataclasses.replace(source, identity=f"{source.identity} with its own code", trust_remote_code=True)


def policy_outside(recipe: Recipe) -> Outside:
    """The initial policy; another chat template than its own makes it another model."""
    policy = trusting(outside(recipe.model_name_or_path, recipe.revision), recipe.trust_remote_code)
    if recipe.chat_template is None:
        return policy
    template = read_template(recipe.chat_template)
    identity = f"{policy.identity} with chat template {template_digest(template)}"
    return dataclasses.replace(policy, identity=identity, chat_template=template)


def source_inputs(text: str, revision: str | None) -> dict[str, Outside]:
    """The datasets that a recipe names, as inputs; split and part are part of what they are."""
    inputs: dict[str, Outside] = {}
    for number, source in enumerate(sources.parse_all(text)):
        pinned = dataclasses.replace(source, revision=source.revision or revision)
        used = str(dataclasses.replace(source, name="", revision=None))
        identity = identify(source.name, pinned.revision) + used
        name = f"{sources.KIND}.{number:02d}" if number else sources.KIND
        inputs[name] = Outside(str(pinned), identity, pinned.revision)
    return inputs


def ranker_inputs(config: RankerConfig) -> dict[str, Outside | None]:
    """The models of a ranker as inputs of its job; None where a policy judges."""
    return {
        name: None
        if single.model_name_or_path == POLICY
        else trusting(outside(single.model_name_or_path, single.revision), single.trust_remote_code)
        for name, single in models(config).items()
    }
