"""Tests of the report: what the page says, that it is safe and needs nothing, what is refused."""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.stats import binomtest

from wam_policy import cli
from wam_policy.errors import ConfigError, MissingExtraError, ResultsError
from wam_policy.evaluation.config import ReportConfig
from wam_policy.evaluation.metrics import PairedCounts, mcnemar
from wam_policy.evaluation.report import report
from wam_policy.evaluation.report_media import last_frame
from wam_policy.evaluation.results import LastFrame, write_last_frame
from wam_policy.evaluation.video import write_mp4

VOID = {"meta", "img", "br", "path", "use"}
TASKS = ("reach", "push")


def write_run(folder, outcomes, *, env="tiny:Toy-v0", finished=True, settings=None, summary=None):
    """Write a results folder of `wam eval`; `outcomes` are strings of 1 and 0 by task."""
    folder.mkdir(parents=True)
    run = {"checkpoint_sha256": "ab" * 32, "env": env, "seed": 0, **(settings or {})}
    (folder / "run.json").write_text(json.dumps(run))
    with (folder / "episodes.jsonl").open("w") as file:
        for task, results in outcomes.items():
            for seed, digit in enumerate(results):
                steps = 40 + seed if digit == "1" else 150
                row = {"task": task, "seed": seed, "success": digit == "1", "steps": steps}
                file.write(json.dumps({**row, "reward": 1.0, "latency_ms": [10.0, 30.0]}) + "\n")
    if finished:
        tasks = {task: {"episodes": len(results)} for task, results in outcomes.items()}
        content = {
            "tasks": tasks,
            "checkpoint": "org/policy",
            "env": env,
            "env_kwargs": {"size": "128"},
            "seeds": [0, 3],
            "envs": 2,
            "playing": {"replan": 4},
            "parameters": 2_890_000,
            "peak_memory_bytes": 100 * 2**20,
            "device": "cuda:0",
            "dtype": "bfloat16",
            "versions": {"torch": "2.13.0"},
            "commit": "c0ffee",
        }
        (folder / "summary.json").write_text(json.dumps({**content, **(summary or {})}))
    return folder


def write_video(path, value):
    """Write a video whose last frame has one grey value."""
    frames = [np.zeros((64, 128, 3), np.uint8), np.full((64, 128, 3), value, np.uint8)]
    write_mp4(path, frames, fps=20)


def make(*runs, **options):
    """Write a report next to its first run and return the page."""
    output = runs[0].parent / "page.html"
    config = ReportConfig(runs=runs, output=output, overwrite=True, **options)
    return report(config, Console(quiet=True)).read_text(encoding="utf-8")


def visible_text(page):
    """Return the text of a page without its tags and style sheet."""
    body = page.partition("<body>")[2]
    return " ".join(
        html.unescape(re.sub(r"<style.*?</style>|<[^>]*>", " ", body, flags=re.S)).split()
    )


def rows(page):
    """Return the text of the cells of every row of every table."""
    found = re.findall(r"<tr[^>]*>(.*?)</tr>", page, flags=re.S)
    return [
        [visible_text("<body>" + cell) for cell in re.split(r"</t[hd]>", row)[:-1]] for row in found
    ]


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "fast", {"reach": "1101", "push": "0100"})


# -- McNemar's test --------------------------------------------------------------------------------


def test_mcnemar_agrees_with_a_table_computed_by_hand():
    a = [True] * 5 + [True] * 1 + [False] * 4 + [False] * 2
    b = [True] * 5 + [False] * 1 + [True] * 4 + [False] * 2
    p_value, counts = mcnemar(a, b)
    assert counts == PairedCounts(both=5, only_a=1, only_b=4, neither=2)
    # 5 fair coins: P(at most 1 head) = (1 + 5) / 32, and as much on the other side.
    assert p_value == 12 / 32


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 1), (3, 3), (2, 9), (0, 12), (40, 61), (900, 700)]
)
def test_mcnemar_is_the_binomial_test_of_the_episodes_that_only_one_solves(only_a, only_b):
    a = np.repeat([True, False, True], [only_a, only_b, 7])
    b = np.repeat([False, True, True], [only_a, only_b, 7])
    p_value, counts = mcnemar(a, b)
    assert (counts.only_a, counts.only_b) == (only_a, only_b)
    assert p_value == pytest.approx(binomtest(only_a, only_a + only_b).pvalue, rel=1e-9)
    assert mcnemar(b, a)[0] == p_value


@pytest.mark.parametrize("successes", [[], [True, False, True]])
def test_mcnemar_cannot_tell_apart_policies_that_never_differ(successes):
    assert mcnemar(successes, successes)[0] == 1.0


def test_mcnemar_refuses_different_numbers_of_episodes():
    with pytest.raises(ValueError):
        mcnemar([True], [True, False])


