"""Fits an env to a policy: what the env declares, or what the caller says for it, against what the policy wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gymnasium as gym

from wam_policy import cameras as camera_names
from wam_policy.contract import ActionLayout, EnvContract
from wam_policy.errors import ConfigError, EnvError
from wam_policy.wrappers.action import VectorWAMAction, WAMAction
from wam_policy.wrappers.observation import VectorWAMObservation, WAMObservation, sub_env_attributes
from wam_policy.wrappers.paths import get_path


def env_contract(
    env: gym.Env[Any, Any] | gym.vector.VectorEnv, overrides: Mapping[str, Any]
) -> EnvContract:
    """What the env declares, with what the caller says put over it.

    Raises:
        EnvError: neither side says where the cameras are or what the actions mean.
    """
    declared = _declared(env)
    if "state" in overrides and "state_names" not in overrides:
        raise EnvError(
            "`state` says where the numbers are; say what they are too: policy.wrap(env, state=…, state_names=(…))"
        )
    if declared is not None:
        return _described(lambda: replace(declared, **overrides))
    missing = [name for name in ("cameras", "action") if name not in overrides]
    if missing:
        raise EnvError(
            f"the env declares no `contract`; say {' and '.join(missing)}: "
            f"policy.wrap(env, cameras={{'front': 'render()'}}, action=ActionLayout(names=…, control=…, gripper=…))"
        )
    return _described(lambda: EnvContract(**overrides))


def _described(make: Callable[[], EnvContract]) -> EnvContract:
    try:
        return make()
    except ConfigError as error:
        raise EnvError(f"the env's description is incomplete: {error}") from error


def _declared(env: gym.Env[Any, Any] | gym.vector.VectorEnv) -> EnvContract | None:
    if isinstance(env, gym.Env):
        return env.get_wrapper_attr("contract") if env.has_wrapper_attr("contract") else None
    found = sub_env_attributes(env, "contract")
    if found is None:
        return None
    if len(set(map(repr, found))) != 1:
        raise EnvError(
            "the sub-envs declare different contracts: use one policy wrapper for each kind of env"
        )
    return found[0]


def _match_cameras(wanted: tuple[str, ...], contract: EnvContract) -> dict[str, str]:
    """The env's names of the cameras that are wanted, by the same name or by an alias.

    Raises:
        EnvError: a camera is missing, or two of them are swapped.
    """
    try:
        found = {name: camera_names.find_camera(name, contract.cameras) for name in wanted}
    except ConfigError as error:
        raise EnvError(f"{error}: policy.wrap(env, cameras=…)") from error
    missing = [name for name, there in found.items() if there is None]
    if missing:
        raise EnvError(
            f"the policy needs the cameras {list(wanted)}, the env has {sorted(contract.cameras)}; "
            f"name them: policy.wrap(env, cameras={{{missing[0]!r}: 'path.in.the.observation'}})"
        )
    named = {name: there for name, there in found.items() if there is not None}
    places = {name: contract.cameras[there] for name, there in named.items()}
    if swap := camera_names.find_swapped(places):
        raise EnvError(
            f"cameras are swapped: {swap[0]!r} is said to be at {places[swap[0]]!r}, which is the policy's {swap[1]!r} by name"
        )
    return named


def wrap(
    env: gym.Env[Any, Any] | gym.vector.VectorEnv,
    *,
    cameras: tuple[str, ...],
    state_names: tuple[str, ...] | None,
    layout: ActionLayout,
    overrides: Mapping[str, Any],
) -> gym.Env[Any, Any] | gym.vector.VectorEnv:
    """Wrap `env` for a policy that wants `cameras`, a state of `state_names` and acts in `layout`.

    Raises:
        EnvError: cameras or state numbers are missing, or cameras are swapped.
        ActionError: the actions can't be mapped.
    """
    if not isinstance(env, (gym.Env, gym.vector.VectorEnv)):
        raise EnvError(f"expected a Gymnasium env, single or vector, got {type(env).__name__}")
    contract = env_contract(env, overrides)
    named = _match_cameras(cameras, contract)
    pick = None
    if state_names is not None:
        lacking = [name for name in state_names if name not in contract.state_names]
        if contract.state is None or lacking:
            raise EnvError(
                f"the policy needs the state {list(state_names)}, the env's has {list(contract.state_names)}; "
                f"say where it is and what its numbers are: policy.wrap(env, state='path', state_names=(…))"
            )
        single = env.observation_space if isinstance(env, gym.Env) else env.single_observation_space
        shape = get_path(single, contract.state).shape
        if shape != (len(contract.state_names),):
            raise EnvError(
                f"the state at {contract.state!r} has shape {shape}, but {len(contract.state_names)} names: "
                f"{list(contract.state_names)}; name every number"
            )
        pick = tuple(contract.state_names.index(name) for name in state_names)
    where: dict[str, Any] = {
        "cameras": {name: contract.cameras[there] for name, there in named.items()},
        "rotated_cameras": tuple(
            name for name, there in named.items() if there in contract.rotated_cameras
        ),
        "state": None if state_names is None else contract.state,
        "state_indices": pick,
        "instruction": contract.instruction,
    }
    if isinstance(env, gym.Env):
        return WAMAction(WAMObservation(env, **where), source=layout, target=contract.action)
    return VectorWAMAction(
        VectorWAMObservation(env, **where), source=layout, target=contract.action
    )
