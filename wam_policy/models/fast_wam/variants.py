"""What tells the Fast-WAM variants apart: what the actions see in training, and the ways to sample them.

Source: spec/fastwam.md sections 2.6, 3.3 and 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VariantName = Literal["fast", "joint", "idm", "optional_idm"]
ActionMode = Literal["first_frame", "joint", "idm"]
"""How actions are sampled: from the observed frame alone; in step with the video; from the video, once it is denoised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One variant of Fast-WAM."""

    modes: tuple[ActionMode, ...]  # ways to sample that fit its training; the first is its own
    attends_to: Literal["first_frame", "video"]  # what the actions attend to in training
    uses_context_clip: bool = (
        False  # True: the video they see is a second copy of the clip, clean or noised on its own
    )
    optional_video: bool = False  # True: a part of the samples sees only the copy's first frame


VARIANTS: dict[VariantName, Variant] = {
    "fast": Variant(modes=("first_frame",), attends_to="first_frame"),
    "joint": Variant(modes=("joint",), attends_to="video"),
    "idm": Variant(modes=("idm",), attends_to="video", uses_context_clip=True),
    "optional_idm": Variant(
        modes=("idm", "first_frame"),
        attends_to="video",
        uses_context_clip=True,
        optional_video=True,
    ),
}
