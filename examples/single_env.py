"""Load a policy in one line and drive one simulator with it."""

import gymnasium as gym

from wam_policy import WAMPolicy
from wam_policy.checkpoints import embedded

policy = WAMPolicy.from_pretrained(
    embedded("metaworld-fast-wam")
)  # or "organisation/name" on the Hub
env = policy.wrap(gym.make("wam_policy/MetaWorld-v0", task="drawer-open-v3"))

observation, info = env.reset(seed=0)
steps, done = 0, False
while not done:
    action, _ = policy.predict(observation)
    observation, reward, terminated, truncated, info = env.step(action)
    steps, done = steps + 1, terminated or truncated
print(f"success: {info['is_success']} after {steps} steps")
env.close()
