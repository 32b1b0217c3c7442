import numpy as np
import pytest
from tiny import make_observation

from wam_policy.errors import ObservationError, WAMPolicyError


def refuse(policy, match, **changes):
    observation = make_observation() | changes
    for key in [key for key, value in observation.items() if value is None]:
        del observation[key]
    with pytest.raises(ObservationError, match=match) as caught:
        policy.predict_chunk(observation)
    assert isinstance(caught.value, WAMPolicyError) and isinstance(caught.value, ValueError)


def test_a_missing_camera_is_named_with_those_that_are_there(policy):
    refuse(policy, r"'wrist' is missing: the observation has \['front'\]", **{"images.wrist": None})


def test_float_pictures_are_refused(policy):
    refuse(policy, "expected uint8", **{"images.front": np.zeros((16, 16, 3), np.float32)})


@pytest.mark.parametrize("shape", [(16, 16), (3, 16, 16), (1, 1, 16, 16, 3)])
def test_pictures_of_another_rank_or_layout_are_refused(policy, shape):
    refuse(policy, r"expected \[H, W, 3\]", **{"images.front": np.zeros(shape, np.uint8)})


def test_pictures_of_another_size_are_refused_with_the_cure(policy):
    refuse(
        policy,
        r"expected \(16, 16\).*ResizeObservation",
        **{"images.front": np.zeros((20, 16, 3), np.uint8)},
    )


def test_a_batched_camera_beside_a_single_one_is_refused(policy):
    refuse(policy, "batch axis", **{"images.front": np.zeros((2, 16, 16, 3), np.uint8)})


@pytest.mark.parametrize(
    "state", [np.zeros(3, np.float32), np.zeros((1, 2), np.float32), np.array(["a", "b"])]
)
def test_a_state_of_another_length_rank_or_type_is_refused(policy, state):
    refuse(policy, r"expected \[2\] numbers \(x, y\)", state=state)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused_by_name(policy, bad):
    refuse(policy, r"is not finite in \['y'\]", state=np.array([0, bad], np.float32))


def test_missing_state_and_instruction_are_refused(policy):
    refuse(policy, "no 'state'", state=None)
    refuse(policy, "no 'instruction'", instruction=None)


def test_reset_s_pair_is_recognised(policy):
    with pytest.raises(ObservationError, match=r"observation, info = env\.reset"):
        policy.predict((make_observation(), {}))


def test_a_bare_array_is_refused_with_the_cure(policy):
    with pytest.raises(ObservationError, match=r"policy\.wrap\(env\)"):
        policy.predict(np.zeros(3))


def test_a_wrong_number_of_instructions_is_refused(policy):
    with pytest.raises(ObservationError, match="expected 2 strings"):
        policy.predict_chunk(make_observation(2) | {"instruction": ("a", "b", "c")})


@pytest.mark.parametrize("instruction", [5, b"reach", np.array(5), {"text": "reach"}, [["reach"]]])
def test_an_instruction_of_another_type_is_refused(policy, instruction):
    refuse(policy, r"instruction: expected 1 strings", instruction=instruction)
