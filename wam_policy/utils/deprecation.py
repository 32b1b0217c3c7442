"""Deprecated names that keep working for one version and warn about their replacement."""

from __future__ import annotations

import warnings
from typing import TypeVar

T = TypeVar("T")


def renamed(
    old_name: str, old: T | None, new_name: str, new: T | None, *, stacklevel: int = 4
) -> T | None:
    """Return the value of an argument that may be given by its old or its new name.

    Args:
        old_name: Name of the argument in earlier versions.
        old: Value given by the old name; None if it was not given.
        new_name: Current name of the argument.
        new: Value given by the current name; None if it was not given.
        stacklevel: Frame that the warning blames, counted as in `warnings.warn` from
            `warn_renamed`; the default is the caller of the function that calls `renamed`.

    Returns:
        The value that was given; None if there was none.

    Raises:
        TypeError: Both names were given.
    """
    if old is None:
        return new
    if new is not None:
        raise TypeError(f"`{old_name}` is the old name of `{new_name}`: pass only `{new_name}`")
    warn_renamed(f"`{old_name}`", f"`{new_name}`", stacklevel=stacklevel)
    return old


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that a name is deprecated and which name replaces it.

    Args:
        old: Deprecated name, as the message shows it.
        new: Name that replaces it.
        stacklevel: Frame that the warning blames, as in `warnings.warn`.
    """
    warnings.warn(
        f"{old} is now called {new}; the old name will be removed in the next version",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
