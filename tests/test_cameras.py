import pytest

from wam_policy import cameras
from wam_policy.errors import ConfigError
from wam_policy.presets import PRESETS


def test_a_name_belongs_to_one_camera_only():
    names = [name for row in cameras.ALIASES for name in row]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("preset", "env"),
    [
        ("libero", ("agentview_image", "robot0_eye_in_hand_image")),
        ("libero", ("image", "image2")),
        ("robotwin", ("head_camera", "left_camera", "right_camera")),
    ],
)
def test_simulators_names_are_found_for_the_presets_cameras(preset, env):
    wanted = PRESETS[preset].cameras.names
    assert [cameras.find_camera(name, {*env, "another"}) for name in wanted] == list(env)


def test_its_own_name_comes_before_an_alias_and_two_aliases_are_refused():
    assert cameras.find_camera("image", ["agentview", "image"]) == "image"
    with pytest.raises(ConfigError, match="specify which of them is 'image'"):
        cameras.find_camera("image", ["agentview", "agentview_image"])
    assert cameras.find_camera("image", ["front"]) is None


@pytest.mark.parametrize(
    ("places", "found"),
    [
        (
            {"image": "pixels.agentview_image", "wrist_image": "pixels.robot0_eye_in_hand_image"},
            None,
        ),
        (
            {"image": "pixels.robot0_eye_in_hand_image", "wrist_image": "pixels.agentview_image"},
            ("image", "wrist_image"),
        ),
        ({"image": "render()", "wrist_image": "agentview"}, ("wrist_image", "image")),
        ({"front": "pixels.wrist", "wrist": "pixels.front"}, ("front", "wrist")),
        ({"image": "image.rgb", "wrist_image": "image.wrist_image"}, None),
    ],
)
def test_swapped_cameras_are_told_by_the_names_in_their_paths(places, found):
    assert cameras.find_swapped(places) == found
