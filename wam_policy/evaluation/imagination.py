"""Compares the future a policy imagines with what then really happens."""

# F frames of a clip, H W pixels of the canvas

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from wam_policy import images
from wam_policy.action_queue import ActionQueue
from wam_policy.evaluation.metrics import psnr_over
from wam_policy.evaluation.rollout import rollout
from wam_policy.models.fast_wam.variants import ActionMode
from wam_policy.policy import WAMPolicy


class Future(NamedTuple):
    """What was imagined at one step, and what was seen at the same steps; F is smaller where the episode ended before."""

    imagined: np.ndarray  # uint8 [F, H, W, 3], the observed frame first
    real: np.ndarray  # uint8 [F, H, W, 3]


def rollout_futures(
    policy: WAMPolicy, env: Any, seed: int, queue: ActionQueue, mode: ActionMode | None = None
) -> list[Future]:
    """Play one episode in a wrapped vector env of one, imagining the future each time the last one has passed."""
    seen: list[np.ndarray] = []
    begun: list[
        tuple[int, np.ndarray]
    ] = []  # the step at which a future was imagined, and its frames

    def ask(observation: Any) -> np.ndarray:
        now = len(seen) - 1
        if begun and now < begun[-1][0] + policy.config.action.horizon:
            return policy.predict_chunk(observation, mode=mode, horizon=queue.horizon)
        chunk, frames = policy.imagine(observation, mode=mode, horizon=queue.horizon)
        begun.append((now, frames[0]))
        return chunk

    for observation in rollout(env, seed, queue, ask):
        seen.append(_canvas(policy, observation))
    length, stride = policy.config.action.horizon, policy.config.video.stride
    factor = len(seen[0]) // begun[0][1].shape[1]  # of a Light-WAM, which imagines on a pooled grid
    real = [
        shrink(np.stack(seen[start : start + length + 1 : stride]), factor) for start, _ in begun
    ]
    return [
        Future(frames[: len(there)], there) for (_, frames), there in zip(begun, real, strict=True)
    ]


def shrink(frames: np.ndarray, factor: int) -> np.ndarray:
    """Pictures uint8 [F, H, W, 3] averaged over squares of `factor` pixels."""
    f, height, width, colours = frames.shape
    squares = frames.reshape(f, height // factor, factor, width // factor, factor, colours)
    return squares.mean((2, 4)).round().astype(np.uint8)


def _canvas(policy: WAMPolicy, observation: Any) -> np.ndarray:
    """What the policy sees of a batch of one, uint8 [H, W, 3]."""
    canvas = policy.canvas(observation)
    return images.to_pixels(canvas[:, :, None])[0, 0]


def psnr_by_frame(futures: list[Future]) -> dict[str, list[float]]:
    """PSNR by frame, in dB, over all futures that reached it: imagined, and of the observed frame kept still."""
    longest = max(len(future.real) for future in futures)
    reached = [[future for future in futures if len(future.real) > k] for k in range(1, longest)]
    return {
        "psnr_db": [
            psnr_over([(f.imagined[k], f.real[k]) for f in there])
            for k, there in enumerate(reached, start=1)
        ],
        "still_psnr_db": [
            psnr_over([(f.real[0], f.real[k]) for f in there])
            for k, there in enumerate(reached, start=1)
        ],
    }


def side_by_side(futures: list[Future]) -> list[np.ndarray]:
    """Frames for a film, uint8 [2·H, W, 3]: what happened above what was imagined."""
    return [
        np.concatenate(pair)
        for future in futures
        for pair in zip(future.real, future.imagined, strict=True)
    ]
