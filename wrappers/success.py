"""Whether an episode succeeded, as envs tell it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from wam_policy.errors import EnvError


def success(info: Mapping[str, Any]) -> np.ndarray:
    """What the info of a step says, bool, of one env or [B] of several.

    Raises:
        EnvError: it doesn't say.
    """
    for key in ("is_success", "success"):
        if key in info:
            return np.asarray(info[key], bool)
    raise EnvError(f"the env's info tells neither `is_success` nor `success`, only {sorted(info)}")
