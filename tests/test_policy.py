import dataclasses

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TASK, ToyEnv, make_observation, make_policy

from wam_policy.action_queue import OwnQueue
from wam_policy.config import SamplingConfig
from wam_policy.errors import ConfigError, ObservationError, PromptError
from wam_policy.models.encoders.text import PromptEmbeddings, untrained_encoder


def stack(observations: list[dict]) -> dict:
    return {
        key: tuple(o[key] for o in observations)
        if key == "instruction"
        else np.stack([o[key] for o in observations])
        for key in observations[0]
    }


def test_one_observation_gives_one_chunk(policy):
    chunk = policy.predict_chunk(make_observation())
    assert chunk.shape == (4, 3) and chunk.dtype == np.float32 and np.isfinite(chunk).all()


@settings(max_examples=5, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 99), st.sampled_from([TASK, "leave the cube"])),
        min_size=1,
        max_size=4,
    )
)
def test_a_batch_equals_its_single_calls(samples):
    policy = make_policy()
    singles = [make_observation(seed=seed, task=task) for seed, task in samples]
    expected = np.stack([policy.predict_chunk(o) for o in singles])
    assert np.allclose(policy.predict_chunk(stack(singles)), expected, atol=1e-5)


def test_a_batch_equals_its_single_calls_with_one_noise_each(policy):
    noise = np.random.default_rng(0).standard_normal((3, 4, 3))
    singles = [make_observation(seed=i) for i in range(3)]
    expected = np.stack(
        [policy.predict_chunk(o, noise=n) for o, n in zip(singles, noise, strict=True)]
    )
    assert np.allclose(policy.predict_chunk(stack(singles), noise=noise), expected, atol=1e-5)


def test_the_same_seed_gives_the_same_chunk_and_another_seed_another():
    def chunk(seed):
        return make_policy(
            sampling=SamplingConfig(steps=3, video_shift=5.0, action_shift=5.0, seed=seed)
        ).predict_chunk(make_observation())

    assert (chunk(1) == chunk(1)).all() and not np.allclose(chunk(1), chunk(2))


def test_fresh_noise_differs_from_call_to_call_and_repeats_from_the_seed():
    def chunks():
        policy = make_policy(
            sampling=SamplingConfig(steps=3, video_shift=5.0, action_shift=5.0, noise="fresh")
        )
        return [policy.predict_chunk(make_observation()) for _ in range(2)]

    first, second = chunks()
    assert not np.allclose(first, second)
    assert (np.stack(chunks()) == np.stack([first, second])).all()


def test_picture_state_and_instruction_all_matter(policy):
    base = policy.predict_chunk(make_observation())
    for key in ("images.front", "images.wrist", "state"):
        assert not np.allclose(
            policy.predict_chunk(make_observation() | {key: make_observation(seed=1)[key]}), base
        )
    assert not np.allclose(policy.predict_chunk(make_observation(task="leave the cube")), base)


def test_noise_of_a_wrong_shape_is_refused(policy):
    with pytest.raises(ObservationError, match=r"expected \[4, 3\]"):
        policy.predict_chunk(make_observation(), noise=np.zeros((2, 2)))


def test_predict_plays_a_chunk_and_asks_again_when_it_is_used_up(policy):
    chunk = policy.predict_chunk(make_observation())
    played = [policy.predict(make_observation(seed=0 if i == 0 else 1))[0] for i in range(4)]
    assert np.allclose(played[:3], chunk[:3], atol=1e-5)
    assert np.allclose(played[3], policy.predict_chunk(make_observation(seed=1))[0], atol=1e-5)


def test_episode_start_and_reset_drop_only_the_sub_envs_they_name(policy):
    old, new = make_observation(2), make_observation(2, seed=1)
    chunks = policy.predict_chunk(old), policy.predict_chunk(new)
    policy.predict(old)
    actions, _ = policy.predict(new, episode_start=np.array([True, False]))
    assert np.allclose(actions, [chunks[1][0, 0], chunks[0][1, 1]], atol=1e-5)
    policy.reset(np.array([False, True]))
    actions, _ = policy.predict(new)
    assert np.allclose(actions, [chunks[1][0, 1], chunks[1][1, 0]], atol=1e-5)


def test_two_loops_can_share_a_policy_by_passing_their_state(policy):
    chunk = policy.predict_chunk(make_observation())
    _, mine = policy.predict(make_observation())
    policy._own_queue = OwnQueue()
    policy.predict(make_observation(seed=5))
    action, _ = policy.predict(make_observation(seed=9), state=mine)
    assert np.allclose(action, chunk[1], atol=1e-5)


def test_a_state_of_another_number_of_envs_is_refused(policy):
    _, state = policy.predict(make_observation(2))
    with pytest.raises(ObservationError, match="belongs to 2 envs, the observation has 3"):
        policy.predict(make_observation(3), state=state)


