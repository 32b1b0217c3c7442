"""Compares this package with tensors recorded from the reference implementations.

    python tests/reference.py FILE.safetensors [...]

Reads the configuration from the `.json` beside each file, prints one row per recorded tensor with its error
(max |a − b| / max(1, max |b|)) and exits non-zero if one is over its tolerance.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from wam_policy import flow
from wam_policy.hub import formats
from wam_policy.models.config import FastWAMConfig
from wam_policy.models.fast_wam import (
    Batch,
    Draws,
    FastWAM,
    LossConfig,
    act,
    latent_padding,
    observe,
    training_losses,
)
from wam_policy.models.mot import fast_mask

TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4
SHIFT = 5.0
OTHER_ISSUES = ("joint/", "idm/", "optional_idm/", "fastwam/imagine/")  # variants this package doesn't have yet


class Row(NamedTuple):
    """One recorded tensor against ours."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def error(ours: Tensor, recorded: Tensor) -> float:
    """max |a − b| / max(1, max |b|); infinite where the shapes differ."""
    if ours.shape != recorded.shape:
        return float("inf")
    if recorded.dtype == torch.bool:
        return float((ours != recorded).sum())
    return float((ours.double() - recorded.double()).abs().max() / recorded.double().abs().max().clamp(min=1))


def model_config(info: dict[str, Any]) -> FastWAMConfig:
    """The sizes of a recorded model."""
    video, action = info["video_dit"], info["action_dit"]
    return FastWAMConfig(
        action_dim=action["action_dim"],
        proprio_dim=info["proprio_dim"],
        latent_channels=video["in_dim"],
        patch_size=tuple(video["patch_size"]),
        video_dim=video["hidden_dim"],
        video_ffn_dim=video["ffn_dim"],
        action_expert_dim=action["hidden_dim"],
        action_expert_ffn_dim=action["ffn_dim"],
        layers=video["num_layers"],
        heads=video["num_heads"],
        head_dim=video["attn_head_dim"],
        text_dim=video["text_dim"],
        freq_dim=video["freq_dim"],
        eps=video["eps"],
    )


def fast_wam_tensors(recorded: dict[str, Tensor], info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Our value of each recorded tensor."""
    model = FastWAM(model_config(info))
    weights = {name.removeprefix("weights/"): x for name, x in recorded.items() if name.startswith("weights/")}
    model.load_state_dict(formats.to_ours(weights))
    inputs = {name.removeprefix("in/"): x for name, x in recorded.items() if name.startswith("in/")}
    latents, horizon = inputs["latents"], inputs["action"].shape[1]
    proprio = None if model.proprio_encoder is None else inputs["proprio"][:, 0]

    frames, rows, columns = model.video.grid(latents)
    yield "fastwam/mask", fast_mask(frames, rows * columns, horizon)

    batch = Batch(
        latents,
        inputs["context"],
        inputs["action"],
        proprio,
        inputs["action_is_pad"],
        latent_padding(inputs["image_is_pad"]),
    )
    drawn = (recorded[f"fastwam/train/draw{i}_{kind}"] for i, kind in enumerate(("randn_like", "rand") * 2))
    losses = training_losses(model, batch, Draws(*drawn), LossConfig(video_shift=SHIFT, action_shift=SHIFT))
    losses.total.backward()
    yield "fastwam/train/loss", losses.total
    yield "fastwam/train/loss_video", losses.video
    yield "fastwam/train/loss_action", losses.action
    assert losses.velocity_video is not None
    yield "fastwam/train/pred_video", losses.velocity_video
    yield "fastwam/train/pred_action", losses.velocity_action
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in formats.to_theirs(gradients).items():
        if f"fastwam/train/grad/{name}" in recorded:
            yield f"fastwam/train/grad/{name}", gradient

    with torch.no_grad():
        context = model.context(inputs["context"], proprio)
        observed = observe(model, latents[:, :, :1], context)
        schedule = flow.schedule(info["steps"], SHIFT)
        yield "fastwam/infer/action", act(model, observed, recorded["fastwam/infer/noise_action"], *schedule)


def schedule_tensors(recorded: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our value of each recorded schedule tensor."""
    for name in recorded:
        parts = name.split("/")
        if parts[0] == "schedule" and parts[-1] == "timesteps":
            timesteps, deltas = flow.schedule(int(parts[1]), SHIFT)
            yield name, timesteps
            yield f"schedule/{parts[1]}/deltas", deltas
    if "schedule/weight" in recorded:
        yield "schedule/weight", flow.loss_weight(recorded["schedule/weight_t"], SHIFT)


def compare(path: Path) -> list[Row]:
    """Compare everything recorded in one file; a recorded tensor that nothing here produces fails."""
    torch.manual_seed(0)
    recorded = load_file(path)
    ours = dict(schedule_tensors(recorded))
    if any(name.startswith("fastwam/") for name in recorded):
        ours |= fast_wam_tensors(recorded, json.loads(path.with_suffix(".json").read_text()))
    rows = []
    for name in sorted(recorded):
        given = name.startswith(("weights/", "in/", *OTHER_ISSUES)) or "/draw" in name or "/noise_" in name
        if given or name == "schedule/weight_t":
            continue
        tolerance = GRADIENT_TOLERANCE if "/grad/" in name else TOLERANCE
        rows.append(Row(name, error(ours[name].detach(), recorded[name]) if name in ours else float("nan"), tolerance))
    return rows


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__)
        return 2
    failed = 0
    for path in paths:
        rows = compare(Path(path))
        for row in rows:
            print(f"{'ok  ' if row.passed else 'OVER'} {row.error:9.2e} (≤ {row.tolerance:.0e})  {row.name}")
        over = sum(not row.passed for row in rows)
        print(f"{path}: {len(rows) - over} of {len(rows)} tensors within tolerance")
        failed += over + (not rows)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
