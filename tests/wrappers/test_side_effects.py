"""Wrapping has no effects, and what the wrapped env returns lies in its space, in any language."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from tiny import TASK, ToyEnv, make_observation, make_policy

from wam_policy.errors import ConfigError, EnvError, ObservationError
from wam_policy.wrappers import WAMObservation
from wam_policy.wrappers.instruction_space import MAX_BYTES, InstructionSpace

RENDERED = {"front": "render()", "wrist": "pixels.hand.cam"}


class CountingEnv(ToyEnv):
    """Counts what is done to it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def reset(self, **options):
        self.calls.append("reset")
        return super().reset(**options)

    def step(self, action):
        self.calls.append("step")
        return super().step(action)

    def render(self):
        self.calls.append("render")
        return super().render()


# -- wrapping --------------------------------------------------------------------------------------


def test_wrapping_neither_resets_nor_steps_nor_renders(policy):
    env = CountingEnv()
    wrapped = policy.wrap(env, cameras=RENDERED)
    assert env.calls == []
    with pytest.raises(EnvError, match=r"not known before the first reset.*render_size"):
        _ = wrapped.observation_space
    observation, _ = wrapped.reset(seed=0)
    assert env.calls == ["reset", "render"]
    assert wrapped.observation_space.contains(observation)


def test_the_size_of_rendered_images_can_be_given(policy):
    def make():
        return policy.wrap(ToyEnv(), cameras=RENDERED, render_size=(16, 16))

    envs = SyncVectorEnv([make, make])
    observations, _ = envs.reset(seed=0)
    assert envs.observation_space.contains(observations)
    inner = SyncVectorEnv([ToyEnv, ToyEnv])
    wrapped = policy.wrap(inner, cameras=RENDERED, render_size=(16, 16))
    assert wrapped.observation_space.contains(wrapped.reset(seed=0)[0])


def test_a_vector_env_is_not_reset_by_wrapping_either(policy):
    envs = SyncVectorEnv([CountingEnv] * 2)
    wrapped = policy.wrap(envs, cameras=RENDERED)
    assert [env.calls for env in envs.envs] == [[], []]
    with pytest.raises(EnvError, match="not known before the first reset"):
        _ = wrapped.observation_space
    observations, _ = wrapped.reset(seed=0)
    assert wrapped.observation_space.contains(observations)


def test_an_env_that_renders_no_images_says_so_at_its_reset(policy):
    class Text(ToyEnv):
        metadata = {"render_modes": []}

        def render(self):
            return "a drawing"

    wrapped = policy.wrap(Text(), cameras=RENDERED)
    with pytest.raises(EnvError, match=r"env\.render\(\) returns no image"):
        wrapped.reset()


# -- sentences -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sentence", ["touch", "拿起方块", "pose le café \U0001f642", "", "x" * 2000]
)
def test_every_sentence_lies_in_the_space(policy, sentence):
    toy = ToyEnv(instruction="touch")
    env = policy.wrap(toy)
    toy.instruction = sentence
    observation, _ = env.reset()
    assert env.observation_space.contains(observation)
    assert policy.wrap(ToyEnv(), instruction=sentence).reset()[0]["instruction"] == sentence


@pytest.mark.parametrize("sentence", ["x" * (MAX_BYTES + 1), "方" * MAX_BYTES, 5, None, b"touch"])
def test_what_is_no_sentence_is_refused(toy, sentence):
    toy.instruction = sentence
    with pytest.raises(EnvError, match="an instruction must be text of at most"):
        WAMObservation(toy, cameras={"front": "pixels.front"})


@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_sentences_reach_the_policy_from_processes(policy, shared_memory, mode):
    def make(sentence):
        return lambda: policy.wrap(ToyEnv(length=2, instruction=sentence))

    sentences = (TASK, "leave the cube")
    envs = AsyncVectorEnv(
        [make(sentence) for sentence in sentences],
        shared_memory=shared_memory,
        autoreset_mode=mode,
    )
    observations, _ = envs.reset(seed=0)
    for _ in range(4):
        assert tuple(observations["instruction"]) == sentences
        assert envs.observation_space.contains(observations)
        actions, _ = policy.predict(observations)
        observations, *_ = envs.step(actions)
    envs.close()


