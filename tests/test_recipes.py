"""Recipes that come along, pinned: what each resolves to is in tests/recipes, so that no default changes one unseen.

After a change that is meant, write the files again and read what git says of them:

    python tests/test_recipes.py
"""

import json
from pathlib import Path
from typing import Any

import pytest

from aipo_hpc.recipe import Recipe, known_recipes, load_recipe
from aipo_hpc.settings import everything

PINNED = Path(__file__).parent / "recipes"
NAMES = [name for name in known_recipes() if name != "demo"]
"""The demo's models are paths of this checkout."""


def resolved(name: str) -> dict[str, Any]:
    """All settings of a recipe."""
    return everything(load_recipe(name))


def new_defaults(pinned: dict[str, Any], now: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """What is pinned, with fields that came later at their defaults."""
    return {
        key: new_defaults(pinned[key], value, default[key])
        if key in pinned
        and isinstance(value, dict)
        and isinstance(pinned[key], dict)
        and isinstance(default[key], dict)
        else pinned.get(key, default[key])
        for key, value in now.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_resolves_to_what_is_pinned(name: str) -> None:
    pinned, now = json.loads((PINNED / f"{name}.json").read_text()), resolved(name)
    expected = new_defaults(pinned, now, everything(Recipe()))
    assert now == expected, "recipe changed; if that is meant: python tests/test_recipes.py"


def test_every_pinned_recipe_is_there_and_every_recipe_is_pinned() -> None:
    assert sorted(path.stem for path in PINNED.glob("*.json")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_states_its_source_and_what_it_copies(name: str) -> None:
    from aipo_hpc.recipe import recipes_folder

    text = (recipes_folder() / f"{name}.py").read_text(encoding="utf-8")
    assert text.startswith(f'"""{name}: ')
    assert "arXiv 2" in text or "bytedance/AIPO" in text


if __name__ == "__main__":
    PINNED.mkdir(exist_ok=True)
    for stale in PINNED.glob("*.json"):
        stale.unlink()
    for each in NAMES:
        (PINNED / f"{each}.json").write_text(json.dumps(resolved(each), indent=1) + "\n")
        print(PINNED / f"{each}.json")
