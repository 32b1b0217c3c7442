"""Old names that keep working for one version, with a warning that names the new one."""

from __future__ import annotations

import warnings
from typing import TypeVar

T = TypeVar("T")


def renamed(old_name: str, old: T | None, new_name: str, new: T | None) -> T | None:
    """Return the value of an argument that was given by its old or its new name.

    Args:
        old_name: Name of the argument in earlier versions.
        old: Value given by that name; None if it was not given.
        new_name: Name of the argument now.
        new: Value given by that name; None if it was not given.

    Raises:
        TypeError: Both were given.
    """
    if old is None:
        return new
    if new is not None:
        raise TypeError(f"`{old_name}` is the old name of `{new_name}`: pass only `{new_name}`")
    warn_renamed(f"`{old_name}`", f"`{new_name}`", stacklevel=4)
    return old


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that a name is deprecated and say which one replaces it."""
    warnings.warn(
        f"{old} is now called {new}; the old name will be removed in the next version",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
