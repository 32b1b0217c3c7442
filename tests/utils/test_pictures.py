"""Pictures are PNG or JPEG of eight bits, bounded in size."""

import io

import numpy as np
import pytest
from PIL import Image

from wam_policy.errors import ObservationError
from wam_policy.utils import pictures


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_pictures_of_eight_bits_become_rgb(tmp_path, mode):
    data = encode(Image.new("RGB", (3, 2), (10, 10, 10)).convert(mode))
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for source in (data, path):
        read = pictures.read_picture(source, "it", ObservationError)
        assert read.shape == (2, 3, 3) and (read == 10).all()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "cannot be read as PNG or JPEG"),
        (encode(Image.new("RGB", (3, 2)), "GIF"), "cannot be read as PNG or JPEG"),
        (encode(Image.new("RGB", (3, 2)), "TIFF"), "cannot be read as PNG or JPEG"),
        (encode(Image.effect_noise((40, 40), 50))[:500], "cannot be read as PNG or JPEG"),
        (encode(Image.fromarray(np.zeros((2, 3), np.uint16))), "has the mode"),
    ],
)
def test_other_pictures_are_refused(data, match):
    with pytest.raises(ObservationError, match=f"it {match}"):
        pictures.read_picture(data, "it", ObservationError)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 5)
    with pytest.raises(ObservationError, match=r"it has 3×2 pixels"):
        pictures.read_picture(encode(Image.new("RGB", (3, 2))), "it", ObservationError)
    monkeypatch.setattr(pictures, "MAX_BYTES", 10)
    with pytest.raises(ObservationError, match="it is larger than"):
        pictures.read_picture(encode(Image.new("RGB", (3, 2))), "it", ObservationError)


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ObservationError, match="cannot be read"):
        pictures.read_picture(tmp_path / "nowhere.png", "it", ObservationError)
