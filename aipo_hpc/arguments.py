"""Command-line arguments that describe a run: ``recipe=demo generate.n=8`` and ``--generate.n 8`` are the same thing.

Fields that hold several values are given once per value, ``slurm.setup='module load cuda' slurm.setup='source env.sh'``, or
with the name of each, ``slurm.sbatch_args.reservation=maintenance``; or all after the field's name, ``--slurm.setup 'module
load cuda' 'source env.sh'``. They are added to those of the recipe.
"""

import dataclasses
import re
import typing
from collections import deque
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import tyro

from aipo_hpc.errors import RecipeError
from aipo_hpc.recipe import Recipe, known_recipes, load_recipe

DEFAULT_RECIPE = "demo"

_ASSIGNMENT = re.compile(r"(?:--)?([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)


def parse_recipe(arguments: Sequence[str], program: str) -> Recipe:
    """The recipe that the arguments name, with the fields they set.

    Raises RecipeError for an unknown recipe; exits with code 2, and a suggestion, for an unknown field.
    """
    name, tokens, entries = split_recipe(arguments)
    recipe = load_recipe(name)
    for path, value in entries:
        recipe = _put(recipe, path.split("."), value)
    return tyro.cli(
        Recipe,
        default=recipe,
        args=tokens,
        prog=program,
        description=(
            f"Fields of recipe={name}, with their defaults; set any as field=value or --field value. "
            f"Recipes: {', '.join(known_recipes())}, or the path of a Python file that defines recipe(). "
            "The same command starts a run and resumes it."
        ),
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )


def split_recipe(arguments: Sequence[str]) -> tuple[str, list[str], list[tuple[str, str]]]:
    """Take the recipe's name out, and turn both ways of setting a field into tyro's ``--field=value``.

    Also returns the entries of dict fields, by their dotted names, which tyro would only let change and not add.
    Raises RecipeError when the name of the recipe is missing.
    """
    kinds = {"recipe": str, **field_kinds(Recipe)}
    names = [DEFAULT_RECIPE]
    tokens: list[str] = []
    entries: list[tuple[str, str]] = []
    waiting = deque(arguments)
    while waiting:
        token = waiting.popleft()
        if found := _ASSIGNMENT.fullmatch(token):
            field, entry = _place(found[1], kinds)
            values = [found[2]]
        elif token.startswith("--") and waiting and _place(token[2:], kinds)[0] in kinds:
            field, entry = _place(token[2:], kinds)
            values = [waiting.popleft()]
            while (
                waiting
                and not entry
                and typing.get_origin(kinds[field]) in (tuple, dict)
                and _is_value(waiting[0], kinds)
            ):
                values.append(waiting.popleft())
        else:
            tokens.append(token)
            continue
        if field == "recipe":
            names += values
        elif entry:
            entries.append((f"{field}.{entry}", values[0]))
        elif typing.get_origin(kinds.get(field)) is dict and len(values) % 2 == 0:
            entries += [(f"{field}.{key}", value) for key, value in zip(values[::2], values[1::2], strict=True)]
        else:
            tokens += [f"--{field}={_spelled(value, kinds.get(field))}" for value in values]
    if "--recipe" in tokens or not names[-1]:
        raise RecipeError(
            f"recipe= names no recipe; there are {', '.join(known_recipes())}, or give the path of yours."
        )
    return names[-1], tokens, entries


def field_kinds(settings: Any, prefix: str = "") -> Mapping[str, Any]:
    """Types of all fields by their dotted names, nested settings included; lists of settings are for recipe files."""
    kinds: dict[str, Any] = {}
    hints, annotations = typing.get_type_hints(settings), typing.get_type_hints(settings, include_extras=True)
    for name in (field.name for field in dataclasses.fields(settings)):
        if tyro.conf.Suppress in getattr(annotations[name], "__metadata__", ()):
            continue
        kind, path = hints[name], _canonical(f"{prefix}{name}")
        if any(map(dataclasses.is_dataclass, typing.get_args(kind))):
            continue
        kinds.update(field_kinds(kind, f"{path}.") if dataclasses.is_dataclass(kind) else {path: kind})
    return kinds


def _place(name: str, kinds: Mapping[str, Any]) -> tuple[str, str]:
    """The field that a name means and, for an entry of a dict field, the entry's own name."""
    owner, _, entry = name.rpartition(".")
    owner = _canonical(owner)
    return (owner, entry) if typing.get_origin(kinds.get(owner)) is dict else (_canonical(name), "")


def _is_value(token: str, kinds: Mapping[str, Any]) -> bool:
    """Whether a token after a field of several values is one more of them, not the next field."""
    found = _ASSIGNMENT.fullmatch(token)
    return not (token.startswith("-") or (found is not None and _place(found[1], kinds)[0] in kinds))


def _put(settings: Any, path: Sequence[str], value: str) -> Any:
    """Settings with the entry of a dict field set."""
    if isinstance(settings, dict):
        return {**settings, path[0]: value}
    return dataclasses.replace(settings, **{path[0]: _put(getattr(settings, path[0]), path[1:], value)})


def _canonical(name: str) -> str:
    """One spelling of a field's name: ``--train.lambda-`` and ``train.lambda_`` are ``train.lambda``."""
    return name.replace("-", "_").rstrip("_")


def _spelled(value: str, kind: Any) -> str:
    """The words for true, false and none in any case, where the field can be that."""
    words = {"true": "True", "false": "False"} if kind is bool else {}
    if NoneType in typing.get_args(kind):
        words |= {"none": "None", "null": "None"}
    return words.get(value.lower(), value)
