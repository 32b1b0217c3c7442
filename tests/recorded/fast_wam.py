"""Our value of every tensor recorded from a Fast-WAM, in every variant."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from wam_policy.hub.foreign import key_mapping
from wam_policy.models import flow_matching
from wam_policy.models.config import FastWAMConfig
from wam_policy.models.fast_wam.loss import (
    Batch,
    ContextClipNoise,
    LossConfig,
    TrainingNoise,
    fast_wam_losses,
    latent_padding,
)
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.fast_wam.sampling import Schedule, prefill_and_denoise
from wam_policy.models.fast_wam.variants import VARIANTS, ActionMode, VariantName
from wam_policy.models.layers.precision import FAST, Precision

SHIFT = 5.0
FOLDERS: dict[str, VariantName] = {
    "fastwam": "fast",
    "joint": "joint",
    "idm": "idm",
    "optional_idm": "optional_idm",
}


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


def under(recorded: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, named by what follows it."""
    return {name.removeprefix(prefix): x for name, x in recorded.items() if name.startswith(prefix)}


def build(
    recorded: dict[str, Tensor], info: dict[str, Any], precision: Precision, dtype: torch.dtype
) -> FastWAM:
    """The recorded model."""
    model = FastWAM(model_config(info), precision)
    model.load_state_dict(key_mapping.to_native(under(recorded, "weights/")))
    return model.to(dtype)


