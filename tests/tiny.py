"""A policy that fits in a second, and an env that it can drive."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from wam_policy.config import (
    ActionConfig,
    CameraConfig,
    PolicyConfig,
    PromptConfig,
    SamplingConfig,
    Source,
    StateConfig,
    VideoConfig,
)
from wam_policy.contract import ActionLayout, EnvContract, Gripper
from wam_policy.models.config import FastWAMConfig, LightWAMConfig
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.encoders.vae import build_vae
from wam_policy.models.layers.precision import PRECISIONS
from wam_policy.models.registry import build_model
from wam_policy.normalize import Normalization
from wam_policy.policy import WAMPolicy
from wam_policy.presets import PRESETS

TASK = "touch the cube"

TINY_VAE = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "latents_mean": [0.0, 0.1, -0.1, 0.2],
    "latents_std": [1.0, 0.5, 2.0, 1.0],
}

LAYOUT = ActionLayout(
    names=("delta_x", "delta_y", "gripper"),
    control="end_effector_delta",
    gripper=Gripper(index=2, open=1.0, closed=-1.0),
)


def unit_range(dim: int, half: float = 1.0) -> Normalization:
    return Normalization(mode="min_max", statistics={"min": (-half,) * dim, "max": (half,) * dim})


def make_config(**changes) -> PolicyConfig:
    return PolicyConfig(
        **{
            "model": FastWAMConfig(
                action_dim=3,
                proprio_dim=2,
                latent_channels=4,
                video_dim=16,
                video_ffn_dim=24,
                action_expert_dim=12,
                action_expert_ffn_dim=20,
                layers=2,
                heads=2,
                head_dim=12,
                text_dim=8,
                freq_dim=8,
            ),
            "cameras": CameraConfig(names=("front", "wrist"), height=16, width=16),
            "video": VideoConfig(frames=5, stride=1),
            "state": StateConfig(names=("x", "y"), normalization=unit_range(2, 2.0)),
            "action": ActionConfig(layout=LAYOUT, normalization=unit_range(3), horizon=4, replan=3),
            "prompt": PromptConfig(template="do: {task}", token_length=5),
            "sampling": SamplingConfig(steps=3, video_shift=5.0, action_shift=5.0),
            "vae": Source(subfolder="vae"),
            "text": None,
            **changes,
        }
    )


LIGHT_SIZES = LightWAMConfig(
    action_dim=3,
    proprio_dim=2,
    latent_channels=4,
    video_dim=16,
    video_ffn_dim=24,
    layers=4,
    heads=2,
    head_dim=12,
    text_dim=8,
    freq_dim=8,
    taps=(0, 2),
    adapter_dim=5,
    lora_rank=3,
    lora_alpha=6.0,
    features=(("adapted",),) * 2,
    queries=5,
    pool_heads=2,
    layer_dim=10,
    trunk_dim=12,
    step_dim=8,
)


def make_light_config(**changes) -> PolicyConfig:
    sampling = SamplingConfig(steps=3, video_shift=5.0, action_shift=None)
    # A canvas whose latent grid can be pooled.
    cameras = CameraConfig(names=("front", "wrist"), height=32, width=32)
    light = {
        "family": "light_wam",
        "variant": None,
        "model": LIGHT_SIZES,
        "sampling": sampling,
        "cameras": cameras,
    }
    return make_config(**(light | changes))


def make_policy(**changes) -> WAMPolicy:
    """A policy with seeded random weights; `changes` go into its config."""
    return assemble(make_config(**changes))


def make_light_policy(**changes) -> WAMPolicy:
    """The same of a Light-WAM."""
    policy = assemble(make_light_config(**changes))
    for parameter in policy.model.parameters():  # new LoRA and adapters add nothing
        torch.nn.init.normal_(parameter, std=0.3)
    return policy


def make_libero_policy() -> WAMPolicy:
    """A policy with LIBERO's cameras, state and actions that knows the tasks of libero_object."""
    libero = PRESETS["libero"]
    config = make_config(
        model=replace(
            make_config().model, action_dim=libero.layout.dim, proprio_dim=len(libero.state_names)
        ),
        cameras=CameraConfig(names=libero.cameras.names, height=16, width=16),
        state=StateConfig(names=libero.state_names, normalization=unit_range(8, 2.0)),
        action=ActionConfig(
            layout=libero.layout, normalization=unit_range(7), horizon=12, replan=10
        ),
        video=VideoConfig(frames=5, stride=3),
    )
    things = (
        *("alphabet soup", "cream cheese", "salad dressing", "bbq sauce", "ketchup"),
        *("tomato sauce", "butter", "milk", "chocolate pudding", "orange juice"),
    )
    tasks = tuple(f"pick up the {thing} and place it in the basket" for thing in things)
    return assemble(config, tasks=tasks)


