"""A policy depends on nothing it is not given: threads, processes, PyTorch's defaults."""

import copy
import io
import multiprocessing
import pickle
import threading

import numpy as np
import pytest
import torch
from tiny import make_light_policy, make_observation, make_policy, put_chunk

from wam_policy import WAMPolicy
from wam_policy.errors import CompileError, ObservationError

MAKERS = {"fast": make_policy, "light": make_light_policy}


def observation_for(kind, seed=0):
    return make_observation(seed=seed, side=32 if kind == "light" else 16)


@pytest.fixture(params=MAKERS)
def kind(request):
    return request.param


@pytest.fixture
def saved(kind, tmp_path):
    return MAKERS[kind]().save_pretrained(tmp_path / "policy")


# -- PyTorch's defaults ----------------------------------------------------------------------------


@pytest.mark.parametrize("default", ["float64", "meta"])
def test_defaults_of_pytorch_change_nothing(kind, saved, default):
    policy = WAMPolicy.from_pretrained(saved)
    observation = observation_for(kind)
    chunk = policy.predict_chunk(observation)
    frames = policy.imagine(observation).frames
    try:
        if default == "float64":
            torch.set_default_dtype(torch.float64)
        else:
            torch.set_default_device("meta")
        again = WAMPolicy.from_pretrained(saved)
        assert again.dtype == torch.float32 and again.device.type == "cpu"
        for one in (policy, again):
            assert np.allclose(one.predict_chunk(observation), chunk, atol=1e-5)
            assert np.abs(one.imagine(observation).frames.astype(int) - frames).max() <= 1
            fresh, _ = one.predict(observation, deterministic=False)
            assert np.isfinite(fresh).all()
        again.save_pretrained(saved.parent / "again")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert np.allclose(
        WAMPolicy.from_pretrained(saved.parent / "again").predict_chunk(observation),
        chunk,
        atol=1e-5,
    )


def test_the_loss_of_a_batch_does_not_depend_on_the_default_dtype(kind):
    policy = MAKERS[kind]()
    side = 32 if kind == "light" else 16
    clip = torch.zeros(2, 5, side, side, 3, dtype=torch.uint8)
    batch = {
        "images.front": clip,
        "images.wrist": clip,
        "state": torch.zeros(2, 2),
        "action": torch.zeros(2, 4, 3),
        "instruction": ["touch the cube"] * 2,
    }
    losses = []
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            generator = torch.Generator().manual_seed(0)
            losses.append(float(policy.training_step(batch, generator=generator)[0]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# -- processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_used", [False, True])
def test_a_policy_can_be_pickled_saved_and_copied(kind, saved, is_used):
    policy = WAMPolicy.from_pretrained(saved)
    observation = observation_for(kind)
    chunk = WAMPolicy.from_pretrained(saved).predict_chunk(observation)
    if is_used:
        policy.predict(observation)
        policy.imagine(observation)
    buffer = io.BytesIO()
    torch.save(policy, buffer)
    buffer.seek(0)
    copies = [
        pickle.loads(pickle.dumps(policy)),
        copy.deepcopy(policy),
        torch.load(buffer, weights_only=False),
    ]
    for one in copies:
        assert np.allclose(one.predict_chunk(observation), chunk, atol=1e-5)
        assert np.allclose(one.predict(observation)[0], chunk[0], atol=1e-5)
        assert one.imagine(observation).frames.shape[0] == 5


def test_a_policy_acts_in_a_process_that_is_spawned(saved, kind):
    policy = WAMPolicy.from_pretrained(saved)
    observation = observation_for(kind)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=put_chunk, args=(policy, observation, answers))
    process.start()
    assert np.allclose(answers.get(timeout=120), policy.predict_chunk(observation), atol=1e-4)
    process.join()


def test_a_compiled_policy_says_what_to_pickle_instead():
    policy = make_policy().compile(backend=None)
    with pytest.raises(CompileError, match="send the one it was compiled from"):
        pickle.dumps(policy)


# -- threads ---------------------------------------------------------------------------------------


def in_threads(count, work):
    """Run a function of a number in threads, and return what it returned or raised."""
    results = [None] * count

    def run(i):
        try:
            results[i] = work(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_imagine_and_train_on_one_policy(saved, kind):
    policy = WAMPolicy.from_pretrained(saved)
    seen = [observation_for(kind, seed=i) for i in range(3)]
    alone = [WAMPolicy.from_pretrained(saved).imagine(one).frames.astype(int) for one in seen]

    def work(i):
        return max(
            int(np.abs(policy.imagine(seen[i]).frames.astype(int) - alone[i]).max())
            for _ in range(4)
        )

    assert max(in_threads(3, work)) <= 2


def test_the_codec_encodes_clips_in_several_threads():
    vae = make_policy().vae
    clips = [
        torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)
    ]
    with torch.no_grad():
        alone = [vae.encode(clip) for clip in clips]

        @torch.no_grad()
        def work(i):
            return max(float((vae.encode(clips[i]) - alone[i]).abs().max()) for _ in range(5))

        assert max(in_threads(3, work)) < 1e-5


def test_a_policy_s_own_queue_is_one_thread_s_until_it_is_reset():
    policy = make_policy()
    policy.predict(make_observation())
    (refused,) = in_threads(1, lambda _: policy.predict(make_observation()))
    assert isinstance(refused, ObservationError)
    assert "give each loop a queue" in str(refused)
    queue = policy.queue()
    (taken,) = in_threads(1, lambda _: policy.predict(make_observation(), state=queue))
    assert taken[1] is queue
    policy.reset()
    (taken,) = in_threads(1, lambda _: policy.predict(make_observation()))
    assert isinstance(taken, tuple)
