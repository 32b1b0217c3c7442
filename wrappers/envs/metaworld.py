"""Meta-World v3 tasks as a Gymnasium env with two cameras, proprioception and an instruction.

The seed of `reset` determines the positions of the goal and of the objects. They are drawn from
their whole range, not from Meta-World's list of 50 goals.
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

# Camera -> (position, target point, vertical field of view in degrees); lengths in metres.
# None: the pose of the camera in Meta-World's model.
CAMERAS: dict[str, tuple[tuple[float, ...], tuple[float, ...], float] | None] = {
    "front": ((0.45, 1.4, 0.65), (0.0, 0.72, 0.12), 42.0),
    "wrist": None,
}
# Camera -> name of the camera of Meta-World's model that renders it.
_MODEL_CAMERA = {"front": "corner2", "wrist": "gripperPOV"}

MAX_STEPS = 500  # limit of Meta-World itself


class MetaWorldEnv(gym.Env[dict[str, Any], np.ndarray]):
    """One Meta-World v3 task with a front and a wrist camera.

    Observation: `pixels.front` and `pixels.wrist`, uint8 [size, size, 3]; `agent_pos`, float32
    [4]: position of the hand in metres and opening of the gripper in [0, 1].
    Action: float32 [4] in [-1, 1]: displacement of the hand and gripper command (-1 opens, +1
    closes). The reward is Meta-World's. An episode terminates with success, which
    `info["is_success"]` reports.

    A process can hold only one env that renders: a second OpenGL context draws corrupt images. Use
    `AsyncVectorEnv` for several.
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
        """Create the env of a task.

        Args:
            task: Name of a Meta-World v3 task, for example "drawer-open-v3".
            size: Height and width of the images, in pixels.
            max_steps: Steps after which an episode is truncated; Meta-World allows up to 500.
            shadows: Render shadows and antialias as Meta-World does. This is several times
                slower, and the images differ.
            render_mode: "rgb_array" or None; `render()` returns the front image.

        Raises:
            MissingExtraError: Meta-World is not installed.
            EnvError: The task does not exist, or `max_steps` is out of range.
        """
        if not 1 <= max_steps <= MAX_STEPS:
            raise EnvError(f"`max_steps` must lie between 1 and {MAX_STEPS}, got {max_steps}")
        self._env, self._expert = _make_task(task)
        self.task = task
        self.size = size
        self.max_steps = max_steps
        self.render_mode = render_mode
        self.instruction = INSTRUCTIONS.get(task, task.removesuffix("-v3").replace("-", " "))
        # False: `step` repeats the last images instead of rendering (see `ExecuteChunk`).
        self.draw_pixels = True

        self._steps = 0
        self._renderer: Any = None
        self._pixels: dict[str, np.ndarray] = {}
        self._full_observation: np.ndarray = np.zeros(39)  # with the goal, for the expert
        self._place_cameras(shadows)
        self._declare_spaces()

    def _declare_spaces(self) -> None:
        """Set the spaces and the contract."""
        image = spaces.Box(0, 255, (self.size, self.size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict(dict.fromkeys(CAMERAS, image)),
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
        """Move the cameras of the model to the poses in `CAMERAS` and set the shadows."""
        import mujoco

        model = self._env.model
        if not shadows:
            model.vis.quality.shadowsize = 0
            model.vis.quality.offsamples = 0
            model.light_castshadow[:] = 0

        for name, view in CAMERAS.items():
            if view is None:
                continue
            position, target, field_of_view = view
            camera = model.camera(_MODEL_CAMERA[name]).id

            # A MuJoCo camera looks along its negative z axis; its x axis points to the right.
            backward = np.subtract(position, target)
            backward /= np.linalg.norm(backward)
            right = np.cross((0.0, 0.0, 1.0), backward)
            right /= np.linalg.norm(right)
            up = np.cross(backward, right)
            axes = np.stack([right, up, backward], axis=1)
            mujoco.mju_mat2Quat(model.cam_quat[camera], axes.ravel())
            model.cam_pos[camera] = position
            model.cam_fovy[camera] = field_of_view

    def _draw(self) -> None:
        """Render the images of all cameras."""
        import mujoco

        if self._renderer is None:
            self._renderer = mujoco.Renderer(self._env.model, self.size, self.size)
        for name in CAMERAS:
            self._renderer.update_scene(self._env.data, _MODEL_CAMERA[name])
            self._pixels[name] = self._renderer.render().copy()

    def _observation(self, draw: bool) -> dict[str, Any]:
        """Return the observation; without `draw`, with the images of an earlier step."""
        if draw:
            self._draw()
        state = self._full_observation[:4].astype(np.float32)
        return {"pixels": dict(self._pixels), "agent_pos": state}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Seed of the goal and object positions; None: they continue the sequence of the
                last seed.
            options: Not used.

        Returns:
            Observation and info.
        """
        super().reset(seed=seed)
        self._env.np_random = self.np_random
        self._full_observation, _ = self._env.reset()
        self._steps = 0
        return self._observation(draw=True), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Execute one action; success terminates the episode."""
        result = self._env.step(np.asarray(action, np.float32))
        self._full_observation, reward, _, _, info = result
        self._steps += 1

        success = bool(info["success"])
        truncated = self._steps >= self.max_steps
        observation = self._observation(draw=self.draw_pixels or success or truncated)
        return observation, float(reward), success, truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        """Return the front image, uint8 [size, size, 3]."""
        if not self._pixels:
            raise EnvError("there is no image before the first `reset()`; call it first")
        return self._pixels["front"]

    def expert_action(self) -> np.ndarray:
        """Return the action of Meta-World's scripted policy, which sees the true positions.

        The policies of the reach tasks move the wrist to the goal, but success is measured at the
        fingertips, 4.5 cm below it, with a tolerance of 5 cm. They receive the position of the
        fingertips instead.

        Returns:
            Action, float32 [4] in [-1, 1].
        """
        observation = self._full_observation.copy()
        if self.task.startswith("reach"):
            observation[:3] = self._env.tcp_center
        action = self._expert.get_action(observation)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def close(self) -> None:
        """Release the renderer."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def _make_task(task: str) -> tuple[Any, Any]:
    """Return the env of a Meta-World task and its scripted policy.

    Raises:
        MissingExtraError: Meta-World is not installed.
        EnvError: The task does not exist.
    """
    # MuJoCo reads the variable on import: without it, rendering would need a display.
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        raise MissingExtraError("metaworld", "metaworld") from error
    if task not in ALL_V3_ENVIRONMENTS:
        raise EnvError(
            f"no Meta-World task {task!r}; choose from {', '.join(sorted(ALL_V3_ENVIRONMENTS))}"
        )
    env = ALL_V3_ENVIRONMENTS[task]()

    # The scripted policy needs the goal; the observation of `MetaWorldEnv` never contains it.
    # The cached space has zeros as bounds of the hidden goal, and `step` would clip to them.
    del env.sawyer_observation_space
    env._partially_observable = False

    # Draw new positions from the seeded generator at every reset, and allow reset without a task.
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._set_task_called = True
    return env, ENV_POLICY_MAP[task]()