def make_robotwin_policy() -> WAMPolicy:
    """A policy with RoboTwin's cameras, state and actions."""
    robotwin = PRESETS["robotwin"]
    return make_policy(
        model=replace(make_config().model, action_dim=14, proprio_dim=14),
        cameras=replace(robotwin.cameras, height=16, width=16),
        state=StateConfig(names=robotwin.state_names, normalization=unit_range(14, 2.0)),
        action=ActionConfig(
            layout=robotwin.layout, normalization=unit_range(14), horizon=12, replan=10
        ),
        video=VideoConfig(frames=5, stride=3),
    )


def assemble(
    config: PolicyConfig, text_dim: int = 8, tasks: tuple[str, ...] = (TASK, "leave the cube")
) -> WAMPolicy:
    torch.manual_seed(0)
    table = {config.prompt.prompt(task): torch.randn(3, text_dim) for task in tasks}
    return WAMPolicy(
        config,
        build_model(config.model, PRECISIONS[config.precision]),
        vae=build_vae(TINY_VAE).eval(),
        prompts=PromptEmbeddings(table, token_length=config.prompt.token_length, text_dim=text_dim),
    )


def make_observation(
    size: int | None = None, seed: int = 0, task: str = TASK, side: int = 16
) -> dict:
    """One observation of the tiny policy, or a batch of `size`; Light-WAM needs a `side` of 32."""
    rng = np.random.default_rng(seed)
    shape = () if size is None else (size,)
    return {
        "images.front": rng.integers(0, 256, (*shape, side, side, 3), np.uint8),
        "images.wrist": rng.integers(0, 256, (*shape, side, side, 3), np.uint8),
        "state": rng.uniform(-1, 1, (*shape, 2)).astype(np.float32),
        "instruction": task if size is None else (task,) * size,
    }


