"""What a policy is worth on episodes that were held out: its losses, and how far its actions are from the demonstrated ones."""

# B batch, T actions in a chunk, A numbers per action

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch.utils._pytree import tree_map_only

from wam_policy import pipeline
from wam_policy.data.encoded_dataset import EncodedDataset
from wam_policy.data.sampler import sample_generators
from wam_policy.evaluation.evaluate import EvalConfig, evaluate
from wam_policy.models.fast_wam.loss import Batch
from wam_policy.models.light_wam.model import LightWAM, pool_latents
from wam_policy.policy import WAMPolicy
from wam_policy.training.config import LightTrainConfig, TrainConfig
from wam_policy.training.report import decode_clips, video_psnr
from wam_policy.training.train_step import batch_losses, build_loss_module

SEED = 420_042  # of what is held out, and of the random numbers of a validation


def held_out(episodes: int, part: float) -> np.ndarray:
    """Episodes that are held out, bool [episodes]: at least one if any are to be, and never all."""
    count = min(episodes - 1, max(1, round(episodes * part))) if part else 0
    mask = np.zeros(episodes, bool)
    mask[np.random.default_rng(SEED).permutation(episodes)[:count]] = True
    return mask


@torch.no_grad()
def validate(
    config: TrainConfig | LightTrainConfig, policy: WAMPolicy, data: EncodedDataset
) -> dict[str, float]:
    """Losses with the same random numbers every time, and the mean absolute error of the actions in the policy's units.

    Args:
        config: of the run.
        policy: of the kept weights.
        data: examples of held-out episodes; as many as `config.validation_windows` of them are used, evenly spread.
    """
    count = min(len(data.names), config.validation_windows)
    index = torch.linspace(0, len(data.names) - 1, count).round().long()
    module = build_loss_module(config, policy.model)
    sums, errors, actions = {"val_video": 0.0, "val_action": 0.0}, 0.0, 0
    for number, part in enumerate(index.split(config.batch_size)):
        batch = data.batch(part)
        found = batch_losses(
            config, policy.model, module, batch, sample_generators(number, len(part), SEED)
        )
        sums["val_video"] += float(found.video) * len(part) / count
        sums["val_action"] += float(found.action) * len(part) / count
        error = np.abs(
            pipeline.denormalize_actions(policy.config, predict_encoded(policy, batch)[0])
            - pipeline.denormalize_actions(policy.config, batch.action)
        ).mean(2)
        valid = ~batch.action_is_pad.numpy()
        valid[:, policy.config.action.supervised_steps or valid.shape[1] :] = False
        errors, actions = errors + float((error * valid).sum()), actions + int(valid.sum())
    measured: dict[str, float] = sums | {"val_error": errors / max(1, actions)}
    futures = imagine_clips(config, policy, data)
    return measured if futures is None else measured | {"val_psnr": video_psnr(*futures)}


def imagine_clips(
    config: TrainConfig | LightTrainConfig, policy: WAMPolicy, data: EncodedDataset
) -> tuple[np.ndarray, np.ndarray] | None:
    """Real and imagined clips of some examples, as the codec shows them: uint8 [B, F, H, W, 3] each.

    None where no video is learned, or none is wanted. A Light-WAM's are pooled.
    """
    count = min(len(data.names), config.validation_videos)
    if config.loss.lambda_video == 0 or not count:
        return None
    batch = data.batch(torch.linspace(0, len(data.names) - 1, count).round().long())
    _, latents = predict_encoded(policy, batch, imagine=True)
    assert latents is not None
    real = batch.latents.to(latents)
    if isinstance(policy.model, LightWAM):
        real = pool_latents(real, policy.model.config.video_pool)
    return decode_clips(policy.vae, real), decode_clips(policy.vae, latents)


def rollout_success(config: TrainConfig | LightTrainConfig, checkpoint: Path) -> dict[str, float]:
    """Success of a checkpoint in the env of the config, by task."""
    assert config.eval_env is not None
    wanted = EvalConfig(
        checkpoint=str(checkpoint),
        env=config.eval_env,
        tasks=config.eval_tasks,
        episodes=config.eval_episodes,
        output_dir=config.output_dir / "eval" / checkpoint.name,
        video=False,
    )
    found = evaluate(wanted, Console(quiet=True))
    return {f"success_{task}": row["success"] for task, row in found["tasks"].items()}


def predict_encoded(
    policy: WAMPolicy, batch: Batch, *, imagine: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return normalised chunks [B, T, A] for encoded observations and, if requested, latents of the clips.

    The noise is the one that the config fixes by its seed, so that two checkpoints are compared on the same noise.
    """
    batch = tree_map_only(torch.Tensor, lambda x: x.to(policy.device), batch)
    context = policy.model.context(batch.context, batch.proprio)
    encoded = pipeline.EncodedObservation(batch.latents[:, :, :1], context)
    size, horizon = batch.action.shape[:2]
    request = pipeline.make_request(policy, size, horizon=horizon, imagine=imagine)
    return pipeline.sample_encoded(policy, encoded, request)