# -- content ---------------------------------------------------------------------------------------


def test_a_page_says_what_was_measured(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["protocol"] = {"name": "libero-10", "overridden": ["replan"]}
    summary["perturb"] = {"lighting": 2}
    (run / "summary.json").write_text(json.dumps(summary))

    text = visible_text(make(run))
    for fact in (
        "checkpoint org/policy",
        "ab" * 32,
        "env tiny:Toy-v0",
        "env arguments size 128",
        "protocol libero-10; overridden: replan",
        "perturbations lighting 2",
        "playing replan 4",
        "seeds 0 … 3",
        "median 20 ms, p95 30 ms",
        "device cuda:0",
        "dtype bfloat16",
        "versions torch 2.13.0",
        "commit c0ffee",
        "parameters 2.89 M",
        "peak memory 100 MiB",
    ):
        assert fact in text
    assert re.search(r"files until \d{4}-\d\d-\d\d \d\d:\d\d UTC", text)


def test_facts_that_an_evaluation_does_not_have_are_left_out(run):
    text = visible_text(make(run))
    assert "protocol" not in text and "perturbations" not in text and "None" not in text


def test_success_is_counted_per_task_and_over_all_episodes(run):
    found = rows(make(run))
    assert ["reach", "75.0%", "30% … 95%", "4", "41"] in found
    assert ["push", "25.0%", "5% … 70%", "4", "41"] in found
    assert ["all episodes", "50.0%", "22% … 78%", "8", "41"] in found


def test_success_is_counted_per_suite_if_there_are_several(tmp_path):
    run = write_run(tmp_path / "a", {"goal/0": "11", "goal/1": "10", "object/0": "00"})
    heads = {row[0]: row[1:4:2] for row in rows(make(run))}
    assert heads["suite goal"] == ["75.0%", "4"]
    assert heads["suite object"] == ["0.0%", "2"]


def test_the_env_id_of_an_env_without_tasks_is_no_suite(tmp_path):
    run = write_run(tmp_path / "a", {"org/Env-v0": "11"}, env="org/Env-v0")
    assert "suite" not in visible_text(make(run))


def test_every_episode_has_a_box_with_its_result_seed_and_steps(run):
    page = make(run)
    assert page.count("<li ") == 8
    assert 'title="reach, seed 2: failure after 150 steps"' in page
    assert "✗ failure, seed 2 steps 150" in visible_text(page)


def test_plots_have_a_description_and_no_repeated_ids(run):
    page = make(run)
    assert page.count('<svg role="img" aria-label="') == 3
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.filterwarnings("error")
def test_a_long_name_of_a_task_leaves_room_for_the_bars(tmp_path):
    page = make(write_run(tmp_path / "a", {"long-" * 40: "10"}))
    assert page.count("long-" * 10 + "…</text>") == 1
    assert "long-" * 40 in visible_text(page)


def test_every_element_is_closed(run):
    write_video(run / "reach.mp4", 200)
    open_elements = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in VOID:
                open_elements.append(tag)

        def handle_endtag(self, tag):
            if tag not in VOID:
                assert open_elements.pop() == tag

        def handle_startendtag(self, tag, attributes):
            pass

    Parser().feed(make(run, write_run(run.parent / "light", {"reach": "11"})))
    assert open_elements == []


def test_the_same_results_make_the_same_page(run):
    assert make(run) == make(run)


# -- unfinished and mixed results ------------------------------------------------------------------


def test_an_unfinished_evaluation_is_counted_and_named_unfinished(tmp_path):
    run = write_run(tmp_path / "a", {"reach": "110"}, finished=False, settings={"replan": 2})
    with (run / "episodes.jsonl").open("a") as file:
        file.write('{"task": "reach", "se')  # the process was killed here
    text = visible_text(make(run))
    assert "is not finished: there is no summary.json yet. The page counts the 3 episodes" in text
    assert "2 of 3 episodes succeeded" in text
    assert "playing replan 2 seeds" in text


def test_an_evaluation_without_an_episode_has_a_page(tmp_path):
    run = write_run(tmp_path / "a", {}, finished=False)
    (run / "episodes.jsonl").unlink()
    text = visible_text(make(run))
    assert "– No episode is finished." in text and "is not finished" in text


def test_a_summary_of_fewer_episodes_is_pointed_out(run):
    summary = json.loads((run / "summary.json").read_text())
    del summary["tasks"]["push"]
    (run / "summary.json").write_text(json.dumps(summary))
    assert "summary.json covers 4 episodes, episodes.jsonl has 8" in visible_text(make(run))


def test_fields_of_a_later_version_are_left_out(run):
    path = run / "episodes.jsonl"
    path.write_text(path.read_text().replace('"reward"', '"new": 1, "reward"'))
    assert "4 of 8 episodes succeeded" in visible_text(make(run))


# -- comparison ------------------------------------------------------------------------------------


def test_runs_are_paired_by_task_and_seed(run, tmp_path):
    other = write_run(tmp_path / "light", {"push": "1111", "reach": "01"}, settings={"replan": 2})
    page = make(run, other)
    found = rows(page)
    assert ["reach", "2", "−50.0", "1.000", "1", "1", "0", "0"] in found
    assert ["push", "4", "+75.0", "0.250", "1", "0", "3", "0"] in found
    assert ["all episodes", "6", "+33.3", "0.625", "2", "1", "3", "0"] in found
    assert "A = fast, B = light. They differ in: replan." in visible_text(page)


def test_every_two_runs_are_compared(run, tmp_path):
    others = [write_run(tmp_path / name, {"reach": "01"}) for name in ("b", "c")]
    text = visible_text(make(run, *others))
    for names in ("A = fast, B = b", "A = fast, B = c", "A = b, B = c"):
        assert names in text


def test_runs_of_different_envs_or_episodes_are_not_paired(run, tmp_path):
    elsewhere = write_run(tmp_path / "b", {"reach": "11"}, env="other")
    other_task = write_run(tmp_path / "c", {"lift": "11"})
    text = visible_text(make(run, elsewhere, other_task))
    assert "A = fast, B = b: not paired, because their envs differ." in text
    assert "A = fast, B = c: not paired, because they share no task and seed." in text


def test_a_folder_of_a_comparison_stands_for_its_evaluations(tmp_path):
    for name in ("fast", "light"):
        write_run(tmp_path / "compare" / name, {"reach": "10"})
    (tmp_path / "compare" / "summary.json").write_text("{}")
    text = visible_text(make(tmp_path / "compare"))
    assert "Comparison of 2 evaluations" in text and "A = fast, B = light" in text


# -- videos ----------------------------------------------------------------------------------------


def test_a_video_is_embedded_with_its_last_frame_as_still(run):
    write_video(run / "reach.mp4", 200)
    write_video(run / "push.mp4", 90)
    page = make(run)
    assert page.count('src="data:video/mp4;base64,') == 2
    assert page.count('poster="data:image/jpeg;base64,') == 2
    # The first seed of "push" failed.
    assert page.count('class="filmed failed"') == 1
    assert "the episode of seed 0, played again: failure after 150 steps" in visible_text(page)


def test_videos_beyond_the_limit_are_shown_as_their_last_frame(run):
    write_video(run / "reach.mp4", 200)
    page = make(run, max_video_mib=0)
    assert "data:video" not in page
    assert 'alt="last frame of reach: the episode of seed 0' in page
    assert "up to 0 MiB in total" in visible_text(page)


def test_the_videos_of_tasks_in_suites_are_found(tmp_path):
    run = write_run(tmp_path / "a", {"goal/0": "11"})
    write_video(run / "goal_0_imagined.mp4", 200)
    assert "real frames above imagined ones of seed 0" in visible_text(make(run))


def test_the_last_frame_of_every_failure_is_shown(run):
    # Of "reach" seed 2 failed, of "push" seeds 0, 2 and 3.
    for task, seed in (("reach", 2), ("push", 0), ("push", 2)):
        write_last_frame(run, LastFrame(task, seed, np.full((16, 32, 3), 90, np.uint8)))
    page = make(run)
    shown = re.findall(r'alt="last frame of (\w+, seed \d), after 150 steps"', page)
    assert shown == ["reach, seed 2", "push, seed 0", "push, seed 2"]
    (run / "failed" / "push_2.png").write_bytes(b"no picture")
    assert "push_2.png cannot be read" in visible_text(make(run))


def test_a_damaged_video_is_named(run):
    (run / "reach.mp4").write_bytes(b"no video")
    assert "reach.mp4 cannot be decoded; remove it" in visible_text(make(run))


def test_the_last_frame_is_the_last(tmp_path):
    write_video(tmp_path / "a.mp4", 200)
    assert np.asarray(last_frame(tmp_path / "a.mp4")).mean() == pytest.approx(200, abs=3)


# -- safety and self-containedness -----------------------------------------------------------------


def test_text_from_files_is_escaped(tmp_path):
    evil = '<script>alert("1")</script>&\'$x^{$'
    run = write_run(
        tmp_path / "<b>",
        {evil: "10", "$\\frac$": "1"},
        summary={"checkpoint": evil, "commit": evil},
    )
    page = make(run, write_run(tmp_path / "_b", {evil: "01"}))
    assert "<script" not in page and "<b>" not in page
    assert visible_text(page).count(evil) >= 4


def test_a_page_needs_no_other_file_and_no_network(run):
    write_video(run / "reach.mp4", 200)
    page = make(run)
    for address in re.findall(r'\b(?:src|href|poster|data|action)\s*=\s*"([^"]*)"', page):
        assert address.startswith(("data:", "#"))
    assert all(url.startswith("#") for url in re.findall(r"url\(['\"]?([^)]*)", page))
    assert "<script" not in page and "<link" not in page and "@import" not in page
    assert "default-src 'none'" in page


# -- refusals --------------------------------------------------------------------------------------


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ResultsError, match=r"holds no results .* give the --output-dir"):
        make(tmp_path)
    with pytest.raises(ResultsError, match="holds no results"):
        make(tmp_path / "nowhere")


