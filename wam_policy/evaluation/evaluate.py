"""`wam eval`: measures a policy in a simulator and writes results, table and videos."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from wam_policy.evaluation import results
from wam_policy.evaluation.config import EvalConfig
from wam_policy.evaluation.loading import load_policy
from wam_policy.evaluation.play import play_episodes
from wam_policy.evaluation.protocols import apply_protocol
from wam_policy.evaluation.ray_cluster import play_on_cluster
from wam_policy.evaluation.recording import (
    evaluate_imaginations,
    record_explanations,
    record_videos,
)
from wam_policy.evaluation.results import Episode, Failure, LastFrame
from wam_policy.evaluation.simulator import EpisodeStart
from wam_policy.policy import WAMPolicy
from wam_policy.utils import environment
from wam_policy.utils.io import locked, write_text
from wam_policy.utils.memory import peak_memory
from wam_policy.wrappers.perturbations import check_perturbations


def _play_missing(
    policy: WAMPolicy,
    digest: str,
    config: EvalConfig,
    tasks: list[str],
    finished: list[Episode],
    console: Console,
) -> list[Episode]:
    """Play the episodes that no earlier run has finished, and append them to the results file.

    Args:
        policy: Policy to evaluate.
        digest: SHA-256 of its checkpoint.
        config: Options of the evaluation.
        tasks: Names of the tasks.
        finished: Episodes of earlier runs in the same folder.
        console: Where the progress bars are drawn.

    Returns:
        The episodes of earlier runs and of this one.
    """
    episodes = list(finished)
    done = {(episode.task, episode.seed) for episode in finished}
    seeds = range(config.seed, config.seed + config.episodes)
    missing = [
        EpisodeStart(config.task_argument(task), seed)
        for task in tasks
        for seed in seeds
        if (task, seed) not in done
    ]

    with Progress(console=console) as progress:
        bars = {}
        for task in tasks:
            completed = sum((task, seed) in done for seed in seeds)
            bars[task] = progress.add_task(escape(task), total=config.episodes, completed=completed)

        # An episode counts as soon as it is in the file: a killed run loses none.
        if config.ray is None:
            played = play_episodes(policy, config, missing)
        else:
            played = play_on_cluster(config, digest, missing)
        for result in played:
            if isinstance(result, LastFrame):
                results.write_last_frame(config.output_dir, result)
                continue
            results.append(config.output_dir, result)
            if isinstance(result, Failure):
                failure = f"{result.task} seed {result.seed}: {result.reason}"
                progress.console.print(escape(failure))
                continue
            episodes.append(result)
            successes = sum(e.success and e.task == result.task for e in episodes)
            description = f"{escape(result.task)} {successes} succeeded"
            progress.update(bars[result.task], advance=1, description=description)
    return episodes


def _summarize(
    policy: WAMPolicy, config: EvalConfig, tasks: list[str], episodes: list[Episode], digest: str
) -> dict[str, Any]:
    """Return the content of `summary.json` without the scores of imagination.

    Args:
        policy: Policy that was evaluated.
        config: Options of the evaluation.
        tasks: Names of the tasks.
        episodes: All episodes in the results file; only those of the configured seeds count.
        digest: SHA-256 of the checkpoint.
    """
    seeds = range(config.seed, config.seed + config.episodes)
    counted = [episode for episode in episodes if episode.seed in seeds]

    # The peak over this process and the earlier ones that played some of the episodes.
    measured = (
        peak_memory(policy.device),
        results.earlier_peak_memory(config.output_dir, str(policy.device)),
    )
    peaks = [peak for peak in measured if peak is not None]
    return results.summarize(counted, tasks) | {
        "checkpoint": config.checkpoint,
        "checkpoint_sha256": digest,
        "env": config.env,
        "env_kwargs": config.env_kwargs,
        "perturb": check_perturbations(config.perturb),
        "seeds": [seeds.start, seeds.stop - 1],
        "envs": config.num_envs,
        "failures": results.read_failures(config.output_dir),
        "playing": config.overrides,
        "parameters": sum(parameter.numel() for parameter in policy.model.parameters()),
        "peak_memory_bytes": max(peaks, default=None),
        "device": str(policy.device),
        "dtype": str(policy.dtype).removeprefix("torch."),
        "versions": environment.versions(),
        "commit": environment.commit(),
    }


def evaluate(config: EvalConfig, console: Console | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint, print a table, and write the results.

    Args:
        config: Options of the evaluation.
        console: Where the progress and the table are printed; the default is the terminal.

    Returns:
        The content of `summary.json`.

    Raises:
        ConfigError: The policy does not support what the options ask for.
        ResultsError: The folder holds results of other settings.
        CheckpointError: Another evaluation uses the folder, or it cannot be written.
    """
    console = console or Console()
    config, protocol = apply_protocol(config)
    policy, digest = load_policy(config)
    tasks = [*config.tasks] or [config.env]

    # Play, resuming from an earlier evaluation with the same settings.
    settings: dict[str, Any] = {
        "checkpoint_sha256": digest,
        "env": config.env,
        "seed": config.seed,
        **config.overrides,
    }
    if config.env_kwargs:
        settings["env_kwargs"] = config.env_kwargs
    if protocol is not None:
        settings["protocol"] = protocol.name
    if config.perturb:
        # In the order in which they act, whatever order they are given in.
        settings["perturb"] = check_perturbations(config.perturb)
    if config.max_steps is not None:
        settings["max_steps"] = config.max_steps
    with locked(config.output_dir):
        finished = results.open_results(config.output_dir, settings)
        episodes = _play_missing(policy, digest, config, tasks, finished, console)

        # Summarise. The peak memory is read before any video is made.
        summary = _summarize(policy, config, tasks, episodes, digest)
        if protocol is not None:
            summary["protocol"] = dataclasses.asdict(protocol)
        if config.imagine:
            summary["imagination"] = evaluate_imaginations(policy, config, tasks)
        if config.explain:
            record_explanations(policy, config, tasks)
        write_text(config.output_dir / results.SUMMARY, json.dumps(summary, indent=2) + "\n")
        if config.video:
            record_videos(policy, config, tasks)

    # Print the tables.
    console.print(results.results_table(summary))
    if config.imagine:
        console.print(results.imagination_table(summary, policy.config.video.stride))
    console.print(f"results, episodes and videos: {escape(str(config.output_dir))}/")
    return summary
