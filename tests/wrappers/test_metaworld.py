"""The Meta-World adapter on the real simulator.

A process can hold one rendering env: each test that renders runs in its own process.
"""

import subprocess
import sys

import pytest

pytest.importorskip("metaworld")

CHECKED = """
import warnings
import gymnasium as gym, numpy as np
from gymnasium.utils.env_checker import check_env
import wam_policy.wrappers

env = gym.make("wam_policy/MetaWorld-v0", task="drawer-open-v3")
warnings.simplefilter("ignore")
check_env(env.unwrapped)

observation, _ = env.reset(seed=7)
for name, picture in observation["pixels"].items():
    # A blank image has no variation.
    assert picture.shape == (64, 64, 3) and picture.std() > 15, name
    rough = np.abs(np.diff(picture.astype(int), axis=0)).mean()
    assert rough < 25, (name, rough)  # the garbage of a second OpenGL context is far rougher

again, _ = env.reset(seed=7)
other, _ = env.reset(seed=8)
assert all(np.array_equal(observation["pixels"][n], again["pixels"][n]) for n in again["pixels"])
assert not np.array_equal(observation["pixels"]["front"], other["pixels"]["front"])

env.reset(seed=7)
env.unwrapped.draw_pixels = False
before = env.unwrapped._pixels["front"]
late, *_ = env.step(np.ones(4, np.float32))
assert late["pixels"]["front"] is before
env.unwrapped.draw_pixels = True
for step in range(200):
    _, _, terminated, _, info = env.step(env.unwrapped.expert_action())
    if terminated:
        break
assert info["is_success"], "the scripted expert opens the drawer"
print("ok", step)
"""

UNSEEN = """
import gymnasium as gym, numpy as np
import wam_policy.wrappers
env = gym.make("wam_policy/MetaWorld-v0", task="reach-v3").unwrapped
goals = []
for seed in range(60):
    env._env.np_random = np.random.default_rng(seed)
    env._env.reset()
    goals.append(env._env._target_pos.copy())
assert len({tuple(g) for g in goals}) == 60, "more goals than Meta-World's 50"
"""


def run(script):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )


def test_it_draws_repeats_by_seed_and_can_be_solved():
    result = run(CHECKED)
    assert result.returncode == 0 and result.stdout.startswith("ok"), result.stderr


def test_every_seed_has_its_own_goal():
    result = run(UNSEEN)
    assert result.returncode == 0, result.stderr


def test_an_unknown_task_lists_those_there_are():
    result = run(
        "import gymnasium, wam_policy.wrappers; "
        "gymnasium.make('wam_policy/MetaWorld-v0', task='fly-v3')"
    )
    assert "EnvError" in result.stderr and "drawer-open-v3" in result.stderr
