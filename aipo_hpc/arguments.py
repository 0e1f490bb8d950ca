"""Command-line arguments that describe a run: ``recipe=demo generate.n=8`` and ``--generate.n 8`` are the same thing."""

import re
from collections.abc import Sequence

import tyro

from aipo_hpc.recipe import Recipe, known_recipes, load_recipe

DEFAULT_RECIPE = "demo"

_ASSIGNMENT = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)


def parse_recipe(arguments: Sequence[str], program: str) -> Recipe:
    """The recipe that the arguments name, with the fields they set.

    Raises RecipeError for an unknown recipe; exits with code 2, and a suggestion, for an unknown field.
    """
    name, tokens = split_recipe(arguments)
    return tyro.cli(
        Recipe,
        default=load_recipe(name),
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


def split_recipe(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Take the recipe's name out and turn ``field=value`` into what tyro reads."""
    name = DEFAULT_RECIPE
    tokens: list[str] = []
    waiting = list(arguments)
    while waiting:
        token = waiting.pop(0)
        found = _ASSIGNMENT.fullmatch(token.removeprefix("--"))
        if token == "--recipe" and waiting:
            name = waiting.pop(0)
        elif found is not None and found.group(1) == "recipe":
            name = found.group(2)
        elif found is not None:
            value = {"true": "True", "false": "False", "none": "None", "null": "None"}.get(
                found.group(2), found.group(2)
            )
            tokens += [f"--{found.group(1)}", value]
        else:
            tokens.append(token)
    return name, tokens
