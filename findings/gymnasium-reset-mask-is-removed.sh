#!/usr/bin/env bash
# gymnasium 1.4.0: a partial reset of a vector env changes the caller's options.
#
# `envs.reset(options={"reset_mask": mask})` resets only the sub-envs of the mask. One would expect that the dict of options can be
# kept and passed again, as an argument of `reset` is an input. But SyncVectorEnv and AsyncVectorEnv remove "reset_mask" from the very
# dict that they are given: the second call with the same dict resets every sub-env, without an error or a warning. A wrapper that
# reads the mask after it has called the inner `reset` finds none either, and takes a partial reset for a full one. The dict has to be
# built anew for every call, and a wrapper has to read the mask before it calls the inner env.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gymnasium==1.4.0 numpy==2.4.6

cat > "$folder/run.py" <<'PY'
import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv


class Counter(gym.Env):
    """Its observation is the number of resets."""

    observation_space = gym.spaces.Box(0, 100, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self):
        self.resets = 0

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        return np.array([self.resets], np.float32), {}

    def step(self, action):
        return np.array([self.resets], np.float32), 0.0, False, False, {}


if __name__ == "__main__":
    for kind in (SyncVectorEnv, AsyncVectorEnv):
        envs = kind([Counter, Counter], autoreset_mode=AutoresetMode.DISABLED)
        envs.reset()
        options = {"reset_mask": np.array([True, False])}
        first = envs.reset(options=options)[0][:, 0].tolist()
        left = sorted(options)
        second = envs.reset(options=options)[0][:, 0].tolist()
        envs.close()
        print(f"{kind.__name__}: resets after the first call {first}, options left {left}, "
              f"after the second call with the same dict {second}")
        assert first == [2, 1], first
        assert left == [], left
        assert second == [3, 2], second
PY
"$folder/venv/bin/python" "$folder/run.py"
