"""How a field of a settings dataclass says what it is.

Settings are flat frozen dataclasses. A field decides the *content* of what is computed, and so belongs to the
fingerprint of its job, unless it is declared with ``tuning(default)``: batch sizes, resources, intervals, where to run.
Of those, what ``memory_bound(default)`` declares is lowered for a shard that ran out of memory.
"""

import dataclasses
import typing
from typing import Any, TypeVar

from aipo_hpc.errors import RecipeError

Settings = TypeVar("Settings")
_TUNING, _BATCH = "tuning", "batch"


def tuning(default: Any) -> Any:
    """Declare a field that changes how fast or where a result is computed, never the result."""
    return dataclasses.field(default=default, metadata={_TUNING: True})


def memory_bound(default: Any, *, unset: int | None = None, divides: bool = False) -> Any:
    """Declare a ``tuning`` field, such as a batch size, that is lowered for a shard that ran out of memory.

    ``unset`` is where None starts from; with ``divides``, the lower value divides the one asked for.
    """
    return dataclasses.field(default=default, metadata={_TUNING: True, _BATCH: (unset, divides)})


def with_smaller_batches(settings: Settings, divisor: int) -> Settings:
    """The settings with every field that was declared with ``memory_bound`` divided, down to 1; nested ones too."""
    lowered: dict[str, Any] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        inner = getattr(settings, field.name)
        if dataclasses.is_dataclass(inner) and not isinstance(inner, type):
            lowered[field.name] = with_smaller_batches(inner, divisor)
        elif isinstance(inner, tuple):
            lowered[field.name] = tuple(
                with_smaller_batches(each, divisor) if dataclasses.is_dataclass(each) else each for each in inner
            )
        if _BATCH not in field.metadata or divisor == 1:
            continue
        unset, divides = field.metadata[_BATCH]
        value = unset if getattr(settings, field.name) is None else getattr(settings, field.name)
        lower = max(1, value // divisor)
        lowered[field.name] = next(each for each in range(lower, 0, -1) if value % each == 0) if divides else lower
    return dataclasses.replace(settings, **lowered)  # type: ignore[type-var]


def content(settings: Any) -> dict[str, Any]:
    """Return the fields of ``settings`` that decide content, as plain JSON values, nested dataclasses included."""
    return {
        field.name: _whole(plain(getattr(settings, field.name), content))
        for field in dataclasses.fields(settings)
        if not field.metadata.get(_TUNING)
    }


def _whole(value: Any) -> Any:
    """Whole floats as integers: a recipe that says 1 and a command line that says 1.0 mean the same thing."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def everything(settings: Any) -> dict[str, Any]:
    """Return all fields of ``settings`` as plain JSON values, nested dataclasses included."""
    return {field.name: plain(getattr(settings, field.name), everything) for field in dataclasses.fields(settings)}


def plain(value: Any, nested: Any) -> Any:
    """Turn one field's value into a JSON value; dataclasses go through ``nested``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return nested(value)
    if isinstance(value, (list, tuple)):
        return [plain(item, nested) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item, nested) for key, item in value.items()}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)


def _item(kind: Any, value: Any) -> Any:
    return from_plain(kind, value) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else value


def from_plain(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Make settings from what ``everything`` gave. Raises RecipeError for a name that the settings do not have."""
    hints = typing.get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - fields)
    if unknown:
        raise RecipeError(f"{kind.__name__} has no field {unknown[0]!r}; it has {sorted(fields)}")
    made: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            value = from_plain(typing.cast(type[Any], hints[name]), value)
        elif isinstance(value, list) and typing.get_origin(hints[name]) is tuple:
            value = tuple(_item(typing.get_args(hints[name])[0], each) for each in value)
        made[name] = value
    return kind(**made)
