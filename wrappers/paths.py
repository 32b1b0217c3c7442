"""Finds a place in an observation, or in an observation space, by a path of keys joined by dots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gymnasium import spaces

from wam_policy.errors import EnvError

RENDER = "render()"  # the path that means the picture of `env.render()`


def get_path(tree: Any, path: str) -> Any:
    """Follow `path` through nested dicts and tuples, of values or of spaces; "" is the tree itself.

    Keys may hold dots themselves: the longest key that fits is taken. Tuples are entered by number.

    Raises:
        EnvError: the path leads nowhere; the message lists what there is.
    """
    if not path:
        return tree
    children = _children(tree)
    fitting = [key for key in children if path == key or path.startswith(key + ".")]
    if not fitting:
        raise EnvError(
            f"nothing at {path!r}; the observation has {sorted(children) or 'no named entries'}"
        )
    key = max(fitting, key=len)
    return get_path(children[key], path[len(key) + 1 :])


def _children(tree: Any) -> dict[str, Any]:
    if isinstance(tree, spaces.Tuple):
        tree = tree.spaces
    if isinstance(tree, (Mapping, spaces.Dict)):
        return {str(key): value for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return {str(i): value for i, value in enumerate(tree)}
    return {}
