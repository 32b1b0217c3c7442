"""Evaluation of a policy: losses, action error and PSNR on held-out episodes, and rollouts."""

# B batch, T actions in a chunk, A numbers per action, F frames, H W pixels

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch.utils._pytree import tree_map_only

from wam_policy import pipeline
from wam_policy.data.encoded_dataset import EncodedDataset
from wam_policy.data.sampler import sample_generators
from wam_policy.evaluation.config import EvalConfig
from wam_policy.evaluation.evaluate import evaluate
from wam_policy.models.fast_wam.loss import Batch
from wam_policy.models.light_wam.model import LightWAM, pool_latents
from wam_policy.policy import WAMPolicy
from wam_policy.training.config import AnyTrainConfig
from wam_policy.training.report import SUCCESS, decode_clips, video_psnr
from wam_policy.training.train_step import batch_losses, build_loss_module

SEED = 420_042  # of the choice of held-out episodes, and of the noise of a validation


def held_out(episodes: int, fraction: float) -> np.ndarray:
    """Choose the episodes to hold out, the same ones in every run.

    Args:
        episodes: Number of episodes.
        fraction: Fraction to hold out; a positive one holds out at least one episode, never all.

    Returns:
        Mask, bool [episodes], true for held-out episodes.
    """
    count = 0
    if fraction:
        count = min(episodes - 1, max(1, round(episodes * fraction)))
    # The seed is fixed: runs with other seeds are compared on the same episodes.
    order = np.random.default_rng(SEED).permutation(episodes)
    mask = np.zeros(episodes, bool)
    mask[order[:count]] = True
    return mask


@torch.no_grad()
def validate(config: AnyTrainConfig, policy: WAMPolicy, data: EncodedDataset) -> dict[str, float]:
    """Measure a policy on held-out windows, with the same noise every time.

    Args:
        config: Resolved options of the run.
        policy: Policy with the exported model.
        data: Windows of held-out episodes; `config.validation_windows` of them are used.

    Returns:
        Mean losses "val_video" and "val_action"; "val_error", the mean absolute error of the
        actions in the policy's units; and "val_psnr" in dB, if futures are imagined.
    """
    index = _evenly_spaced(data, config.validation_windows)
    loss_module = build_loss_module(config, policy.model)
    # Noise is a function of the batch's number, so that checkpoints can be compared.
    measured = {"val_video": 0.0, "val_action": 0.0}
    error_sum = 0.0
    num_valid = 0
    for number, part in enumerate(index.split(config.batch_size)):
        batch = data.batch(part)
        generators = sample_generators(number, len(part), SEED)
        # A batch may be smaller than the others, so means are weighted by its size.
        losses = batch_losses(config, policy.model, loss_module, batch, generators)
        measured["val_video"] += float(losses.video) * len(part) / len(index)
        measured["val_action"] += float(losses.action) * len(part) / len(index)

        # Actions are compared as the robot would execute them.
        batch_error, batch_valid = _action_error(policy, batch)
        error_sum += batch_error
        num_valid += batch_valid

    measured["val_error"] = error_sum / max(1, num_valid)
    futures = imagine_clips(config, policy, data)
    if futures is not None:
        measured["val_psnr"] = video_psnr(*futures)
    return measured


def _evenly_spaced(data: EncodedDataset, count: int) -> torch.Tensor:
    """Return indices of up to `count` windows, evenly spaced over all, int [count]."""
    count = min(len(data.names), count)
    last = len(data.names) - 1
    return torch.linspace(0, last, count, dtype=torch.float32, device="cpu").round().long()


def _action_error(policy: WAMPolicy, batch: Batch) -> tuple[float, int]:
    """Return the summed absolute errors of predicted actions, and the number of actions.

    The error of an action is the mean over its numbers, in the policy's units. Padding, and steps
    that the policy was not trained on, are left out.
    """
    chunk, _ = predict_encoded(policy, batch)
    predicted = pipeline.denormalize_actions(policy.config, chunk)
    recorded = pipeline.denormalize_actions(policy.config, batch.action)
    difference = predicted - recorded
    error = np.abs(difference).mean(2)  # [B, T]

    valid = ~batch.action_is_pad.numpy()
    supervised_steps = policy.config.action.supervised_steps or valid.shape[1]
    valid[:, supervised_steps:] = False
    return float((error * valid).sum()), int(valid.sum())


def imagine_clips(
    config: AnyTrainConfig, policy: WAMPolicy, data: EncodedDataset
) -> tuple[np.ndarray, np.ndarray] | None:
    """Imagine the future of some windows, and decode it beside the recorded one.

    Args:
        config: Resolved options of the run.
        policy: Policy with the exported model.
        data: Windows; `config.validation_videos` of them are used.

    Returns:
        Recorded and imagined clips, uint8 [B, F, H, W, 3] each, both through the codec and those of
        a Light-WAM pooled. None where the video is not trained, or no videos are requested.
    """
    index = _evenly_spaced(data, config.validation_videos)
    if config.loss.lambda_video == 0 or not len(index):
        return None
    batch = data.batch(index)
    _, imagined = predict_encoded(policy, batch, imagine=True)
    assert imagined is not None

    # A Light-WAM imagines on the pooled grid.
    recorded = batch.latents.to(imagined)
    if isinstance(policy.model, LightWAM):
        recorded = pool_latents(recorded, policy.model.config.video_pool)
    return decode_clips(policy.vae, recorded), decode_clips(policy.vae, imagined)


def rollout_success(config: AnyTrainConfig, checkpoint: Path) -> dict[str, float]:
    """Roll a checkpoint out in the environment of a run.

    Args:
        config: Options of the run, with `eval_env` set.
        checkpoint: Folder of the checkpoint.

    Returns:
        Success rate of each task, as "success_<task>".
    """
    assert config.eval_env is not None

    # The same evaluation as `wam eval`, without its output on the terminal.
    options = EvalConfig(
        checkpoint=str(checkpoint),
        env=config.eval_env,
        tasks=config.eval_tasks,
        episodes=config.eval_episodes,
        output_dir=config.output_dir / "eval" / checkpoint.name,
        video=False,
    )
    results = evaluate(options, Console(quiet=True))
    return {f"{SUCCESS}{task}": row["success"] for task, row in results["tasks"].items()}


def predict_encoded(
    policy: WAMPolicy, batch: Batch, *, imagine: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Predict normalised chunks [B, T, A] for encoded observations, from the contract's noise.

    With `imagine`, also return the latents of the imagined future; else None.
    """
    batch = tree_map_only(torch.Tensor, lambda x: x.to(policy.device), batch)
    context = policy.model.context(batch.context, batch.proprio)
    encoded = pipeline.EncodedObservation(batch.latents[:, :, :1], context)

    # Without a generator the noise is the one that the contract fixes by its seed.
    size, horizon = batch.action.shape[:2]
    request = pipeline.make_request(policy, size, horizon=horizon, imagine=imagine)
    return pipeline.sample_encoded(policy, encoded, request)
