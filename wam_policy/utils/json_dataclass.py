"""Builds dataclasses from JSON data: every entry must fit its annotation."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from wam_policy.errors import ConfigError

T = TypeVar("T")

# Integers are those that tensors and the libraries in C can hold, which have 64 bits with the sign.
_INTEGER_BITS = 63


def from_plain(kind: type[T], data: Any, where: str = "", *, foreign: bool = False) -> T:
    """Build a dataclass from JSON data.

    Args:
        kind: Dataclass.
        data: JSON object.
        where: Name of the entry, for errors.
        foreign: The data is another project's: entries that the dataclass does not have are
            ignored, and a float without a fraction may stand for an integer.

    Raises:
        ConfigError: The data do not fit the annotations.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"config entry {where or 'root'!r}: expected an object, got {data!r:.200}"
        )
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = [] if foreign else sorted(set(data) - set(fields))
    required = {
        name
        for name, field in fields.items()
        if field.default is field.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(data))
    if unknown or missing:
        raise ConfigError(f"config entry {where or 'root'!r}: missing {missing}, unknown {unknown}")

    values = {}
    for name in fields:
        if name in data:
            entry = f"{where}.{name}".lstrip(".")
            values[name] = _value(hints[name], data[name], entry, foreign)
    return kind(**values)


def _field_names(kind: type) -> set[str]:
    """Return the names of a dataclass's fields."""
    return {field.name for field in dataclasses.fields(kind)}


def _value(hint: Any, value: Any, where: str, foreign: bool) -> Any:
    """Return a value of `from_plain` converted to its annotation."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)

    # A union: None, or the dataclass that has most of these fields.
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        if len(kinds) > 1 and isinstance(value, Mapping):
            kinds.sort(key=lambda kind: -len(value.keys() & _field_names(kind)))
        return _value(kinds[0], value, where, foreign)

    # Containers.
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), value, where, foreign=foreign)
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is not Ellipsis and len(arguments) != len(value):
            raise ConfigError(
                f"config entry {where!r}: expected {len(arguments)} values, got {value!r:.200}"
            )
        return tuple(
            _value(arguments[0], item, f"{where}[{i}]", foreign) for i, item in enumerate(value)
        )
    if origin is list and isinstance(value, list):
        return [
            _value(arguments[0], item, f"{where}[{i}]", foreign) for i, item in enumerate(value)
        ]
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {
            key: _value(arguments[1], item, f"{where}.{key}", foreign)
            for key, item in value.items()
        }

    # Single values.
    if hint is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(
                f"config entry {where!r}: expected one of {list(arguments)}, got {value!r:.200}"
            )
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _finite(value, where)
    if hint is int and foreign and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is int and type(value) is int and value.bit_length() > _INTEGER_BITS:
        raise ConfigError(f"config entry {where!r}: the number is too large")
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ConfigError(
        f"config entry {where!r}: expected {getattr(hint, '__name__', hint)}, got {value!r:.200}"
    )


def _finite(value: int | float, where: str) -> float:
    """Return a number as a finite float."""
    try:
        number = float(value)
    except OverflowError as error:
        raise ConfigError(f"config entry {where!r}: the number is too large") from error
    if not math.isfinite(number):
        raise ConfigError(f"config entry {where!r}: {number} is not finite")
    return number