def change_config(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the config of a saved policy in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def same(a: WAMPolicy, b: WAMPolicy) -> bool:
    """Equal weights to the bit, and equal chunks up to what memory alignment does to a sum."""
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    chunks = [policy.predict_chunk(make_observation()) for policy in (a, b)]
    return (
        ours.keys() == theirs.keys()
        and all(torch.equal(ours[n], theirs[n]) for n in ours)
        and np.allclose(*chunks, atol=1e-5)
    )


def put_chunk(policy: WAMPolicy, observation: dict, answers) -> None:
    """Put a policy's chunk into a queue; run in another process."""
    answers.put(policy.predict_chunk(observation))


class ToyEnv(gym.Env):
    """Nested observations: pictures of noise, and a position that actions move."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        length: int = 5,
        instruction: str = TASK,
        render_mode: str | None = "rgb_array",
        width: int = 16,
        height: int = 16,
    ):
        self.length = length
        self.instruction = instruction
        self.render_mode = render_mode
        self.size = (height, width)
        picture = spaces.Box(0, 255, (*self.size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict({"front": picture, "hand.cam": picture}),
                "robot": spaces.Tuple(
                    (spaces.Box(-np.inf, np.inf, (3,), np.float64), spaces.Discrete(2))
                ),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.contract = EnvContract(
            cameras={"front": "pixels.front", "wrist": "pixels.hand.cam"},
            state="robot.0",
            state_names=("time", "y", "x"),
            action=ActionLayout(
                names=("gripper", "delta_x", "delta_y"),
                control="end_effector_delta",
                gripper=Gripper(index=0, open=-1.0, closed=1.0),
            ),
        )
        self.actions: list[np.ndarray] = []

    def _observation(self):
        pictures = {
            name: self.np_random.integers(0, 256, (*self.size, 3), np.uint8)
            for name in ("front", "hand.cam")
        }
        return {"pixels": pictures, "robot": (np.array([self.time, self.y, self.x]), 0)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.actions = 0, []
        self.x, self.y = self.np_random.uniform(-1, 1, 2)
        return self._observation(), {"is_success": False}

    def step(self, action):
        self.time += 1
        self.actions.append(np.asarray(action))
        self.x, self.y = self.x + 0.1 * action[1], self.y + 0.1 * action[2]
        ended = self.time >= self.length
        return self._observation(), 1.0, ended, False, {"is_success": ended}

    def render(self):
        return np.full((*self.size, 3), 7, np.uint8)


class ToyTask(ToyEnv):
    """The toy env with a task, an expert, and a success that depends on the seed."""

    def __init__(self, task: str = "touch", render_mode: str | None = "rgb_array", side: int = 16):
        length = 6 if task == "touch" else 9
        super().__init__(length, f"{task} the cube", render_mode, width=side, height=side)

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        self.lucky = seed is None or seed % 4 != 3
        return observation, info

    def step(self, action):
        observation, reward, ended, truncated, _ = super().step(action)
        return observation, reward, ended, truncated, {"is_success": ended and self.lucky}

    def expert_action(self):
        return np.array([1.0, -self.x, -self.y], np.float32).clip(-1, 1)


class FaultyToy(ToyTask):
    """The toy env whose process dies, hangs or raises in episode `at` until a file exists.

    With the fault "slow" every step takes a tenth of a second. With the fault "wait" the task
    "leave" goes on when an episode of "touch" has ended.
    """

    def __init__(
        self, task: str = "touch", fault: str = "", at: int = 1, marker: str = "", **options
    ):
        super().__init__(task, **options)
        self.task = task
        self.fault = fault
        self.at = at
        self.marker = Path(marker)

    def reset(self, *, seed=None, options=None):
        if seed == self.at and self.fault not in ("", "slow", "wait") and not self.marker.exists():
            self.marker.touch()
            if self.fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "hang":
                time.sleep(1000)
            raise RuntimeError("the simulator is unstable")
        return super().reset(seed=seed, options=options)

    def step(self, action):
        if self.fault == "slow":
            time.sleep(0.1)
        while self.fault == "wait" and self.task == "leave" and not self.marker.exists():
            time.sleep(0.05)
        # The reward shows the actions.
        observation, _, ended, truncated, info = super().step(action)
        if self.fault == "wait" and self.task == "touch" and ended:
            self.marker.touch()
        return observation, float(np.sum(action)), ended, truncated, info


gym.register("Faulty-v0", entry_point=FaultyToy, max_episode_steps=20)
gym.register("Toy-v0", entry_point=ToyTask, max_episode_steps=20)
gym.register(
    "ToyLarge-v0",
    entry_point=lambda side=32, **options: ToyTask(side=side, **options),
    max_episode_steps=20,
)
gym.register("ToyPlain-v0", entry_point=lambda task, **_: ToyEnv())
gym.register("ToyBare-v0", entry_point=ToyEnv)


def toy_vector(mode=AutoresetMode.NEXT_STEP, lengths=(2, 3)):
    """A vector env of toys whose episodes have these lengths."""
    return SyncVectorEnv([lambda n=n: ToyEnv(length=n) for n in lengths], autoreset_mode=mode)
