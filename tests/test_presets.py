import pytest

from wam_policy.presets import ENVS, PRESETS


@pytest.mark.parametrize(("name", "canvas"), [("libero", (224, 448)), ("robotwin", (384, 320))])
def test_canvases_have_the_released_size(name, canvas):
    cameras = PRESETS[name].cameras
    rows = (
        (3 * cameras.height, 2 * cameras.width)
        if cameras.layout == "t"
        else (cameras.height, 2 * cameras.width)
    )
    assert rows == canvas


@pytest.mark.parametrize(("name", "state", "action"), [("libero", 8, 7), ("robotwin", 14, 14)])
def test_vectors_have_the_released_lengths_and_the_frames_span_the_chunk(name, state, action):
    preset = PRESETS[name]
    assert (len(preset.state_names), preset.layout.dim) == (state, action)
    assert (preset.video.frames - 1) * preset.video.stride == preset.horizon


@pytest.mark.parametrize("name", ENVS)
def test_a_simulator_declares_what_its_preset_asks_for(name):
    env, preset = ENVS[name], PRESETS[name]
    assert tuple(env.cameras) == preset.cameras.names and env.action.names == preset.layout.names
    assert env.action.control == preset.layout.control and (env.action.gripper is None) == (
        preset.layout.gripper is None
    )