def test_predict_that_is_not_deterministic_draws_new_noise(policy):
    start = np.array([True])
    a, b = (
        policy.predict(make_observation(), episode_start=start, deterministic=False)[0]
        for _ in range(2)
    )
    assert not np.allclose(a, b)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_episode_of_a_vector_env_begins_with_its_own_chunk_in_every_autoreset_mode(
    policy, mode
):
    lengths = (2, 5)  # shorter and longer than the 3 actions that are played of a chunk
    envs = policy.wrap(
        SyncVectorEnv([lambda n=n: ToyEnv(length=n) for n in lengths], autoreset_mode=mode)
    )
    observation, _ = envs.reset(seed=3)
    asked: list[
        int
    ] = []  # of sub-env 0: how many actions old the chunk was, at every first step of an episode
    for _ in range(14):
        starts = observation["episode_start"].astype(bool)
        actions, queue = policy.predict(observation)
        for i in np.flatnonzero(starts):
            fresh = policy.predict_chunk({k: v[i] for k, v in observation.items()})[0]
            assert np.allclose(actions[i], fresh, atol=1e-5)
            asked.append(queue._step[i, 0])
        observation, _, terminated, truncated, _ = envs.step(actions)
        ended = terminated | truncated
        if mode == AutoresetMode.DISABLED and ended.any():
            observation, _ = envs.reset(options={"reset_mask": ended})
    assert len(asked) >= 6 and set(asked) == {1}


def test_an_unknown_prompt_names_the_known_ones_and_the_cure(policy):
    with pytest.raises(PromptError, match=r"touch the cube.*add_prompt"):
        policy.predict_chunk(make_observation(task="sing"))
    policy.add_prompt("sing", torch.randn(4, 8))
    assert policy.predict_chunk(make_observation(task="sing")).shape == (4, 3)


def test_an_encoder_is_asked_once_per_prompt():
    calls = []

    def load():
        calls.append(1)
        return untrained_encoder(["do this", "do that"], 16, seed=0)

    prompts = PromptEmbeddings({}, token_length=5, text_dim=16, load_encoder=load)
    here = {"device": torch.device("cpu"), "dtype": torch.float32}
    first = prompts.embed(["do this", "do that"], **here)
    assert (prompts.embed(["do this"], **here) == first[:1]).all() and len(calls) == 1
    assert (first[:, 3:] == 0).all() and (
        first[:, :3] != 0
    ).all()  # two words and the end of sentence, then zeros
    assert not torch.allclose(first[0], first[1])


def test_bad_prompt_embeddings_are_refused(policy):
    with pytest.raises(PromptError, match="expected"):
        policy.add_prompt("sing", torch.randn(6, 8))


# -- variants and imagination ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fast", "joint", "idm", "optional_idm"])
def test_every_variant_acts_and_imagines_with_one_noise(variant):
    policy = make_policy(variant=variant)
    observation = make_observation(2)
    chunk, imagined = policy.predict_chunk(observation), policy.imagine(observation)
    assert np.allclose(imagined.actions, chunk, atol=1e-5)
    assert imagined.frames.dtype == np.uint8 and imagined.frames.shape == (2, 5, 16, 32, 3)
    alone = policy.imagine(make_observation())
    assert alone.actions.shape == (4, 3) and alone.frames.shape == (5, 16, 32, 3)


def test_the_fast_variant_acts_without_regard_to_what_it_imagines():
    policy, observation = make_policy(), make_observation()
    noises = (np.random.default_rng(seed).standard_normal((4, 2, 2, 4)) for seed in (0, 1))
    first, second = (policy.imagine(observation, noise_video=noise) for noise in noises)
    assert np.array_equal(first.actions, second.actions) and not np.array_equal(
        first.frames, second.frames
    )


def test_optional_idm_samples_either_way_by_an_argument_or_by_its_contract():
    policy, observation = make_policy(variant="optional_idm"), make_observation()
    idm, fast = (policy.predict_chunk(observation, mode=mode) for mode in ("idm", "first_frame"))
    assert not np.allclose(idm, fast, atol=1e-3)
    assert np.allclose(policy.predict_chunk(observation), idm, atol=1e-5)
    # The same weights as the fast variant.
    assert np.allclose(make_policy().predict_chunk(observation), fast, atol=1e-5)
    sampling = dataclasses.replace(policy.config.sampling, mode="first_frame")
    assert np.allclose(
        make_policy(variant="optional_idm", sampling=sampling).predict_chunk(observation),
        fast,
        atol=1e-5,
    )


def test_a_mode_the_variant_was_not_trained_for_is_refused():
    with pytest.raises(ConfigError, match="'fast' samples actions by 'first_frame', not by 'idm'"):
        make_policy().predict_chunk(make_observation(), mode="idm")
    sampling = dataclasses.replace(make_policy().config.sampling, mode="joint")
    with pytest.raises(ConfigError, match="not by 'joint'"):
        make_policy(variant="idm", sampling=sampling)
