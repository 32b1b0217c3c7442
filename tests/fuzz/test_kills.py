"""A save that is killed, a full disk, and two processes in one folder lose nothing."""

import os
import random
import resource
import signal
import time

import numpy as np
import pytest
import torch
from tiny import make_config, make_observation, make_policy, unit_range

from wam_policy import WAMPolicy
from wam_policy.errors import WAMPolicyError

KILLS = 320


def two_policies():
    """Two policies that differ in weights and contract, and what they do."""
    from dataclasses import replace

    torch.set_num_threads(1)
    first = make_policy()
    action = replace(make_config().action, normalization=unit_range(3, 10.0))
    second = make_policy(action=action)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.add_(0.05)
    chunks = [policy.predict_chunk(make_observation()) for policy in (first, second)]
    return (first, second), chunks


def which(folder, chunks) -> int:
    """Which of the two policies a folder holds, whole."""
    chunk = WAMPolicy.from_pretrained(folder, verify=True).predict_chunk(make_observation())
    (found,) = [i for i, known in enumerate(chunks) if np.allclose(chunk, known, atol=1e-5)]
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_save_that_is_killed_leaves_the_old_policy_or_the_new_one(tmp_path):
    policies, chunks = two_policies()
    folder = policies[0].save_pretrained(tmp_path / "policy")
    rng = random.Random(0)
    counts = [0, 0]
    for i in range(KILLS):
        child = os.fork()
        if child == 0:
            while True:
                policies[(i + 1) % 2].save_pretrained(folder)
        time.sleep(rng.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        counts[which(folder, chunks)] += 1
        leftovers = {path.name for path in folder.iterdir() if path.name.startswith(".")}
        assert leftovers <= {".incomplete"}
    print(f"\n{KILLS} kills: 0 lost, {counts[0]} and {counts[1]} of the two policies found")
    assert min(counts) > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_folder_that_is_replaced_while_it_is_loaded_gives_one_policy(tmp_path):
    policies, chunks = two_policies()
    folder = policies[0].save_pretrained(tmp_path / "policy")
    child = os.fork()
    if child == 0:
        for i in range(10_000):
            policies[i % 2].save_pretrained(folder)
        os._exit(0)
    counts = {"loaded": 0, "refused": 0}
    for _ in range(150):
        try:
            chunk = WAMPolicy.from_pretrained(folder).predict_chunk(make_observation())
        except WAMPolicyError:
            counts["refused"] += 1
            continue
        counts["loaded"] += 1
        assert any(np.allclose(chunk, known, atol=1e-5) for known in chunks)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(f"\nloads while the folder is replaced: {counts}")
    assert counts["loaded"] > 0


def limited(size: int, action) -> int:
    """Run an action in a process whose files may have so many bytes; return its exit code."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            action()
            os._exit(1)
        except WAMPolicyError:
            os._exit(0)
        except BaseException:
            os._exit(2)
    return os.WEXITSTATUS(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("size", [0, 100, 3000, 20_000])
def test_a_full_disk_leaves_the_old_policy_whole(tmp_path, size):
    policies, chunks = two_policies()
    folder = policies[0].save_pretrained(tmp_path / "policy")
    before = sorted(path.name for path in folder.rglob("*"))
    assert limited(size, lambda: policies[1].save_pretrained(folder)) == 0
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert which(folder, chunks) == 0


def test_two_processes_that_save_into_one_folder_wait_for_each_other(tmp_path):
    policies, chunks = two_policies()
    folder = tmp_path / "policy"
    children = []
    for policy in policies:
        child = os.fork()
        if child == 0:
            for _ in range(5):
                policy.save_pretrained(folder)
            os._exit(0)
        children.append(child)
    assert [os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert which(folder, chunks) in (0, 1)
