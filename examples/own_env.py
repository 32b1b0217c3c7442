"""Describe your own simulator to a policy: its cameras, its state and the meaning of actions."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from wam_policy import WAMPolicy
from wam_policy.checkpoints import embedded
from wam_policy.contract import ActionLayout, Gripper


class MyRobot(gym.Env):
    """Stand-in for your simulator, with names, an order and a gripper convention of its own."""

    picture = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    arm = spaces.Box(-np.inf, np.inf, (4,), np.float32)
    observation_space = spaces.Dict({"top": picture, "hand": picture, "arm": arm})
    action_space = spaces.Box(np.array([0, -1, -1, -1], np.float32), np.ones(4, np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


policy = WAMPolicy.from_pretrained(embedded("metaworld-fast-wam"))
env = policy.wrap(
    MyRobot(),
    cameras={"front": "top", "wrist": "hand"},
    state="arm",
    # The policy picks the numbers of the state by name, in any order.
    state_names=("gripper_opening", "hand_x", "hand_y", "hand_z"),
    instruction="open the drawer",
    action=ActionLayout(
        names=("claw", "delta_x", "delta_y", "delta_z"),
        control="end_effector_delta",
        gripper=Gripper(index=0, open=1.0, closed=0.0),
    ),
)

observation, _ = env.reset(seed=0)
action, _ = policy.predict(observation)
print("action in the policy's order:", action)
