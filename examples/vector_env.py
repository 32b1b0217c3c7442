"""Control several simulators, one process each, with one batched forward pass."""

from functools import partial

import gymnasium as gym
import numpy as np

from wam_policy import WAMPolicy
from wam_policy.checkpoints import embedded
from wam_policy.wrappers import make_env

if __name__ == "__main__":
    policy = WAMPolicy.from_pretrained(embedded("metaworld-fast-wam"))
    tasks = ("button-press-topdown-v3", "drawer-open-v3")
    make = [partial(make_env, "wam_policy/MetaWorld-v0", task) for task in tasks]
    envs = policy.wrap(gym.vector.AsyncVectorEnv(make, context="spawn"))

    observations, _ = envs.reset(seed=0)
    done = np.zeros(2, bool)
    success = np.zeros(2, bool)
    while not done.all():
        # `predict` returns the next action of each chunk, and predicts a new chunk when needed.
        actions, _ = policy.predict(observations)
        observations, _, terminated, truncated, infos = envs.step(actions)
        success |= ~done & infos["is_success"]
        done |= terminated | truncated

    print(dict(zip(tasks, success.tolist(), strict=True)))
    envs.close()
