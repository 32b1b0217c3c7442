"""The names that datasets and simulators give to the same cameras, as data. Source: spec/needs.md section 1.4."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from wam_policy.errors import ConfigError

ALIASES = (  # each row: one camera
    ("image", "agentview_image", "agentview", "agentview_rgb"),
    ("wrist_image", "robot0_eye_in_hand_image", "robot0_eye_in_hand", "eye_in_hand_rgb", "image2"),
    ("cam_high", "head_camera", "head_rgb"),
    ("cam_left_wrist", "left_camera", "left_rgb"),
    ("cam_right_wrist", "right_camera", "right_rgb"),
)


def canonical(name: str) -> str:
    """The first name of a camera; a name the table doesn't know is its own."""
    return next((names[0] for names in ALIASES if name in names), name)


def find_camera(wanted: str, available: Collection[str]) -> str | None:
    """The name in `available` of the wanted camera: its own, else an alias.

    Raises:
        ConfigError: several aliases of it are there.
    """
    if wanted in available:
        return wanted
    found = [name for name in available if canonical(name) == canonical(wanted)]
    if len(found) > 1:
        raise ConfigError(
            f"{' and '.join(map(repr, found))} are names of one camera; say which of them is {wanted!r}"
        )
    return found[0] if found else None


def find_swapped(places: Mapping[str, str]) -> tuple[str, str] | None:
    """A camera, and the other wanted one whose pictures its path leads to by name; None: there is none.

    Args:
        places: wanted camera -> dotted path of its pictures.
    """
    for name, path in places.items():
        parts = {canonical(part) for part in path.split(".")}
        other = next(
            (other for other in places if other != name and canonical(other) in parts), None
        )
        if other is not None and canonical(name) not in parts:
            return name, other
    return None
