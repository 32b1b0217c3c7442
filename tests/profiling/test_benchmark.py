"""`wam bench` and `wam infer`, as their users see them."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import assemble, make_config, make_light_policy, make_observation, make_policy

from wam_policy.cli import main
from wam_policy.errors import ConfigError, MissingExtraError
from wam_policy.inference import compile_inference
from wam_policy.profiling import benchmark as module
from wam_policy.profiling.benchmark import BenchConfig, bench
from wam_policy.profiling.observations import random_observation, rollout_observations
from wam_policy.profiling.reference import savings_of


@pytest.mark.parametrize(
    "make", [make_policy, pytest.param(make_light_policy, marks=pytest.mark.slow)]
)
def test_bench_measures_every_way_and_writes_numbers_and_a_chart(make, tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "compile_inference", functools.partial(eager_twin, compile_inference)
    )
    policy = make()
    policy.save_pretrained(tmp_path / "policy")
    steps = (2,) if make is make_policy else ()
    bench(
        BenchConfig(
            checkpoint=str(tmp_path / "policy"),
            batch_sizes=(1, 2),
            repeats=2,
            steps=steps,
            encode_every=(2,),
            output_dir=tmp_path / "out",
        )
    )
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    rows = {(row["name"], row["batch"]): row for row in found["rows"]}
    names = savings_of(policy)
    assert {
        ("plain", 1),
        ("all savings", 1),
        ("eager", 1),
        ("compiled", 1),
        ("eager", 2),
        ("compiled", 2),
    } <= rows.keys()
    assert {(f"without {name}", 1) for name in names} <= rows.keys()
    compiled = rows["compiled", 2]
    assert compiled["stages"].keys() == {"preprocess", "vae", "prefill", "act", "postprocess"}
    for stage in ("vae", "prefill", "act"):
        assert (
            compiled["stages"][stage]["flops"] > 0
            and 0 < compiled["stages"][stage]["of_machine"] < 1
        )
    errors = rows["1 of 2 encoded", 1]["errors"]
    assert errors[0] == 0 and errors[1] > 0  # the first call encodes
    if steps:
        assert min(rows["2 steps", 1]["errors"]) > 1e-4
    card = (tmp_path / "out" / "bench.md").read_text()
    assert "| compiled | 2 |" in card and f"{max(errors):.1e} |" in card and "plain" not in card
    assert Image.open(tmp_path / "out" / "bench.png").size[0] > 500
    assert found["machine"]["flops"] > 1e9 and all(
        row["peak_memory_bytes"] > 2**20 for row in found["rows"]
    )


def eager_twin(compiler, policy, **options):
    """Compiling takes long; what is measured here is not time."""
    return compiler(policy, **options | {"backend": None})


def test_old_observations_serve_later_calls_of_the_same_episode_only():
    policy = make_policy()
    compiled = compile_inference(policy, batch_sizes=(1,), backend=None, encode_every=2)
    first, second = (make_observation(seed=seed) for seed in (0, 1))
    fresh, moved = (policy.predict_chunk(observation) for observation in (first, second))
    assert not np.allclose(fresh, moved, atol=1e-4)
    assert np.allclose(compiled.predict_chunk(first), fresh, atol=1e-5)
    assert np.allclose(compiled.predict_chunk(second), fresh, atol=1e-5)  # what was seen before
    assert np.allclose(compiled.predict_chunk(second), moved, atol=1e-5)
    begins = {**first, "episode_start": np.array([True])}
    assert np.allclose(compiled.predict_chunk(begins), fresh, atol=1e-5)


def test_knobs_that_can_t_be_are_refused():
    with pytest.raises(ConfigError, match="encode_every"):
        compile_inference(make_policy(), encode_every=0)
    with pytest.raises(ConfigError, match="no `steps`"):
        compile_inference(make_light_policy(), steps=4)
    with pytest.raises(ConfigError, match="unknown quantization"):
        compile_inference(make_policy(), quantize="int3")
    with pytest.raises(ConfigError, match="positive"):
        BenchConfig(repeats=0)


WIDE = {
    "video_dim": 512,
    "video_ffn_dim": 512,
    "text_dim": 512,
    "heads": 4,
    "head_dim": 128,
    "layers": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int8_dynamic"])
def test_quantized_policies_are_close_and_leave_the_policy_as_it_is(kind):
    pytest.importorskip("torchao", reason="an extra: pip install 'wam-policy[quantize]'")
    sizes = dataclasses.replace(make_policy().config.model, **WIDE)
    policy = assemble(make_config(model=sizes), text_dim=512)
    observation = make_observation(2)
    before = policy.predict_chunk(observation)
    compile_inference(policy, batch_sizes=(2,), backend=None)  # fused twins are no hindrance
    small = compile_inference(policy, batch_sizes=(2,), backend=None, quantize=kind)
    kinds = [
        type(model.video.blocks[0].ffn[0].weight) for model in (small.engine.model, policy.model)
    ]
    assert kinds[0] is not torch.nn.Parameter and kinds[1] is torch.nn.Parameter
    after = small.predict_chunk(observation)
    assert 0 < np.abs(after - before).max() < 0.2 and np.array_equal(
        policy.predict_chunk(observation), before
    )


def test_a_policy_with_nothing_to_quantize_says_so():
    pytest.importorskip("torchao", reason="an extra: pip install 'wam-policy[quantize]'")
    with pytest.raises(ConfigError, match="nothing to quantize"):
        compile_inference(make_policy(), quantize="int8")


def test_quantization_without_torchao_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingExtraError, match=r"wam-policy\[quantize\]"):
        compile_inference(make_policy(), quantize="int8")


def test_fewer_steps_change_the_contract_of_the_compiled_policy_only():
    policy = make_policy()
    compiled = compile_inference(policy, batch_sizes=(1,), backend=None, steps=2)
    assert compiled.config.sampling.steps == 2 and policy.config.sampling.steps == 3
    assert not np.allclose(
        compiled.predict_chunk(make_observation()),
        policy.predict_chunk(make_observation()),
        atol=1e-4,
    )


def test_synthetic_observations_fit_any_contract():
    for make in (make_policy, make_light_policy):
        policy = make()
        assert policy.predict_chunk(random_observation(policy, 3, 0)).shape == (3, 4, 3)


def test_observations_met_in_an_env_follow_each_other():
    policy = make_policy()
    inputs = rollout_observations(policy, "tiny:Toy-v0", "touch", 5)
    first, third = inputs(0, 3), inputs(2, 2)
    assert policy.predict_chunk(first).shape == (3, 4, 3)
    assert first["episode_start"].tolist()[:2] == [True, False] and len(first["instruction"]) == 3
    assert np.array_equal(first["state"][2], third["state"][0]) and not np.array_equal(
        first["state"][0], first["state"][1]
    )


def test_bench_refuses_a_task_without_an_env():
    with pytest.raises(ConfigError, match="name the `env`"):
        BenchConfig(task="reach-v3")


def test_infer_answers_one_question_as_json(tmp_path, capsys):
    policy, observation = make_policy(), make_observation()
    policy.save_pretrained(tmp_path / "policy")
    for name in ("front", "wrist"):
        Image.fromarray(observation[f"images.{name}"]).save(tmp_path / f"{name}.png")
    arguments = [
        "infer",
        "--checkpoint",
        str(tmp_path / "policy"),
        "--instruction",
        "touch the cube",
    ]
    arguments += [
        "--images",
        "front",
        str(tmp_path / "front.png"),
        "wrist",
        str(tmp_path / "wrist.png"),
    ]
    arguments += ["--state", *map(str, observation["state"].tolist())]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert np.allclose(answer["actions"], policy.predict_chunk(observation), atol=1e-5)
    assert answer["names"] == ["delta_x", "delta_y", "gripper"]
    (tmp_path / "wrist.png").write_text("no picture")
    assert main(arguments) == 1 and "cannot be read as PNG or JPEG" in capsys.readouterr().err
