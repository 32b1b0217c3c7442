import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wam_policy.action_queue import ActionQueue


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


def test_nothing_to_play_is_an_error():
    with pytest.raises(RuntimeError, match="no chunk to play"):
        ActionQueue(2, 1).pop()
