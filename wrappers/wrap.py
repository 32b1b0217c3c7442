"""Adaptation of an env to a policy: the env's contract is matched with the policy's inputs."""

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

AnyEnv = gym.Env[Any, Any] | gym.vector.VectorEnv


def env_contract(env: AnyEnv, overrides: Mapping[str, Any]) -> EnvContract:
    """Return the contract of an env.

    Args:
        env: Env, single or vector, with or without an attribute `contract`.
        overrides: Fields of `EnvContract` that replace or complete what the env declares.

    Returns:
        The declared contract with the overrides applied.

    Raises:
        EnvError: The contract is incomplete or invalid.
    """
    if "state" in overrides and "state_names" not in overrides:
        raise EnvError(
            "`state` gives the path of the state; name its components as well: "
            "policy.wrap(env, state=…, state_names=(…))"
        )
    declared = _declared_contract(env)
    if declared is not None:
        return _checked(lambda: replace(declared, **overrides))

    missing = [name for name in ("cameras", "action") if name not in overrides]
    if missing:
        raise EnvError(
            f"the env declares no `contract`; pass {' and '.join(missing)}: "
            f"policy.wrap(env, cameras={{'front': 'render()'}}, "
            f"action=ActionLayout(names=…, control=…, gripper=…))"
        )
    return _checked(lambda: EnvContract(**overrides))


def _checked(make_contract: Callable[[], EnvContract]) -> EnvContract:
    """Create a contract; report an invalid one as an error of the env."""
    try:
        return make_contract()
    except ConfigError as error:
        raise EnvError(f"the env's contract is invalid: {error}") from error


def _declared_contract(env: AnyEnv) -> EnvContract | None:
    """Return the contract that an env or all sub-envs declare; None if there is none."""
    if isinstance(env, gym.Env):
        if not env.has_wrapper_attr("contract"):
            return None
        contracts: tuple[Any, ...] | None = (env.get_wrapper_attr("contract"),)
    else:
        contracts = sub_env_attributes(env, "contract")
    if contracts is None:
        return None

    for contract in contracts:
        if not isinstance(contract, EnvContract):
            raise EnvError(
                f"the env's attribute `contract` must be a wam_policy.contract.EnvContract, "
                f"got {type(contract).__name__}"
            )
    # Contracts hold dicts and cannot be hashed: compare their representations.
    if len({repr(contract) for contract in contracts}) != 1:
        raise EnvError(
            "the sub-envs declare different contracts: wrap each kind of env in a vector env "
            "of its own"
        )
    declared: EnvContract = contracts[0]
    return declared


def _match_cameras(required: tuple[str, ...], contract: EnvContract) -> dict[str, str]:
    """Return the env's name of every required camera: the same name or an alias.

    Raises:
        EnvError: A camera is missing or ambiguous, or two cameras are swapped.
    """
    matched: dict[str, str] = {}
    for name in required:
        try:
            env_name = camera_names.find_camera(name, contract.cameras)
        except ConfigError as error:
            raise EnvError(f"{error}: policy.wrap(env, cameras=…)") from error
        if env_name is not None:
            matched[name] = env_name

    missing = [name for name in required if name not in matched]
    if missing:
        raise EnvError(
            f"the policy needs the cameras {list(required)}, the env has "
            f"{sorted(contract.cameras)}; give their paths: "
            f"policy.wrap(env, cameras={{{missing[0]!r}: 'path.in.the.observation'}})"
        )

    paths = {name: contract.cameras[env_name] for name, env_name in matched.items()}
    swapped = camera_names.find_swapped(paths)
    if swapped is not None:
        name, other = swapped
        raise EnvError(
            f"cameras are swapped: the path of {name!r}, {paths[name]!r}, "
            f"names the policy's camera {other!r}; exchange the paths"
        )
    return matched


def _match_state(required: tuple[str, ...], contract: EnvContract, env: AnyEnv) -> tuple[int, ...]:
    """Return the index of every required component in the env's state vector.

    Raises:
        EnvError: A component is missing, or the names do not fit the vector.
    """
    available = contract.state_names
    if contract.state is None or not set(required) <= set(available):
        raise EnvError(
            f"the policy needs the state {list(required)}, the env has {list(available)}; "
            f"give its path and name its components: "
            f"policy.wrap(env, state='path', state_names=(…))"
        )
    space = env.observation_space if isinstance(env, gym.Env) else env.single_observation_space
    shape = get_path(space, contract.state).shape
    if shape != (len(available),):
        raise EnvError(
            f"the state at {contract.state!r} has shape {shape}, but {len(available)} names: "
            f"{list(available)}; name every component"
        )
    return tuple(available.index(name) for name in required)


def wrap(
    env: AnyEnv,
    *,
    cameras: tuple[str, ...],
    state_names: tuple[str, ...] | None,
    layout: ActionLayout,
    overrides: Mapping[str, Any],
    text: bool = True,
    render_size: tuple[int, int] | None = None,
) -> AnyEnv:
    """Wrap an env so that a policy can control it.

    Args:
        env: Env, single or vector.
        cameras: Cameras that the policy reads.
        state_names: Components of the state that the policy reads; None: it reads no state.
        layout: Layout of the policy's actions.
        overrides: Fields of `EnvContract` that replace or complete what the env declares.
        text: Whether observations hold the instruction.
        render_size: Height and width of rendered images, if they must be known before a reset.

    Returns:
        The env in a `WAMObservation` and a `WAMAction`, or their vector counterparts.

    Raises:
        EnvError: Cameras or components of the state are missing, or cameras are swapped.
        ActionError: The actions cannot be converted.
    """
    if not isinstance(env, (gym.Env, gym.vector.VectorEnv)):
        raise EnvError(f"expected a Gymnasium env, single or vector, got {type(env).__name__}")
    contract = env_contract(env, overrides)
    matched = _match_cameras(cameras, contract)

    rotated = [name for name, env_name in matched.items() if env_name in contract.rotated_cameras]
    arguments: dict[str, Any] = {
        "cameras": {name: contract.cameras[env_name] for name, env_name in matched.items()},
        "rotated_cameras": tuple(rotated),
        "instruction": contract.instruction,
        "text": text,
        "render_size": render_size,
    }
    if state_names is not None:
        arguments["state"] = contract.state
        arguments["state_indices"] = _match_state(state_names, contract, env)

    if isinstance(env, gym.Env):
        observed = WAMObservation(env, **arguments)
        return WAMAction(observed, source=layout, target=contract.action)
    vector_observed = VectorWAMObservation(env, **arguments)
    return VectorWAMAction(vector_observed, source=layout, target=contract.action)
