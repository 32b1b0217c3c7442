"""Registers the adapters of this package as Gymnasium env ids."""

from gymnasium.envs.registration import register, registry


def register_envs() -> None:
    """Make `gymnasium.make("wam_policy/…")` know the adapters; calling it again changes nothing."""
    if "wam_policy/MetaWorld-v0" not in registry:
        register(
            id="wam_policy/MetaWorld-v0",
            entry_point="wam_policy.wrappers.envs.metaworld:MetaWorldEnv",
        )
