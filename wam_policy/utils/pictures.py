"""Reads pictures of other people: PNG and JPEG, bounded in size."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from wam_policy.errors import WAMPolicyError

# Largest picture in pixels. One of this size takes 100 MB in memory.
MAX_PIXELS = 2**25

# Largest file of a picture in bytes.
MAX_BYTES = 64 * 2**20

FORMATS = ("PNG", "JPEG")

# Modes of Pillow that become RGB without a loss: eight bits per channel.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def read_picture(
    source: Path | bytes, where: Path | str, error: type[WAMPolicyError]
) -> np.ndarray:
    """Read a picture.

    Args:
        source: A file, or its content.
        where: Place of the picture, for the message.
        error: Class of the error to raise.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        WAMPolicyError: As `error`: it is missing, damaged, too large, or of another format.
    """
    try:
        data = source if isinstance(source, bytes) else _read_bytes(source)
        if len(data) > MAX_BYTES:
            raise error(f"{where} is larger than {MAX_BYTES // 2**20} MiB; scale the picture")
        with warnings.catch_warnings():
            # Pillow warns of many pixels: they are counted here.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise error(
                        f"{where} has {picture.width}×{picture.height} pixels; scale the picture"
                    )
                if picture.mode not in _MODES:
                    raise error(
                        f"{where} has the mode {picture.mode!r}, expected eight bits per channel; "
                        f"convert the picture to RGB"
                    )
                return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, struct.error, IndexError, TypeError) as problem:
        if isinstance(problem, WAMPolicyError):
            raise
        raise error(
            f"{where} cannot be read as {' or '.join(FORMATS)} ({problem!s:.200}); save it again"
        ) from problem
    except Image.DecompressionBombError as problem:
        raise error(f"{where} has too many pixels ({problem}); scale the picture") from problem


def _read_bytes(path: Path) -> bytes:
    """Read a file up to one byte more than a picture may have."""
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)