def test_runs_of_one_name_are_refused(run, tmp_path):
    same = write_run(tmp_path / "other" / "fast", {"reach": "1"})
    with pytest.raises(ResultsError, match=r"called 'fast' .* rename one"):
        make(run, same)
    with pytest.raises(ResultsError, match="called 'fast'"):
        make(run, run)


def test_a_page_that_exists_is_replaced_only_on_purpose(run, tmp_path):
    config = ReportConfig(runs=(run,), output=tmp_path / "page.html")
    config.output.write_text("mine")
    with pytest.raises(ResultsError, match="--overwrite"):
        report(config)
    assert config.output.read_text() == "mine"
    report(replace(config, overwrite=True), Console(quiet=True))
    assert config.output.read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(ResultsError, match="is a folder"):
        report(replace(config, output=tmp_path))


@pytest.mark.parametrize("line", ["no json", "{}", "[1]"])
def test_a_damaged_line_of_episodes_is_named(run, line):
    with (run / "episodes.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ResultsError, match=r"line 9 (is|must) .* remove the line"):
        make(run)


def test_an_episode_that_is_there_twice_is_refused(run):
    first = (run / "episodes.jsonl").read_text().splitlines()[0]
    with (run / "episodes.jsonl").open("a") as file:
        file.write(first + "\n")
    with pytest.raises(ResultsError, match="'reach' with seed 0 stands there twice"):
        make(run)


@pytest.mark.parametrize("name", ["run.json", "summary.json"])
def test_a_damaged_file_is_named(run, name):
    (run / name).write_text("{")
    with pytest.raises(ResultsError, match=f"{name} is not JSON .* remove it"):
        make(run)
    (run / name).write_text("[]")
    with pytest.raises(ResultsError, match=f"{name} must hold a JSON object"):
        make(run)


def test_options_without_meaning_are_refused(run):
    with pytest.raises(ConfigError, match="needs a results folder"):
        ReportConfig(runs=())
    with pytest.raises(ConfigError, match="max_video_mib"):
        ReportConfig(runs=(run,), max_video_mib=-1)


def test_a_missing_plot_library_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"wam-policy\[report\]"):
        make(run)


