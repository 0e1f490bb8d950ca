"""Settings: which fields decide content, and the way to JSON and back."""

from dataclasses import dataclass, field

import pytest

from aipo_hpc.errors import RecipeError
from aipo_hpc.recipe import Recipe, known_recipes, load_recipe
from aipo_hpc.settings import content, everything, from_plain, tuning
from aipo_hpc.stage_table import STAGES


@dataclass(frozen=True)
class Inner:
    size: int = 3
    speed: int = tuning(1)


@dataclass(frozen=True)
class Outer:
    rate: float = 0.5
    words: tuple[str, ...] = ("a", "b")
    inner: Inner = Inner()
    extra: dict[str, str] = field(default_factory=dict)
    where: str | None = tuning(None)
    shape: Inner = tuning(Inner())


def test_content_leaves_tuning_out_at_every_depth() -> None:
    assert content(Outer()) == {"rate": 0.5, "words": ["a", "b"], "inner": {"size": 3}, "extra": {}}


def test_everything_keeps_all() -> None:
    assert everything(Outer())["inner"] == {"size": 3, "speed": 1}
    assert everything(Outer())["shape"] == {"size": 3, "speed": 1} and everything(Outer())["where"] is None


@pytest.mark.parametrize("settings", [Outer(), Outer(1.5, ("c",), Inner(4, 5), {"k": "v"}, "there", Inner(6))])
def test_settings_come_back_as_they_were(settings: Outer) -> None:
    assert from_plain(Outer, everything(settings)) == settings


@pytest.mark.parametrize("name", known_recipes())
def test_recipes_come_back_as_they_were(name: str) -> None:
    recipe = load_recipe(name)
    assert from_plain(Recipe, everything(recipe)) == recipe


@pytest.mark.parametrize("name", [name for name in STAGES if name != "touch"])
def test_stages_settings_come_back_as_they_were(name: str) -> None:
    settings = STAGES[name].config()
    assert from_plain(STAGES[name].config, everything(settings)) == settings


def test_a_whole_float_and_an_integer_are_the_same_content() -> None:
    assert content(Outer(rate=1.0)) == content(Outer(rate=1)) and isinstance(content(Outer(rate=1.0))["rate"], int)
    assert content(Outer(rate=1e300))["rate"] == 1e300


def test_a_name_that_the_settings_do_not_have_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"Inner has no field 'colour'; it has \['size', 'speed'\]"):
        from_plain(Outer, {"inner": {"colour": 1}})


def test_a_default_that_settings_would_share_and_change_is_refused() -> None:
    with pytest.raises(ValueError, match="mutable default"):

        @dataclass(frozen=True)
        class Shared:
            flags: list[str] = tuning(["x"])
