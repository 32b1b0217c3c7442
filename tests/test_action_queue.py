import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wam_policy.action_queue import ActionQueue
from wam_policy.errors import ConfigError


@given(st.integers(1, 4), st.integers(1, 5), st.lists(st.integers(0, 15), max_size=12))
def test_every_sub_env_plays_its_own_chunk_in_order(size, replan, resets):
    queue, count = ActionQueue(size, replan), 0
    expected: list[list[int]] = [[] for _ in range(size)]
    for bits in resets:
        queue.reset(np.array([bool(bits >> i & 1) for i in range(size)]))
        for i in range(size):
            if bits >> i & 1:
                expected[i] = []
        empty = queue.empty()
        assert empty.tolist() == [not left for left in expected]
        if empty.any():
            chunks = np.arange(count, count + empty.sum() * replan).reshape(-1, replan, 1)
            count += chunks.size
            queue.push(chunks, empty)
            for i, chunk in zip(np.flatnonzero(empty), chunks, strict=True):
                expected[i] = chunk[:, 0].tolist()
        assert queue.pop()[:, 0].tolist() == [left.pop(0) for left in expected]


def chunk(*values: float) -> np.ndarray:
    """A chunk of one number per step, for one env."""
    return np.array(values, np.float32).reshape(1, -1, 1)


def play(queue: ActionQueue, chunks: list[np.ndarray], steps: int) -> list[float]:
    """What one env plays, and the chunks that it asks for on the way."""
    played = []
    for _ in range(steps):
        if queue.empty()[0]:
            queue.push(chunks.pop(0), np.ones(1, bool))
        played.append(float(queue.pop()[0, 0]))
    return played


def test_a_schedule_counts_the_chunks_of_an_episode_and_its_last_number_stays():
    chunks = [chunk(*range(i * 10, i * 10 + 4)) for i in range(6)]
    queue = ActionQueue(1, (1, 3, 2))
    assert play(queue, chunks, 8) == [0, 10, 11, 12, 20, 21, 30, 31]
    queue.reset()
    assert play(queue, chunks, 2) == [40, 50]  # a new episode begins with its first chunk


def test_overlapping_chunks_are_averaged_as_act_does():
    first, second = chunk(0, 0, 0, 0), chunk(4, 4, 4, 4)
    assert play(ActionQueue(1, 2, ensemble=0.0), [first, second], 4) == [0, 0, 2, 2]
    weights = np.exp(-0.5 * np.arange(2))  # the oldest chunk weighs most
    expected = 4 * weights[1] / weights.sum()
    assert play(ActionQueue(1, 2, ensemble=0.5), [first, second], 3)[2] == pytest.approx(expected)


def test_a_chunk_that_is_over_says_nothing_any_more_and_an_episode_s_end_forgets_them_all():
    queue = ActionQueue(1, 1, ensemble=0.0)
    assert play(queue, [chunk(0, 0), chunk(2, 2), chunk(4, 4)], 3) == [0, 1, 3]
    queue.reset(np.ones(1, bool))
    assert play(queue, [chunk(8, 8)], 1) == [8]


@given(st.lists(st.booleans(), min_size=3, max_size=3), st.floats(0, 2))
def test_averaging_equal_chunks_changes_nothing_in_any_sub_env(resets, decay):
    plain, averaged = ActionQueue(3, 2), ActionQueue(3, 2, ensemble=decay)
    same = np.tile(np.float32([[[1.0], [1.0], [1.0]]]), (3, 1, 1))
    for step in range(5):
        if step == 2:
            plain.reset(np.array(resets)), averaged.reset(np.array(resets))
        assert (plain.empty() == averaged.empty()).all()
        for queue in (plain, averaged):
            empty = queue.empty()
            if empty.any():
                queue.push(same[empty], empty)
        assert np.allclose(averaged.pop(), plain.pop())


@pytest.mark.parametrize("replan", [0, (), (2, 0), -1])
def test_a_chunk_of_which_nothing_is_played_is_refused(replan):
    with pytest.raises(ConfigError, match="must be positive"):
        ActionQueue(1, replan)


def test_nothing_to_play_is_an_error():
    with pytest.raises(RuntimeError, match="no chunk to execute"):
        ActionQueue(2, 1).pop()
