"""The pages of docs: figures that are what their arithmetic gives, fields that recipes have."""

import contextlib
import dataclasses
import io
import re
from pathlib import Path

import pytest

from aipo_hpc.recipe import Recipe, known_recipes
from aipo_hpc.settings import everything

DOCS = Path(__file__).resolve().parents[1] / "docs"
SECTIONS = {field.name for field in dataclasses.fields(Recipe) if dataclasses.is_dataclass(field.default)}


def fields(text: str) -> set[str]:
    """Fields of recipes that a text names: ``train.beta``, ``generate.resources.nodes``."""
    found = re.findall(rf"(?<![\w./-])((?:{'|'.join(sorted(SECTIONS))})(?:\.[a-z_0-9]+)+)", text)
    return {name for name in found if not name.endswith((".py", ".parquet", ".json"))}


def is_field(name: str) -> bool:
    value = everything(Recipe())
    for part in name.split("."):
        found = {key.rstrip("_"): each for key, each in value.items()}
        if part not in found:
            return False
        value = found[part]
    return True


def test_the_figures_of_the_sizes_are_what_the_arithmetic_gives() -> None:
    text = (DOCS / "sizing.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    lines = printed.getvalue().splitlines()
    assert len(lines) == 9
    for line in lines:
        assert line in text.splitlines(), line
    over = [line for line in lines[:5] if float(line.split("|")[-2]) > 72]
    assert [line.split("|")[1:3] for line in over] == [[" 70B ", " 16 "]]


@pytest.mark.parametrize("page", ["sizing.md", "extending.md"])
def test_every_field_that_a_page_names_is_there(page: str) -> None:
    named = fields((DOCS / page).read_text(encoding="utf-8"))
    assert named and not {name for name in named if not is_field(name)}


def test_every_field_on_the_right_of_the_map_from_aipo_is_there() -> None:
    rows = [line.split("|") for line in (DOCS / "from_aipo.md").read_text(encoding="utf-8").splitlines()]
    right = [row[2] for row in rows if len(row) == 4]
    named = {name for text in right for name in fields(text)}
    assert len(named) > 60
    assert not {name for name in named if not is_field(name)}
    recipes = {name for text in right for name in re.findall(r"recipe=([a-z]\S+?)[`,]", text)}
    assert recipes <= set(known_recipes()), recipes
