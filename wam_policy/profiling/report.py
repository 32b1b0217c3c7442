"""Shows the rows of `wam bench`: a table, a section of a checkpoint's card, and a chart."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.box import SIMPLE_HEAD
from rich.table import Table

from wam_policy.utils.io import write_bytes

if TYPE_CHECKING:
    from wam_policy.profiling.measurement import Row
    from wam_policy.profiling.roofline import Machine

COLOURS = {
    "preprocess": "#bab0ac",
    "vae": "#59a14f",
    "prefill": "#4e79a7",
    "act": "#f28e2b",
    "postprocess": "#76b7b2",
}
WIDTH, LEFT, BAR, GAP, TOP = 1100, 300, 22, 10, 60


def write_chart(path: Path, rows: Sequence[Row]) -> None:
    """Write a PNG of milliseconds, one bar per row, cut into stages."""
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
        draw.text(
            (LEFT - 10, top + 3), f"{row.name}, batch {row.batch}", "black", font, anchor="ra"
        )
        for stage, seconds in row.seconds.items():
            length = float(np.median(seconds)) / longest * (WIDTH - LEFT - 110)
            draw.rectangle((x, top, x + length, top + BAR), fill=COLOURS[stage])
            x += length
        draw.text((x + 8, top + 3), f"{1000 * row.total():.1f} ms", "black", font)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    write_bytes(path, encoded.getvalue())


def benchmark_table(rows: Sequence[Row], machine: Machine) -> Table:
    """The rows for the terminal."""
    made = Table(
        caption=f"{machine.describe()}; roof: how close the products come to that; MiB: of the process, earlier ways included",
        pad_edge=False,
        padding=(0, 1, 0, 0),
        box=SIMPLE_HEAD,
    )
    made.add_column("way, milliseconds", no_wrap=True)
    for column in ("B", "vae", "prefill", "act", "rest", "step", "p95", "roof", "MiB", "error"):
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        stages = {stage: 1000 * float(np.median(row.seconds[stage])) for stage in COLOURS}
        rest = stages["preprocess"] + stages["postprocess"]
        times = (
            stages["vae"],
            stages["prefill"],
            stages["act"],
            rest,
            1000 * row.total(),
            1000 * row.total(0.95),
        )
        bound = sum(machine.minimum_seconds(counts) for counts in row.counts.values())
        share = f"{bound / row.total():.0%}" if row.counts else ""
        error = f"{max(row.errors):.2g}" if row.errors else ""
        memory = "" if row.peak is None else f"{row.peak / 2**20:.0f}"
        style = "bold" if row.name == "compiled" else ""
        made.add_row(
            row.name,
            str(row.batch),
            *(f"{time:.1f}" for time in times),
            share,
            memory,
            error,
            style=style,
        )
    return made


def card_section(rows: Sequence[Row], found: Mapping[str, Any]) -> str:
    """What compiling and each knob give and cost, as a section of a checkpoint's card (`save_pretrained(notes=…)`)."""
    lines = [
        "| way | observations per call | a step: median, p95 | error of an action: median, largest |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if not (row.errors or row.name in ("eager", "compiled")):
            continue
        error = f"{np.median(row.errors):.1e}, {max(row.errors):.1e}" if row.errors else ""
        time = f"{1000 * row.total():.1f} ms, {1000 * row.total(0.95):.1f} ms"
        lines.append(f"| {row.name} | {row.batch} | {time} | {error} |")
    made = f"commit `{found['commit'][:7]}`, " if found["commit"] else ""
    return "\n".join(
        (
            "## Speed\n",
            *lines,
            "",
            f"`wam bench` on {found['device']}, {found['dtype']}, {made}torch {found['versions']['torch']}; {found['repeats']} "
            f"runs, inputs: {found['inputs']}. Errors are those of the knobs that trade exactness for speed: the largest "
            "difference in a chunk of normalised actions, against the compiled policy on the same inputs.\n",
        )
    )
