"""Strict construction of dataclasses from plain JSON data."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from wam_policy.errors import ConfigError

T = TypeVar("T")


def from_plain(kind: type[T], data: Any, where: str = "") -> T:
    """Build a dataclass from plain JSON data.

    Args:
        kind: Dataclass to build; its annotations define the accepted types.
        data: Dict of fields, as `json.loads` returns it.
        where: Dotted path of `data` in the file, for error messages.

    Returns:
        An instance of `kind`.

    Raises:
        ConfigError: A field is missing, unknown or has the wrong type.
    """
    if not isinstance(data, Mapping):
        raise _error(where or "root", f"expected an object, got {data!r}")

    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    required = {name for name, field in fields.items() if _is_required(field)}
    missing = sorted(required - set(data))
    unknown = sorted(set(data) - set(fields))
    if unknown or missing:
        raise _error(where or "root", f"missing {missing}, unknown {unknown}")

    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in data.items():
        path = f"{where}.{name}".lstrip(".")
        values[name] = _value(hints[name], value, path)
    return kind(**values)


def _error(where: str, message: str) -> ConfigError:
    """Return the error of an entry at a dotted path."""
    return ConfigError(f"config entry {where!r}: {message}")


def _is_required(field: dataclasses.Field[Any]) -> bool:
    """Return whether a field has no default."""
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _value(hint: Any, value: Any, where: str) -> Any:
    """Convert one JSON value to the type of an annotation."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union_value(arguments, value, where)
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, list):
        return _tuple_value(arguments, value, where)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        _, item_type = arguments
        return {key: _value(item_type, item, f"{where}.{key}") for key, item in value.items()}

    if origin is Literal:
        if value not in arguments:
            raise _error(where, f"expected one of {list(arguments)}, got {value!r}")
        return value

    # An integer such as 1 is a valid float; a bool is an int in Python, but not a number here.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number:
        if not math.isfinite(value):
            raise _error(where, f"expected a finite number, got {value}")
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    expected = getattr(hint, "__name__", hint)
    raise _error(where, f"expected {expected}, got {value!r}")


def _union_value(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Convert one JSON value to a member of a union, such as an optional type."""
    if value is None and type(None) in kinds:
        return None
    candidates = [kind for kind in kinds if kind is not type(None)]

    # Several dataclasses: choose the one that shares most fields with the object.
    if len(candidates) > 1 and isinstance(value, Mapping):
        candidates.sort(key=lambda kind: _shared_fields(kind, value), reverse=True)
    return _value(candidates[0], value, where)


def _shared_fields(kind: Any, data: Mapping[str, Any]) -> int:
    """Return the number of fields of a dataclass that occur in `data`."""
    names = {field.name for field in dataclasses.fields(kind)}
    return len(data.keys() & names)


def _tuple_value(kinds: tuple[Any, ...], items: list[Any], where: str) -> tuple[Any, ...]:
    """Convert a JSON list to a tuple; all items have the type of the first one."""
    has_fixed_length = kinds[-1] is not Ellipsis
    if has_fixed_length and len(kinds) != len(items):
        raise _error(where, f"expected {len(kinds)} values, got {items!r}")

    values = []
    for i, item in enumerate(items):
        values.append(_value(kinds[0], item, f"{where}[{i}]"))
    return tuple(values)
