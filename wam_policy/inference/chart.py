"""Draws the rows of `wam bench` as bars of milliseconds, cut into stages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wam_policy.hub.atomic import write_bytes

if TYPE_CHECKING:
    from wam_policy.inference.bench import Row

COLOURS = {"preprocess": "#bab0ac", "vae": "#59a14f", "prefill": "#4e79a7", "act": "#f28e2b", "postprocess": "#76b7b2"}
WIDTH, LEFT, BAR, GAP, TOP = 1100, 300, 22, 10, 60


def write_chart(path: Path, rows: Sequence[Row]) -> None:
    """Write a PNG, one bar per row."""
    height = TOP + len(rows) * (BAR + GAP) + GAP
    picture = Image.new("RGB", (WIDTH, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    x = float(LEFT)
    for stage, colour in COLOURS.items():
        draw.rectangle((x, 20, x + 14, 34), fill=colour)
        draw.text((x + 20, 18), stage, "black", font)
        x += 40 + draw.textlength(stage, font)
    longest = max(row.total() for row in rows)
    for i, row in enumerate(rows):
        top, x = TOP + i * (BAR + GAP), float(LEFT)
        draw.text((LEFT - 10, top + 3), f"{row.name}, batch {row.batch}", "black", font, anchor="ra")
        for stage, seconds in row.seconds.items():
            length = float(np.median(seconds)) / longest * (WIDTH - LEFT - 110)
            draw.rectangle((x, top, x + length, top + BAR), fill=COLOURS[stage])
            x += length
        draw.text((x + 8, top + 3), f"{1000 * row.total():.1f} ms", "black", font)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    write_bytes(path, encoded.getvalue())
