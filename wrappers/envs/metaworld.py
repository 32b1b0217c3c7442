"""Meta-World v3 tasks as a Gymnasium env with a front and a wrist camera, proprioception and an instruction.

A task's seed fixes its goal and object positions: `reset(seed=s)` draws them from `s`, without Meta-World's 50-goal list.
"""

from __future__ import annotations

import os
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from wam_policy.contract import ActionLayout, EnvContract, Gripper
from wam_policy.errors import EnvError, MissingExtraError

INSTRUCTIONS = {
    "reach-v3": "reach the red ball",
    "button-press-topdown-v3": "press the button from above",
    "drawer-open-v3": "open the drawer",
    "drawer-close-v3": "close the drawer",
    "door-open-v3": "open the door",
    "door-close-v3": "close the door",
    "window-open-v3": "open the window",
    "window-close-v3": "close the window",
    "faucet-open-v3": "open the faucet",
    "faucet-close-v3": "close the faucet",
    "push-v3": "push the puck to the goal",
    "pick-place-v3": "pick up the puck and bring it to the goal",
    "peg-insert-side-v3": "insert the peg into the hole",
}

# name -> (position, point looked at, vertical field of view in degrees); None: the model's own camera of that name
CAMERAS: dict[str, tuple[tuple[float, ...], tuple[float, ...], float] | None] = {
    "front": ((0.45, 1.4, 0.65), (0.0, 0.72, 0.12), 42.0),
    "wrist": None,
}
_MODEL_CAMERA = {
    "front": "corner2",
    "wrist": "gripperPOV",
}  # the camera of Meta-World's model that each one uses


class MetaWorldEnv(gym.Env[dict[str, Any], np.ndarray]):
    """One Meta-World v3 task, seen by its cameras.

    Observation: `pixels.front` and `pixels.wrist`, uint8 [size, size, 3]; `agent_pos`, float32 [4]: hand x, y, z in
    metres and gripper opening in [0, 1]. Action: float32 [4] in [-1, 1]: hand displacement and gripper effort (-1 opens,
    +1 closes). The reward is Meta-World's; an episode ends with success; `info["is_success"]` tells.

    One process can hold one rendering env only: a second OpenGL context draws garbage. Use `AsyncVectorEnv` for more.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}

    def __init__(
        self,
        task: str = "reach-v3",
        *,
        size: int = 64,
        max_steps: int = 300,
        shadows: bool = False,
        render_mode: str | None = "rgb_array",
    ) -> None:
        """Build the task.

        Args:
            task: a name of Meta-World v3, for example "drawer-open-v3".
            size: height and width of both pictures, in pixels.
            max_steps: an episode is truncated after so many; Meta-World allows 500.
            shadows: draw shadows and antialias as Meta-World does, several times slower. The pictures differ.
            render_mode: "rgb_array" or None; `render()` returns the front picture.
        """
        os.environ.setdefault("MUJOCO_GL", "osmesa")
        try:
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
            from metaworld.policies import ENV_POLICY_MAP
        except ImportError as error:
            raise MissingExtraError("metaworld", "metaworld") from error
        if task not in ALL_V3_ENVIRONMENTS:
            raise EnvError(
                f"no Meta-World task {task!r}; there are {', '.join(sorted(ALL_V3_ENVIRONMENTS))}"
            )
        if not 1 <= max_steps <= 500:
            raise EnvError(f"`max_steps` must lie between 1 and 500, got {max_steps}")
        self.task, self.size, self.render_mode = task, size, render_mode
        self.max_steps, self._steps = max_steps, 0
        self.instruction = INSTRUCTIONS.get(task, task.removesuffix("-v3").replace("-", " "))
        self.draw_pixels = True  # False: `step` repeats the last pictures instead of drawing new ones (see ExecuteChunk)
        self._env = ALL_V3_ENVIRONMENTS[task]()
        del (
            self._env.sawyer_observation_space
        )  # cached with the goal hidden; `step` would clip the goal to its zeros
        self._env._partially_observable = (
            False  # the expert needs the goal; the observation below never shows it
        )
        self._env._freeze_rand_vec, self._env.seeded_rand_vec, self._env._set_task_called = (
            False,
            True,
            True,
        )
        self._expert = ENV_POLICY_MAP[task]()
        self._renderer: Any = None
        self._pixels: dict[str, np.ndarray] = {}
        self._full: np.ndarray = np.zeros(39)
        self._place_cameras(shadows)
        picture = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict(dict.fromkeys(CAMERAS, picture)),
                "agent_pos": spaces.Box(-np.inf, np.inf, (4,), np.float32),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.contract = EnvContract(
            cameras={name: f"pixels.{name}" for name in CAMERAS},
            state="agent_pos",
            state_names=("hand_x", "hand_y", "hand_z", "gripper_opening"),
            action=ActionLayout(
                names=("delta_x", "delta_y", "delta_z", "gripper"),
                control="end_effector_delta",
                gripper=Gripper(index=3, open=-1.0, closed=1.0),
            ),
        )

    def _place_cameras(self, shadows: bool) -> None:
        import mujoco

        model = self._env.model
        if not shadows:
            model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
            model.light_castshadow[:] = 0
        for name, view in CAMERAS.items():
            if view is None:
                continue
            position, target, fov = view
            camera = model.camera(_MODEL_CAMERA[name]).id
            backward = np.subtract(position, target)
            backward /= np.linalg.norm(backward)
            right = np.cross((0.0, 0.0, 1.0), backward)
            right /= np.linalg.norm(right)
            axes = np.stack([right, np.cross(backward, right), backward], axis=1)
            mujoco.mju_mat2Quat(model.cam_quat[camera], axes.ravel())
            model.cam_pos[camera], model.cam_fovy[camera] = position, fov

    def _draw(self) -> None:
        import mujoco

        if self._renderer is None:
            self._renderer = mujoco.Renderer(self._env.model, self.size, self.size)
        for name in CAMERAS:
            self._renderer.update_scene(self._env.data, _MODEL_CAMERA[name])
            self._pixels[name] = self._renderer.render().copy()

    def _observation(self, draw: bool) -> dict[str, Any]:
        if draw:
            self._draw()
        return {"pixels": dict(self._pixels), "agent_pos": self._full[:4].astype(np.float32)}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode whose positions `seed` fixes; without one, they go on from the last seed."""
        super().reset(seed=seed)
        self._env.np_random = self.np_random
        self._full, _ = self._env.reset()
        self._steps = 0
        return self._observation(draw=True), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Move the hand by one action; success ends the episode."""
        self._full, reward, _, _, info = self._env.step(np.asarray(action, np.float32))
        self._steps += 1
        success, truncated = bool(info["success"]), self._steps >= self.max_steps
        observation = self._observation(draw=self.draw_pixels or success or truncated)
        return observation, float(reward), success, truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        """The front picture, uint8 [size, size, 3]."""
        if not self._pixels:
            raise EnvError("there is nothing to draw before the first `reset()`")
        return self._pixels["front"]

    def expert_action(self) -> np.ndarray:
        """What Meta-World's scripted policy, which sees the true positions, would do now: float32 [4] in [-1, 1].

        The policies of the reach tasks bring the wrist to the goal, though success measures the fingertips, 4.5 cm below, and
        allows 5 cm: they are told where the fingertips are instead.
        """
        seen = self._full.copy()
        if self.task.startswith("reach"):
            seen[:3] = self._env.tcp_center
        return np.clip(self._expert.get_action(seen), -1.0, 1.0).astype(np.float32)

    def close(self) -> None:
        """Free the renderer."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
