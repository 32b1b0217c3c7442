"""Tests of the evaluation on the toy env: results, videos, comparisons, and resuming."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny import make_light_policy, make_observation, make_policy

from wam_policy import WAMPolicy
from wam_policy.errors import CheckpointError, ConfigError, EnvError, ResultsError
from wam_policy.evaluation import results
from wam_policy.evaluation.compare import CompareConfig, compare
from wam_policy.evaluation.config import EvalConfig
from wam_policy.evaluation.demo import DemoConfig, demo
from wam_policy.evaluation.evaluate import evaluate
from wam_policy.evaluation.loading import load_policy
from wam_policy.evaluation.metrics import wilson_interval
from wam_policy.evaluation.simulator import EpisodeStart, Simulator, SimulatorOptions
from wam_policy.wrappers.envs.make import DEFAULT_MAX_STEPS


@pytest.fixture
def config(tmp_path):
    folder = make_policy().save_pretrained(tmp_path / "checkpoint")
    return EvalConfig(
        checkpoint=str(folder),
        env="tiny:Toy-v0",
        tasks=("touch", "leave"),
        episodes=5,
        num_envs=2,
        output_dir=tmp_path / "out",
        video=False,
    )


def rows(config):
    text = (config.output_dir / "episodes.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def read_frames(path):
    """Return the frames of an mp4, uint8 [H, W, 3] each."""
    import av

    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def test_every_episode_is_counted_once_with_its_seed(config):
    summary = evaluate(config)
    expected = {(task, seed) for task in config.tasks for seed in range(5)}
    assert {(row["task"], row["seed"]) for row in rows(config)} == expected
    assert len(rows(config)) == 10
    assert all(row["success"] == (row["seed"] != 3) for row in rows(config))
    assert {row["steps"] for row in rows(config) if row["task"] == "touch"} == {6}
    assert all(row["reward"] == row["steps"] for row in rows(config))
    assert summary["mean_success"] == pytest.approx(0.8)
    assert summary["tasks"]["touch"]["episodes"] == 5 and summary["seeds"] == [0, 4]
    assert summary["latency_ms"]["median"] > 0 and len(summary["checkpoint_sha256"]) == 64
    assert json.loads((config.output_dir / "summary.json").read_text()) == summary


def test_a_finished_evaluation_grows_by_more_episodes_and_repeats_none(config):
    evaluate(replace(config, tasks=("touch",), episodes=2))
    first = rows(config)
    evaluate(replace(config, tasks=("touch",), episodes=3))
    assert rows(config)[:2] == first and len(rows(config)) == 3


def test_a_killed_evaluation_goes_on_and_loses_nothing(config):
    config = replace(config, tasks=("touch",), episodes=40)
    command = [
        *(sys.executable, "-m", "wam_policy.cli", "eval"),
        *("--checkpoint", config.checkpoint),
        *("--env", config.env),
        *("--tasks", "touch"),
        *("--episodes", "40"),
        *("--output-dir", str(config.output_dir)),
        "--no-video",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    path = config.output_dir / "episodes.jsonl"

    # Kill the evaluation once it has written three episodes.
    while running.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 3 <= len(before) < 40

    # The last line may be incomplete.
    with path.open("a") as file:
        file.write('{"task": "touch", "se')
    evaluate(config)
    assert path.read_text().splitlines(keepends=True)[: len(before)] == before
    assert sorted(row["seed"] for row in rows(config)) == list(range(40))


def test_arguments_of_the_env_reach_it_and_belong_to_the_results(light):
    # The side of the env's images is an argument: the policy needs 32 pixels.
    config = replace(light, env="tiny:Toy-v0", episodes=1, env_kwargs={"side": "32"})
    summary = evaluate(config)
    assert summary["env_kwargs"] == {"side": "32"}
    with pytest.raises(ResultsError, match=r"different: env_kwargs"):
        evaluate(replace(config, env_kwargs={"side": "32", "render_mode": "rgb_array"}))


def test_an_argument_that_the_env_does_not_have_is_named(config, tmp_path):
    unknown = replace(config, env_kwargs={"sides": "32"}, output_dir=tmp_path / "unknown")
    with pytest.raises(EnvError, match="sides"):
        evaluate(unknown)


def test_perturbations_reach_the_env_and_belong_to_the_results(config):
    plain = replace(config, tasks=("touch",), episodes=1, num_envs=1)
    assert evaluate(plain)["perturb"] == {}
    assert "perturb" not in json.loads((plain.output_dir / "run.json").read_text())

    # Noise on actions moves the toy, and so its state; the order does not matter.
    folder = config.output_dir.parent / "perturbed"
    perturbed = replace(plain, perturb={"action-noise": 5, "noise": 2}, output_dir=folder)
    summary = evaluate(perturbed)
    assert list(summary["perturb"].items()) == [("noise", 2), ("action-noise", 5)]
    assert json.loads((folder / "run.json").read_text())["perturb"] == summary["perturb"]
    evaluate(replace(perturbed, perturb={"noise": 2, "action-noise": 5}, episodes=2))
    assert [row["seed"] for row in rows(perturbed)] == [0, 1]
    with pytest.raises(ResultsError, match=r"different: perturb"):
        evaluate(replace(perturbed, perturb={"noise": 3, "action-noise": 5}))


def test_the_env_of_an_evaluation_is_perturbed_in_its_own_process(config):
    contract = make_policy().config
    options = SimulatorOptions.of_policy(contract, config.env, 3, perturb={"occlusion": 5})
    with closing(Simulator(options, timeout=60)) as simulator:
        for seed in (4, 5):
            simulator.send(EpisodeStart("touch", seed))
            image = simulator.receive().observation["images.front"]
            assert (image == 128).all(-1).sum() == 5 * 5


def test_perturbations_that_do_not_exist_are_refused_at_once(config):
    cases = (({"nose": 1}, "did you mean 'noise'"), ({"noise": 6}, "from 1 to 5, got 6"))
    for wrong, message in cases:
        with pytest.raises(ConfigError, match=message):
            replace(config, perturb=wrong)
        with pytest.raises(ConfigError, match=message):
            CompareConfig(perturb=wrong)


def test_results_of_another_checkpoint_are_not_mixed_in(config, tmp_path):
    evaluate(replace(config, tasks=("touch",), episodes=1))
    other = make_policy(dtype="bfloat16").save_pretrained(tmp_path / "other")
    with pytest.raises(ResultsError, match=r"other settings \(different: checkpoint_sha256\)"):
        evaluate(replace(config, checkpoint=str(other)))


def test_a_video_shows_the_cameras_of_a_whole_episode(config):
    evaluate(replace(config, tasks=("touch",), episodes=1, video=True))
    frames = read_frames(config.output_dir / "touch.mp4")
    # Six steps, and the observation after the last one.
    assert len(frames) == 7
    assert frames[0].shape == (256, 512, 3)


def test_imagined_futures_are_compared_with_what_happened_and_filmed(config):
    summary = evaluate(replace(config, episodes=1, imagine=True))
    scores = json.loads((config.output_dir / "summary.json").read_text())["imagination"]
    assert scores == summary["imagination"] and set(scores) == {"touch", "leave"}
    for score in scores.values():
        # A clip has 5 frames of stride 1; the first one is observed.
        assert len(score["psnr_db"]) == len(score["still_psnr_db"]) == 4

    # The next clip would begin where the episode ends.
    frames = read_frames(config.output_dir / "touch_imagined.mp4")
    assert len(frames) == 5
    assert frames[0].shape == (256, 256, 3)


@pytest.fixture
def light(tmp_path):
    folder = make_light_policy().save_pretrained(tmp_path / "light")
    return EvalConfig(
        checkpoint=str(folder),
        env="tiny:ToyLarge-v0",
        tasks=("touch",),
        episodes=1,
        num_envs=1,
        output_dir=tmp_path / "light-out",
        video=False,
    )


def test_what_the_action_head_looks_at_is_filmed(light):
    evaluate(replace(light, explain=True))
    frames = read_frames(light.output_dir / "touch_explained.mp4")
    # 6 steps in chunks of 3; the canvas above the maps of 2 taps, enlarged by 2.
    assert len(frames) == 2
    assert frames[0].shape == (192, 128, 3)


def test_a_light_wam_s_pooled_futures_are_compared_with_pooled_pictures(light):
    score = evaluate(replace(light, imagine=True))["imagination"]["touch"]
    assert len(score["psnr_db"]) == 4 and all(0 < db < 100 for db in score["psnr_db"])


def test_chunks_are_played_as_the_caller_says_and_results_are_not_mixed(config, light):
    summary = evaluate(replace(light, replan=1, horizon=6, ensemble=0.1))
    assert summary["playing"] == {"replan": 1, "horizon": 6, "ensemble": 0.1}
    assert len(rows(light)[0]["latency_ms"]) == rows(light)[0]["steps"] == 6
    changed = r"other settings \(different: replan, horizon, ensemble\)"
    with pytest.raises(ResultsError, match=changed):
        evaluate(replace(light, replan=2))


def test_what_the_policy_does_not_support_is_refused_before_any_episode(config, light, tmp_path):
    lean = WAMPolicy.from_pretrained(light.checkpoint).save_pretrained(
        tmp_path / "lean", form="lean"
    )
    for wrong, message in (
        (replace(config, explain=True), "pools by learned queries"),
        (replace(light, checkpoint=str(lean), imagine=True), "has no video head"),
        (replace(light, num_inference_steps=2), "in one pass; leave `num_inference_steps` out"),
        (replace(light, horizon=2), "`replan` is 3 but a chunk holds 2 actions"),
        (replace(light, checkpoint=str(lean), horizon=9), "knows 4 steps of a chunk"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(wrong)
        assert not wrong.output_dir.exists()


def test_denoising_steps_are_those_that_the_caller_asks_for(config):
    one = replace(config, tasks=("touch",), episodes=1)
    usual = evaluate(one)
    fewer = evaluate(replace(one, num_inference_steps=1, output_dir=config.output_dir / "fewer"))
    assert usual["playing"] == {} and fewer["playing"] == {"num_inference_steps": 1}
    assert fewer["checkpoint_sha256"] == usual["checkpoint_sha256"]
    chunks = [
        load_policy(replace(one, num_inference_steps=steps))[0].predict_chunk(make_observation())
        for steps in (None, 1, 1)
    ]
    assert np.array_equal(chunks[1], chunks[2]) and np.abs(chunks[0] - chunks[1]).max() > 1e-3
    with pytest.raises(ConfigError, match="steps"):
        evaluate(replace(one, num_inference_steps=0, output_dir=config.output_dir / "none"))


def test_films_show_what_was_measured(light):
    evaluate(replace(light, replan=1, explain=True))
    # One chunk, and so one frame, per step.
    assert len(read_frames(light.output_dir / "touch_explained.mp4")) == 6


def test_the_peak_memory_of_an_evaluation_that_goes_on_is_kept(config):
    evaluate(replace(config, tasks=("touch",), episodes=1))
    path = config.output_dir / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peak_memory_bytes": 2**40}))
    assert evaluate(replace(config, tasks=("touch",), episodes=1))["peak_memory_bytes"] == 2**40

    # The peak of another device does not count.
    path.write_text(json.dumps({"device": "cuda", "peak_memory_bytes": 2**40}))
    assert evaluate(replace(config, tasks=("touch",), episodes=1))["peak_memory_bytes"] < 2**40


def test_checkpoints_are_compared_a_row_each(config, light, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    other = make_policy(dtype="bfloat16").save_pretrained(tmp_path / "other")
    compared = CompareConfig(
        checkpoints=(config.checkpoint, str(other)),
        env=config.env,
        tasks=config.tasks,
        perturb={"blur": 2},
        episodes=2,
        num_envs=1,
        output_dir=tmp_path / "both",
    )
    summaries = compare(compared)
    assert list(summaries) == ["checkpoint", "other"]
    assert json.loads((tmp_path / "both/summary.json").read_text()) == summaries
    for summary in summaries.values():
        assert summary["parameters"] > 0
        assert summary["peak_memory_bytes"] > 2**27
        assert summary["tasks"]["leave"]["episodes"] == 2
        assert summary["perturb"] == {"blur": 2}
    with pytest.raises(ConfigError, match="no two with the same last path component"):
        replace(compared, checkpoints=("a/x", "b/x"))
    with pytest.raises(ResultsError, match="ended with code 1"):
        compare(replace(compared, checkpoints=("./nowhere",)))


def test_an_env_without_a_task_argument_is_evaluated_once(config):
    summary = evaluate(replace(config, env="tiny:ToyBare-v0", tasks=(), episodes=1, num_envs=1))
    assert summary["tasks"]["tiny:ToyBare-v0"]["success"] == 1


def test_an_env_that_never_ends_is_cut_and_says_so(config, capfd):
    endless = replace(
        config, env_kwargs={"length": "1000000000"}, env="tiny:ToyBare-v0", tasks=(), episodes=1
    )
    evaluate(replace(endless, output_dir=config.output_dir / "own", max_steps=5))
    assert [
        row["steps"] for row in rows(replace(config, output_dir=config.output_dir / "own"))
    ] == [5]
    evaluate(endless)
    assert [row["steps"] for row in rows(config)] == [DEFAULT_MAX_STEPS]
    assert "declares no time limit: episodes are cut after 1000 steps" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="`max_steps` must be positive"):
        replace(config, max_steps=0)


def test_an_episode_that_stands_twice_in_the_results_is_refused(config):
    evaluate(config)
    path = config.output_dir / "episodes.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]))
    with pytest.raises(ResultsError, match="stands there twice"):
        evaluate(config)


def test_the_demo_never_removes_results_that_are_not_a_demo_s(config, tmp_path):
    evaluate(config)
    before = rows(config)
    with pytest.raises(ResultsError, match=r"holds something else than a demo"):
        demo(DemoConfig(output_dir=config.output_dir))
    assert rows(config) == before


def test_a_demo_replaces_its_own_results_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("wam_policy.evaluation.demo.evaluate", lambda options: None)
    demo(DemoConfig(output_dir=tmp_path / "demo"))
    (tmp_path / "demo/episodes.jsonl").write_text("{}")
    (tmp_path / "demo/reach-v3.mp4").write_text("")
    (tmp_path / "demo/notes.txt").write_text("mine")
    demo(DemoConfig(output_dir=tmp_path / "demo"))
    left = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert left == ["demo.json", "notes.txt"]


def test_the_demo_never_removes_a_folder_that_is_not_a_demo(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ResultsError, match="choose another"):
        demo(DemoConfig(output_dir=tmp_path))
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize("change", [{"episodes": 0}, {"num_envs": 0}])
def test_nothing_to_evaluate_is_refused(config, change):
    with pytest.raises(ConfigError, match="must be positive"):
        replace(config, **change)


def test_an_unknown_embedded_checkpoint_lists_those_there_are(config):
    with pytest.raises(CheckpointError, match="metaworld-fast-wam"):
        evaluate(replace(config, checkpoint="embedded:nothing"))


@given(st.integers(1, 500), st.integers(0, 500))
def test_the_interval_holds_the_rate_and_narrows_with_more_episodes(episodes, wins):
    wins = min(wins, episodes)
    low, high = wilson_interval(wins, episodes)
    assert 0 <= low <= wins / episodes <= high <= 1
    wider = wilson_interval(wins, episodes)
    narrower = wilson_interval(4 * wins, 4 * episodes)
    assert narrower[1] - narrower[0] < wider[1] - wider[0]


def test_the_interval_is_wilson_s():
    assert wilson_interval(45, 50) == pytest.approx((0.7864, 0.9565), abs=1e-4)


def test_names_of_tasks_are_printed_literally():
    task = "[red]touch[/red] [link=http://x]y"
    row = {"interval": [0, 1], "success": 1.0, "episodes": 1, "mean_steps_of_successes": 3.0}
    latency = {"median": 1.0, "p95": 1.0}
    summary = {"tasks": {task: row}, "latency_ms": latency, "mean_success": 1.0}
    summary["imagination"] = {task: {"psnr_db": [1.0], "still_psnr_db": [1.0]}}
    text = io.StringIO()
    console = Console(file=text, width=200)
    console.print(results.results_table(summary))
    console.print(results.imagination_table(summary, 1))
    assert text.getvalue().count(task) == 2