def schedules(recorded: dict[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The recorded inference schedules."""
    for name in recorded:
        match name.split("/"):
            case ["schedule", steps, "timesteps"]:
                timesteps, deltas = flow_matching.make_schedule(int(steps), SHIFT, dtype=dtype)
                yield name, timesteps
                yield f"schedule/{steps}/deltas", deltas


def tensors(recorded: dict[str, Tensor], info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Our value of each recorded tensor."""
    yield from schedules(recorded, torch.float32)
    for name in recorded:
        match name.split("/"):
            case ["schedule", "weight"]:
                yield name, flow_matching.loss_weight(recorded["schedule/weight_t"], SHIFT)
            case [folder, "mask"]:
                yield (
                    name,
                    influence(
                        info, see_video=VARIANTS[FOLDERS[folder]].attends_to == "video", copy=False
                    ),
                )
            case [_, "train_mask"]:
                yield name, influence(info, see_video=True, copy=True)
    model = build(recorded, info, FAST, torch.float32)
    for folder, variant in FOLDERS.items():
        if f"{folder}/train/loss" in recorded:
            yield from training(model, recorded, info, folder, variant)
    yield from inference(model, recorded, info["steps"])


def training(
    model: FastWAM,
    recorded: dict[str, Tensor],
    info: dict[str, Any],
    folder: str,
    variant: VariantName,
) -> Iterator[tuple[str, Tensor]]:
    """One training step."""
    inputs = under(recorded, "in/")
    batch = Batch(
        inputs["latents"],
        inputs["context"],
        inputs["action"],
        None if model.proprio_encoder is None else inputs["proprio"][:, 0],
        inputs["action_is_pad"],
        latent_padding(inputs["image_is_pad"]),
    )
    model.zero_grad()
    config = LossConfig(
        video_shift=SHIFT, action_shift=SHIFT, action_idm_prob=info.get("action_idm_prob", 0.5)
    )
    losses = fast_wam_losses(
        model, batch, recorded_draws(recorded, folder, variant), config, variant
    )
    losses.total.backward()
    assert losses.video_prediction is not None
    yield f"{folder}/train/loss", losses.total
    yield f"{folder}/train/loss_video", losses.video
    yield f"{folder}/train/loss_action", losses.action
    yield f"{folder}/train/pred_video", losses.video_prediction
    yield f"{folder}/train/pred_action", losses.action_prediction
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in key_mapping.from_native(gradients).items():
        yield f"{folder}/train/grad/{name}", gradient


def recorded_draws(recorded: dict[str, Tensor], folder: str, variant: VariantName) -> TrainingNoise:
    """Return the random numbers of a recorded step.

    Those of the context clip exist only if a sample's context clip was noised.
    """
    prefix = f"{folder}/train/draw"
    drawn = [
        recorded[name]
        for name in sorted(
            (n for n in recorded if n.startswith(prefix)),
            key=lambda n: int(n[len(prefix) :].split("_")[0]),
        )
    ]
    draws, rest = TrainingNoise(*drawn[:4]), drawn[4:]
    if not VARIANTS[variant].uses_context_clip:
        return draws
    u_noised, rest = rest[0], rest[1:]
    u_see_all = (
        rest.pop().flatten() if VARIANTS[variant].optional_video else torch.zeros(len(u_noised))
    )
    u_copy, noise = rest or (torch.zeros(len(u_noised)), torch.zeros_like(draws.noise_video))
    return draws._replace(context_clip=ContextClipNoise(u_noised, u_copy, noise, u_see_all))


@torch.no_grad()
def inference(
    model: FastWAM, recorded: dict[str, Tensor], steps: int
) -> Iterator[tuple[str, Tensor]]:
    """Action chunks and imagined latents, from the recorded noises."""
    dtype = next(model.parameters()).dtype
    time = model.precision.time or dtype
    schedule = Schedule(*flow_matching.make_schedule(steps, SHIFT, dtype=time))
    inputs = under(recorded, "in/")
    first = inputs["latents"][:, :, :1].to(dtype)
    proprio = None if model.proprio_encoder is None else inputs["proprio"][:, 0].to(dtype)
    context = model.context(inputs["context"].to(dtype), proprio)

    def drawn(
        mode: ActionMode, actions: str, video: str | None = None, size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Actions, and latents of the clip, of the first `size` samples."""
        future = None if video is None else recorded[video].to(time)[:, :, 1:]
        chunk, later = prefill_and_denoise(
            model,
            first[:size],
            context[:size],
            recorded[actions].to(time),
            future,
            mode=mode,
            action_schedule=schedule,
            video_schedule=schedule,
            decode_video=video is not None,
        )
        return chunk, first if later is None else torch.cat((first[:size], later.to(dtype)), dim=2)

    if "fastwam/infer/noise_action" in recorded:
        yield "fastwam/infer/action", drawn("first_frame", "fastwam/infer/noise_action")[0]
    if "joint/infer/noise_action" in recorded:
        yield (
            "joint/infer/action",
            drawn("joint", "joint/infer/noise_action", "joint/infer/noise_video")[0],
        )
    if "idm/infer/noise_action" in recorded:
        chunk, clip = drawn("idm", "idm/infer/noise_action", "idm/infer/noise_video")
        yield from (("idm/infer/video_latents", clip), ("idm/infer/action", chunk))
    if "fastwam/imagine/noise_video" in recorded:
        chunk, clip = drawn(
            "first_frame", "fastwam/imagine/noise_action", "fastwam/imagine/noise_video", 1
        )
        yield from (("fastwam/imagine/video_latents", clip), ("fastwam/imagine/action", chunk[0]))


def influence(info: dict[str, Any], *, see_video: bool, copy: bool) -> Tensor:
    """Return which tokens each token's output depends on, bool [S, S].

    With one block, that is the attention mask. Tokens are [video, action], or [video, context clip,
    action]. The context clip is never decoded; its rows are those of the video, run alone.
    """
    config = dataclasses.replace(model_config(info), layers=1)
    frames, height, width = info["grid"]
    _, patch_height, patch_width = config.patch_size
    model = FastWAM(config)
    clips = [
        torch.randn(1, config.latent_channels, frames, height, width, requires_grad=True)
        for _ in range(1 + copy)
    ]
    action = torch.randn(1, info["horizon"], config.action_dim, requires_grad=True)
    t, context = torch.full((1,), 500.0), torch.randn(1, 3, config.text_dim)

    def tokens(x: Tensor) -> Tensor:
        """Clips as [frames·rows·columns, channels of a patch], actions as [T, A]."""
        if x.ndim == 3:
            return x[0]
        parts = x[0].unflatten(2, (-1, patch_height)).unflatten(4, (-1, patch_width))
        return parts.permute(1, 2, 4, 0, 3, 5).flatten(0, 2).flatten(1)

    def depends(output: Tensor) -> Tensor:
        rows = []
        for token in tokens(output):
            gradients = torch.autograd.grad(
                (token * torch.randn_like(token)).sum(),
                [*clips, action],
                retain_graph=True,
                allow_unused=True,
            )
            filled = [
                torch.zeros_like(x) if g is None else g
                for g, x in zip(gradients, [*clips, action], strict=True)
            ]
            rows.append(torch.cat([tokens(g).abs().sum(1) for g in filled]) > 0)
        return torch.stack(rows)

    velocity, actions = model(
        clips[0],
        t,
        action,
        t,
        context,
        attend_video=see_video,
        context_clip=(clips[1], t) if copy else None,
    )
    rows = [depends(velocity)]
    if copy:
        rows.append(
            depends(model.encode_clip(clips[1], t, model.video.embed_text(context), decode=True)[0])
        )
    return torch.cat([*rows, depends(actions)])
