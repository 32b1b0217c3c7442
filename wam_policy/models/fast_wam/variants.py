"""The Fast-WAM variants: what the actions attend to in training, and how they can be sampled.

See docs/method.md, "Variants and attention masks" and "Sampling".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VariantName = Literal["fast", "joint", "idm", "optional_idm"]
ActionMode = Literal["first_frame", "joint", "idm"]
"""How actions are sampled.

"first_frame": from the observed frame alone. "joint": together with the video, step by step.
"idm" (inverse dynamics model): from the video, after it has been denoised.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Properties of one variant of Fast-WAM."""

    # Sampling modes that match the training; the first is the default.
    modes: tuple[ActionMode, ...]
    # What the actions attend to in training.
    attends_to: Literal["first_frame", "video"]
    # True: that video is a second copy of the clip, clean or noised independently.
    uses_context_clip: bool = False
    # True: for a part of the samples, actions attend only to the first frame of that copy.
    optional_video: bool = False


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