def test_a_sentence_in_shared_memory_changes_with_the_episode(policy):
    class Changing(ToyEnv):
        def reset(self, **options):
            self.instruction = "leave the cube" if self.instruction == TASK else TASK
            return super().reset(**options)

    envs = AsyncVectorEnv([lambda: policy.wrap(Changing())], copy=False)
    shared, _ = envs.reset(seed=0)
    assert list(shared["instruction"]) == ["leave the cube"]
    kept = copy.deepcopy(shared["instruction"])
    envs.reset()
    assert list(shared["instruction"]) == [TASK] and kept == ("leave the cube",)
    assert shared["instruction"][0:1] == (TASK,)
    envs.close()


def test_the_space_has_a_shape_and_a_dtype_that_buffers_of_other_libraries_take():
    space = InstructionSpace()
    buffer = np.zeros((2, *space.shape), dtype=space.dtype)
    buffer[0], buffer[1] = "one", "a longer sentence"
    assert buffer.tolist() == ["one", "a longer sentence"]
    assert space == copy.deepcopy(space) and space != gym.spaces.Text(5)
    assert "InstructionSpace" in repr(space)


def test_an_observation_without_text_holds_arrays_under_keys_without_dots(policy):
    env = policy.wrap(ToyEnv(), text=False)
    observation, _ = env.reset(seed=0)
    assert sorted(observation) == ["episode_start", "images_front", "images_wrist", "state"]
    assert env.observation_space.contains(observation) and env.instruction == TASK
    with pytest.raises(ObservationError, match=r"`policy\.instruction` is that of observations"):
        policy.predict(observation)

    with_text, _ = policy.wrap(ToyEnv()).reset(seed=0)
    expected = policy.predict_chunk(with_text)
    policy.instruction = env.instruction
    assert np.allclose(policy.predict_chunk(observation), expected, atol=1e-6)

    envs = policy.wrap(SyncVectorEnv([ToyEnv] * 2), text=False)
    observations, _ = envs.reset(seed=0)
    assert envs.instruction == (TASK, TASK) and "instruction" not in observations
    assert policy.predict_chunk(observations).shape == (2, 4, 3)


# -- tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: torch.from_numpy(x).bfloat16(),
        lambda x: torch.from_numpy(x).requires_grad_(),
        lambda x: torch.from_numpy(x).double(),
        lambda x: torch.from_numpy(x).half(),
        lambda x: x.astype(np.float16),
        lambda x: x.tolist(),
    ],
)
def test_states_of_every_kind_are_taken(convert):
    policy = make_policy()
    observation = make_observation()
    observation["state"] = np.array([0.5, -0.25], np.float32)
    expected = policy.predict_chunk(observation)
    converted = observation | {"state": convert(observation["state"])}
    assert np.allclose(policy.predict_chunk(converted), expected, atol=1e-5)
    pictures = {key: torch.from_numpy(x) for key, x in observation.items() if "images" in key}
    assert np.allclose(policy.predict_chunk(converted | pictures), expected, atol=1e-5)


@pytest.mark.parametrize(
    "state",
    [
        torch.ones(2).to_sparse(),
        torch.empty(2, device="meta"),
        torch.ones(2, dtype=torch.complex64),
        [1.0, [2.0]],
        [None, 1.0],
        np.array([1.0, None]),
        np.array(["1", "2"]),
        None,
        {},
    ],
)
def test_states_of_other_kinds_are_refused(state):
    with pytest.raises(ObservationError, match="state"):
        make_policy().predict_chunk(make_observation() | {"state": state})


def test_a_single_sentence_may_be_an_array_of_no_axis():
    policy = make_policy()
    observation = make_observation() | {"instruction": np.array(TASK)}
    assert np.allclose(
        policy.predict_chunk(observation), policy.predict_chunk(make_observation()), atol=1e-6
    )


def test_batches_of_nothing_and_noise_that_is_none_are_refused():
    policy = make_policy()
    with pytest.raises(ObservationError, match="the batch is empty"):
        policy.predict_chunk(make_observation(0))
    for noise in (np.full((4, 3), np.nan), np.full((4, 3), np.inf), "noise", [["a"]]):
        with pytest.raises(ObservationError, match="noise"):
            policy.predict_chunk(make_observation(), noise)
    with pytest.raises(ObservationError, match="seeds: expected integers"):
        policy.predict_chunk(make_observation(), seeds=[2**70])
    with pytest.raises(ConfigError, match="`ensemble` must be a finite number"):
        policy.queue(ensemble=float("nan"))
