"""How a field of a settings dataclass says what it is.

Settings are flat frozen dataclasses. A field decides the *content* of what is computed, and so belongs to the
fingerprint of its job, unless it is declared with ``tuning(default)``: batch sizes, resources, intervals, where to run.
"""

import dataclasses
from typing import Any

_TUNING = "tuning"


def tuning(default: Any) -> Any:
    """Declare a field that changes how fast or where a result is computed, never the result."""
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata={_TUNING: True})
    return dataclasses.field(default=default, metadata={_TUNING: True})


def content(settings: Any) -> dict[str, Any]:
    """Return the fields of ``settings`` that decide content, as plain JSON values, nested dataclasses included."""
    return {
        field.name: plain(getattr(settings, field.name), content)
        for field in dataclasses.fields(settings)
        if not field.metadata.get(_TUNING)
    }


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
