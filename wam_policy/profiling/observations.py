"""Observations to measure a policy on: random ones, or those it meets in an env."""

# B batch

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from wam_policy import images
from wam_policy.errors import ConfigError
from wam_policy.evaluation.rollout import rollout
from wam_policy.observation import INSTRUCTION
from wam_policy.policy import WAMPolicy
from wam_policy.wrappers.envs.make import make_env

ObservationSource = Callable[[int, int], dict[str, Any]]
"""(i, B) -> the i-th batch of B observations."""


def random_observation(policy: WAMPolicy, size: int, seed: int) -> dict[str, Any]:
    """Random pictures and states of a batch, and an instruction that the policy knows.

    Raises:
        ConfigError: the policy knows none.
    """
    rng, spec = np.random.default_rng(seed), policy.config
    sizes = images.tiles(
        len(spec.cameras.names), spec.cameras.height, spec.cameras.width, spec.cameras.layout
    )
    observation: dict[str, Any] = {
        f"images.{name}": rng.integers(0, 256, (size, *(spec.cameras.before or tile), 3), np.uint8)
        for name, tile in zip(spec.cameras.names, sizes, strict=True)
    }
    if spec.state is not None:
        normalised = rng.uniform(-1, 1, (size, len(spec.state.names))).astype(np.float32)
        observation["state"] = spec.state.normalization.denormalize(normalised)
    if not policy.prompts.table:
        raise ConfigError(
            "this policy knows no instruction yet: `policy.add_prompt(instruction)` first"
        )
    before, _, after = spec.prompt.template.partition("{task}")
    known = next(iter(policy.prompts.table))
    return {**observation, "instruction": (known[len(before) : len(known) - len(after)],) * size}


def random_observations(policy: WAMPolicy) -> ObservationSource:
    """Random observations, each by itself."""
    return lambda i, size: random_observation(policy, size, i)


def rollout_observations(
    policy: WAMPolicy, env_id: str, task: str | None, count: int
) -> ObservationSource:
    """What a policy meets in an env when it asks for a chunk, in order, episode after episode from seed 0.

    The samples of a batch follow each other, and so do the batches.

    Args:
        policy: the policy that plays.
        env_id: Gymnasium id.
        task: value of the env's `task` argument; None: it is made without.
        count: how many are needed, samples and batches together.
    """
    seen: list[dict[str, Any]] = []

    def ask(observation: dict[str, Any]) -> np.ndarray:
        seen.append(
            {
                name: value if name == INSTRUCTION else np.array(value)
                for name, value in observation.items()
            }
        )
        return policy.predict_chunk(observation)

    plain = SyncVectorEnv([lambda: make_env(env_id, task)], autoreset_mode=AutoresetMode.DISABLED)
    with closing(plain):
        env: Any = policy.wrap(plain)
        for seed in itertools.count():
            for _ in rollout(env, seed, policy.queue(), ask):
                if len(seen) >= count:
                    return lambda i, size: _joined(seen[i : i + size])
    raise AssertionError


def _joined(seen: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches of one as a batch."""
    joined: dict[str, Any] = {
        name: np.concatenate([one[name] for one in seen]) for name in seen[0] if name != INSTRUCTION
    }
    return joined | {INSTRUCTION: tuple(one[INSTRUCTION][0] for one in seen)}