def test_the_command_writes_the_page_and_prints_refusals(run, tmp_path, capsys):
    output = tmp_path / "new" / "page.html"
    assert cli.main(["report", str(run), "--output", str(output)]) == 0
    assert output.is_file() and [*output.parent.iterdir()] == [output]
    assert cli.main(["report", str(run), "--output", str(output)]) == 1
    assert "wam: " in capsys.readouterr().err


# -- a real browser --------------------------------------------------------------------------------


def browser():
    """Return the path of a Chromium; None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_sideways_scrolling(run, tmp_path, width):
    write_video(run / "reach.mp4", 200)
    long = {"a-very-long-name-of-a-task-that-does-not-fit-" * 3: "10" * 25, "reach": "1010"}
    page = make(run, write_run(tmp_path / ("light-" * 12), long))

    # A frame of the width: the window itself cannot be as narrow as a phone.
    script = (
        "onload = () => { const page = frames[0].document.documentElement;"
        "document.title = `${page.scrollWidth} ${page.clientWidth} ${page.scrollHeight}`; }"
    )
    frame = (
        f'<iframe style="border:0; width:{width}px; height:3000px" srcdoc="{html.escape(page)}">'
    )
    outer = tmp_path / "outer.html"
    outer.write_text(f'<body style="margin:0">{frame}</iframe><script>{script}</script>')
    picture = tmp_path / "page.png"
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    command = [browser(), *flags, f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={max(width, 500)},3000"]
    shown = subprocess.run(
        [*command, "--dump-dom", outer.as_uri()], capture_output=True, text=True, timeout=120
    )
    subprocess.run(
        [*command, f"--screenshot={picture}", outer.as_uri()], capture_output=True, timeout=120
    )

    measured = re.search(r"<title>(\d+) (\d+) (\d+)</title>", shown.stdout)
    assert measured, shown.stderr
    scroll_width, client_width, scroll_height = map(int, measured.groups())
    assert scroll_width <= client_width == width
    assert scroll_height > 1500
    pixels = np.asarray(Image.open(picture).convert("RGB"))[:, :width]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
