"""Registration of the simulator adapters as Gymnasium env ids."""

from gymnasium.envs.registration import register, registry


def register_envs() -> None:
    """Register the ids "wam_policy/…" for `gymnasium.make`; repeated calls change nothing."""
    if "wam_policy/MetaWorld-v0" not in registry:
        register(
            id="wam_policy/MetaWorld-v0",
            entry_point="wam_policy.wrappers.envs.metaworld:MetaWorldEnv",
        )
