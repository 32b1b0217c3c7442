"""What tells the families apart in training: the sizes of the model, its contract, and what of it is trained."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from wam_policy.config import (
    ActionConfig,
    Family,
    PolicyConfig,
    PromptConfig,
    SamplingConfig,
    Source,
    StateConfig,
    VideoConfig,
)
from wam_policy.data.mixture import Mixture
from wam_policy.models.config import VIDEO_EXPERT_SIZES, FastWAMConfig, LightWAMConfig
from wam_policy.models.encoders.vae import VAE
from wam_policy.training.config import AnyTrainConfig, TrainConfig
from wam_policy.training.initialization import InitWeights
from wam_policy.training.normalization import resolve_normalization
from wam_policy.training.resolve import action_layout, camera_config, run_preset, state_names


def model_config(
    config: AnyTrainConfig,
    start: InitWeights | None,
    *,
    action_dim: int,
    proprio_dim: int,
    channels: int,
) -> FastWAMConfig | LightWAMConfig:
    """The sizes of the model a run makes: the robot's and the codec's, then those it begins from, then the config's."""
    robot: dict[str, Any] = {
        "action_dim": action_dim,
        "proprio_dim": proprio_dim,
        "latent_channels": channels,
    }
    given = {} if start is None else start.sizes
    sizes = asdict(config.model)
    if isinstance(config, TrainConfig):
        return FastWAMConfig(
            **{**sizes, **{name: given[name] for name in sizes if name in given}, **robot}
        )
    if "taps" in given:
        return LightWAMConfig(**{**given, **robot})
    features = (("adapted",),) * len(config.model.taps)
    return LightWAMConfig(
        **{
            **sizes,
            "features": features,
            **{name: given[name] for name in VIDEO_EXPERT_SIZES if name in given},
            **robot,
        }
    )


def make_policy_config(
    config: AnyTrainConfig, dataset: Mixture, vae: VAE, start: InitWeights | None
) -> PolicyConfig:
    """The contract of the policy a run makes, from a settled config."""
    assert config.prompt_template is not None and config.token_length is not None
    text = None if start is None or start.text is None or start.text.repo is None else start.text
    actions, names, preset = (
        action_layout(config, dataset),
        state_names(config, dataset),
        run_preset(config),
    )
    of_state, of_action = resolve_normalization(config, dataset, start)
    family: Family = "light_wam"
    variant, action_shift, supervised_steps = None, None, None
    if isinstance(config, TrainConfig):
        family, variant, action_shift = "fast_wam", config.variant, config.loss.action_shift
    else:
        supervised_steps = config.loss.supervised_steps
    return PolicyConfig(
        family=family,
        variant=variant,
        model=model_config(
            config, start, action_dim=actions.dim, proprio_dim=len(names), channels=vae.mean.numel()
        ),
        cameras=camera_config(config, dataset, None if start is None else start.policy),
        video=VideoConfig(frames=config.frames, stride=config.frame_stride),
        state=StateConfig(names=names, normalization=of_state),
        action=ActionConfig(
            layout=actions,
            normalization=of_action,
            snap=None if preset is None else preset.snap,
            horizon=(config.frames - 1) * config.frame_stride,
            replan=config.replan,
            supervised_steps=supervised_steps,
        ),
        prompt=PromptConfig(template=config.prompt_template, token_length=config.token_length),
        sampling=SamplingConfig(
            steps=config.num_inference_steps,
            video_shift=config.loss.video_shift,
            action_shift=action_shift,
        ),
        vae=Source(subfolder="vae"),
        text=text,
    )


def config_differences(policy: PolicyConfig, start: InitWeights | None) -> list[str]:
    """What of a policy's contract is otherwise than in the policy it begins from, and would be learned anew."""
    theirs = None if start is None else start.policy
    if theirs is None:
        return []
    pairs = {
        "cameras": (theirs.cameras, policy.cameras),
        "video": (theirs.video, policy.video),
        "actions": (theirs.action.layout, policy.action.layout),
        "horizon": (theirs.action.horizon, policy.action.horizon),
        "prompt": (theirs.prompt, policy.prompt),
    }
    return [f"{name} {new}, not {old}" for name, (old, new) in pairs.items() if old != new]
