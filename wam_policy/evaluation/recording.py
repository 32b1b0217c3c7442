"""Videos of a task: its first episode, imagined beside real futures, and attention."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from wam_policy.evaluation import explanation, imagination
from wam_policy.evaluation.config import EvalConfig
from wam_policy.evaluation.play import make_queue
from wam_policy.evaluation.results import video_path
from wam_policy.evaluation.rollout import rollout
from wam_policy.evaluation.simulator import EpisodeStart, Simulator, SimulatorOptions
from wam_policy.evaluation.video import camera_row, write_mp4
from wam_policy.observation import IMAGE
from wam_policy.policy import WAMPolicy

# Frames per second of a video with one frame per control step.
CONTROL_FPS = 20
# Videos of smaller frames are enlarged by a whole factor up to this height in pixels.
MAX_ENLARGED_HEIGHT = 256


def record_video(policy: WAMPolicy, config: EvalConfig, task: str | None, path: Path) -> None:
    """Play the first seed's episode again and write every step to an mp4, the cameras in a row."""
    frames = []

    def predict(observation: Any) -> np.ndarray:
        return policy.predict_chunk(observation, mode=config.mode, horizon=config.horizon)

    queue = make_queue(policy, config, 1)
    with closing(_make_simulator(policy, config)) as simulator:
        for observation in rollout(simulator, EpisodeStart(task, config.seed), queue, predict):
            pictures = [observation[IMAGE + name][0] for name in policy.config.cameras.names]
            frames.append(camera_row(pictures))

    _write_video(path, frames, fps=CONTROL_FPS)


def _make_simulator(policy: WAMPolicy, config: EvalConfig) -> Simulator:
    """Return a simulator whose every control step yields an observation."""
    options = SimulatorOptions.of_policy(
        policy.config,
        config.env,
        1,
        env_kwargs=config.env_kwargs,
        perturb=config.perturb,
        max_steps=config.max_steps,
    )
    return Simulator(options, config.timeout)


def _write_video(path: Path, frames: list[np.ndarray], fps: int) -> None:
    """Write frames uint8 [H, W, 3]; small ones are enlarged."""
    enlarge = max(1, MAX_ENLARGED_HEIGHT // frames[0].shape[0])
    write_mp4(path, frames, fps=max(1, fps), enlarge=enlarge)


def evaluate_imagination(
    policy: WAMPolicy, config: EvalConfig, task: str | None, path: Path
) -> dict[str, list[float]]:
    """Play the first seed's episode and compare its imagined with its real futures.

    Args:
        policy: Policy that imagines.
        config: Options of the evaluation.
        task: Value of the env's `task` argument; None creates the env without it.
        path: Where the mp4 of the real frames above the imagined ones is written.

    Returns:
        PSNR in dB by frame (see `imagination.psnr_by_frame`).
    """
    queue = make_queue(policy, config, 1)
    start = EpisodeStart(task, config.seed)
    with closing(_make_simulator(policy, config)) as simulator:
        futures = imagination.rollout_futures(policy, simulator, start, queue, config.mode)

    frames = imagination.side_by_side(futures)
    _write_video(path, frames, fps=CONTROL_FPS // policy.config.video.stride)
    return imagination.psnr_by_frame(futures)


def record_explanation(policy: WAMPolicy, config: EvalConfig, task: str | None, path: Path) -> None:
    """Play the first seed's episode and write an mp4 of the action head's attention.

    The video has one frame per predicted chunk.
    """
    frames: list[np.ndarray] = []

    def predict(observation: Any) -> np.ndarray:
        chunk, canvas, maps, weights = policy.explain(observation, horizon=config.horizon)
        frames.append(explanation.overlay(canvas[0], maps[0], weights))
        return chunk

    queue = make_queue(policy, config, 1)
    with closing(_make_simulator(policy, config)) as simulator:
        for _ in rollout(simulator, EpisodeStart(task, config.seed), queue, predict):
            pass

    _write_video(path, frames, fps=CONTROL_FPS // int(queue.replan.max()))


def evaluate_imaginations(
    policy: WAMPolicy, config: EvalConfig, tasks: list[str]
) -> dict[str, dict[str, list[float]]]:
    """Return the PSNR of the imagined futures of each task, and write one video per task."""
    scores = {}
    for task in tasks:
        path = video_path(config.output_dir, task, "_imagined")
        scores[task] = evaluate_imagination(policy, config, config.task_argument(task), path)
    return scores


def record_explanations(policy: WAMPolicy, config: EvalConfig, tasks: list[str]) -> None:
    """Write a video of the action head's attention for each task."""
    for task in tasks:
        path = video_path(config.output_dir, task, "_explained")
        record_explanation(policy, config, config.task_argument(task), path)


def record_videos(policy: WAMPolicy, config: EvalConfig, tasks: list[str]) -> None:
    """Write a video for each task that does not have one from an earlier run."""
    for task in tasks:
        path = video_path(config.output_dir, task)
        if not path.exists():
            record_video(policy, config, config.task_argument(task), path)
