"""Load a policy in one line and control one simulator with it."""

import gymnasium as gym

from wam_policy import WAMPolicy
from wam_policy.checkpoints import embedded

# `from_pretrained` also takes "organisation/name" on the Hub.
policy = WAMPolicy.from_pretrained(embedded("metaworld-fast-wam"))
env = policy.wrap(gym.make("wam_policy/MetaWorld-v0", task="drawer-open-v3"))

observation, info = env.reset(seed=0)
steps = 0
done = False
while not done:
    action, _ = policy.predict(observation)
    observation, reward, terminated, truncated, info = env.step(action)
    steps += 1
    done = terminated or truncated
print(f"success: {info['is_success']} after {steps} steps")
env.close()
