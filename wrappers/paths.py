"""Access to entries of an observation, or of an observation space, by a dotted path of keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gymnasium import spaces

from wam_policy.errors import EnvError

RENDER = "render()"  # path of the image that `env.render()` returns


def get_path(tree: Any, path: str) -> Any:
    """Return the entry at a path of nested dicts and tuples.

    Args:
        tree: Nested dicts and tuples of values or of spaces.
        path: Keys joined by dots; tuples are indexed by number; "" is the tree itself. A key may
            contain dots: the longest key that matches is taken.

    Returns:
        The value or space at that path.

    Raises:
        EnvError: There is nothing at that path; the message lists the available keys.
    """
    if not path:
        return tree
    children = _children(tree)
    matches = [key for key in children if path == key or path.startswith(key + ".")]
    if not matches:
        raise EnvError(
            f"nothing at {path!r}; the observation has {sorted(children) or 'no named entries'}"
        )
    key = max(matches, key=len)
    rest = path[len(key) + 1 :]
    return get_path(children[key], rest)


def _children(tree: Any) -> dict[str, Any]:
    """Return the entries of a dict or tuple by key; empty for a leaf."""
    if isinstance(tree, spaces.Tuple):
        tree = tree.spaces
    if isinstance(tree, (Mapping, spaces.Dict)):
        return {str(key): value for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return {str(i): value for i, value in enumerate(tree)}
    return {}
