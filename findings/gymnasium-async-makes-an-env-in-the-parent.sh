#!/usr/bin/env bash
# gymnasium 1.4.0: AsyncVectorEnv also makes an env in the caller's process, and its memory can stay there.
#
# One would expect that `AsyncVectorEnv([make] * n, context="spawn")` makes n envs, each in a process of its own; that is why one uses
# it for simulators. It makes n + 1: it calls the first function in the caller's process to read the spaces, before the workers start.
# So the simulator is imported beside the policy, everything that `__init__` does happens there too (files, devices, random numbers),
# and an env whose objects refer to each other, as those of a simulator do, keeps its memory until the garbage collector runs. LIBERO
# envs left 0.9 GiB in the process of a policy in this way. Where that matters, the workers have to be started by other means.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gymnasium==1.4.0 numpy==2.4.6

cat > "$folder/simulator.py" <<'PY'
import os
import weakref

import gymnasium as gym
import numpy as np

MADE = []  # the scenes of this process


class Scene:
    """What a simulator holds: it refers to its env, and the env to it."""

    def __init__(self, env):
        self.env = env
        self.memory = np.ones(2**22)  # 32 MiB


class Simulator(gym.Env):
    observation_space = gym.spaces.Box(0, 2**31, (1,), np.int64)
    action_space = gym.spaces.Discrete(2)

    def __init__(self):
        self.scene = Scene(self)
        MADE.append(weakref.ref(self.scene))

    def reset(self, *, seed=None, options=None):
        return np.array([os.getpid()], np.int64), {}
PY

cat > "$folder/run.py" <<'PY'
import gc
import os

from gymnasium.vector import AsyncVectorEnv
from simulator import MADE, Simulator

if __name__ == "__main__":
    gc.disable()  # so that the time of the next collection does not matter
    envs = AsyncVectorEnv([Simulator] * 2, context="spawn")
    workers = set(envs.reset()[0][:, 0].tolist()) - {os.getpid()}
    held = sum(scene() is not None for scene in MADE)
    print(f"workers: {len(workers)}; envs made in the caller's process: {len(MADE)}, of which {held} still hold their memory")
    assert (len(workers), len(MADE), held) == (2, 1, 1)
    gc.collect()
    held = sum(scene() is not None for scene in MADE)
    print(f"after a collection: {held}")
    assert held == 0
    envs.close()
PY
cd "$folder"
"$folder/venv/bin/python" run.py
