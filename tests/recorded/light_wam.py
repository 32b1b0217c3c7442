"""Our value of every tensor recorded from a Light-WAM."""

from collections.abc import Iterator
from typing import Any

import torch
from recorded.fast_wam import under
from torch import Tensor

from wam_policy.hub.foreign import key_mapping, light_wam_config
from wam_policy.models.config import LORA_TARGETS, LightWAMConfig
from wam_policy.models.fast_wam.loss import Batch, latent_padding
from wam_policy.models.layers.precision import FAST, Precision
from wam_policy.models.light_wam.loss import LightLossConfig, LightTrainingNoise, light_wam_losses
from wam_policy.models.light_wam.model import LightWAM


def model_config(info: dict[str, Any]) -> LightWAMConfig:
    """The sizes of a recorded model."""
    video = info["video_dit"]
    adapter = info["adapter"]
    head = info["state_fusion_action_expert"]
    taps = tuple(adapter["adapter_layer_indices"])
    features = light_wam_config.features(
        head["layer_feature_sources"], head["feature_sources"], len(taps)
    )
    lora = adapter["use_backbone_lora"]
    targets = LORA_TARGETS
    if lora:
        targets = light_wam_config.targets(adapter["lora_target_modules"])
    return LightWAMConfig(
        action_dim=info["action_dim"],
        proprio_dim=info["proprio_dim"],
        latent_channels=video["in_dim"],
        patch_size=tuple(video["patch_size"]),
        video_dim=video["hidden_dim"],
        video_ffn_dim=video["ffn_dim"],
        layers=video["num_layers"],
        heads=video["num_heads"],
        head_dim=video["attn_head_dim"],
        text_dim=video["text_dim"],
        freq_dim=video["freq_dim"],
        eps=video["eps"],
        taps=taps,
        adapter_dim=adapter["adapter_dim"],
        adapter_scale=adapter["adapter_scale"],
        lora_rank=adapter["lora_rank"] if lora else 0,
        lora_alpha=adapter["lora_alpha"],
        lora_layers=tuple(adapter["lora_layer_indices"] or taps) if lora else None,
        lora_targets=targets,
        features=features,
        pooling=head["token_pooling_type"],
        queries=head["token_pooling_num_queries"],
        pool_heads=head["token_pooling_num_heads"],
        merge_dim=head["token_pooling_merge_dim"],
        merge_slots=head["token_pooling_merge_num_slots"],
        layer_dim=head["per_layer_dim"],
        trunk_dim=head["trunk_dim"],
        trunk_blocks=head["num_trunk_blocks"],
        step_dim=head["step_pos_dim"],
        video_pool=info["downsample"],
    )


def loss_config(weighting: dict[str, Any]) -> LightLossConfig:
    """How the recorded step weighs the steps of a chunk."""
    if not weighting.get("enabled", False):
        return LightLossConfig()
    tail = weighting.get("tail_weight", 0.0) / weighting.get("prefix_weight", 1.0)
    return LightLossConfig(prefix_steps=weighting["num_prefix_steps"], tail_weight=tail)


def build(
    recorded: dict[str, Tensor], info: dict[str, Any], precision: Precision, dtype: torch.dtype
) -> LightWAM:
    """The recorded model."""
    config = model_config(info)
    model = LightWAM(config, precision)
    model.load_state_dict(
        key_mapping.to_native(under(recorded, "weights/"), key_mapping.light_wam(config.layers))
    )
    return model.to(dtype)


@torch.no_grad()
def actions(
    model: LightWAM, recorded: dict[str, Tensor], dtype: torch.dtype, horizon: int
) -> Tensor:
    """The recorded observations' chunks."""
    proprio = None if model.proprio_encoder is None else recorded["in/proprio"][:, 0].to(dtype)
    context = model.context(recorded["in/context"].to(dtype), proprio)
    return model.predict_actions(recorded["in/latents"][:, :, :1].to(dtype), context, horizon)


def tensors(recorded: dict[str, Tensor], info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Our value of each recorded tensor."""
    model = build(recorded, info, FAST, torch.float32)
    batch = Batch(
        recorded["in/latents"],
        recorded["in/context"],
        recorded["in/action"],
        None if model.proprio_encoder is None else recorded["in/proprio"][:, 0],
        recorded["in/action_is_pad"],
        latent_padding(recorded["in/image_is_pad"]),
    )
    draws = LightTrainingNoise(recorded["train/draw0_rand"], recorded["train/draw1_randn_like"])
    losses = light_wam_losses(
        model, batch, draws, loss_config(info.get("action_temporal_weighting") or {})
    )
    losses.total.backward()
    yield "train/loss", losses.total
    yield "train/loss_video", losses.video
    yield "train/loss_action", losses.action
    assert losses.video_prediction is not None
    yield "train/pred_video", losses.video_prediction
    yield "train/pred_action", losses.action_prediction
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    for name, gradient in key_mapping.from_native(
        gradients, key_mapping.light_wam(info["layers"])
    ).items():
        yield f"train/grad/{name.replace('mot.mixtures.video.', 'video_expert.')}", gradient
    horizon = batch.action.shape[1]
    yield "infer/action", actions(model, recorded, torch.float32, horizon)
    yield "infer/action_longer_horizon", actions(model, recorded, torch.float32, 2 * horizon)[0]
