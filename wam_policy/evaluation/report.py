"""`wam report`: one self-contained web page about one or several evaluations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from wam_policy.errors import ResultsError
from wam_policy.evaluation.config import ReportConfig
from wam_policy.evaluation.metrics import mcnemar, wilson_interval
from wam_policy.evaluation.report_figures import (
    latencies,
    latency_histogram,
    run_color,
    success_bars,
    success_over_steps,
)
from wam_policy.evaluation.report_html import (
    Html,
    definitions,
    element,
    heading_row,
    join,
    row,
    table,
)
from wam_policy.evaluation.report_media import VideoBudget, failed_frames, media_rule, task_media
from wam_policy.evaluation.report_runs import Group, Run, read_runs, result_name, task_groups
from wam_policy.evaluation.results import Episode
from wam_policy.utils.io import write_text

TEMPLATE = Path(__file__).with_name("report.html")
MISSING = "–"
# Settings whose names in the files say less.
SETTINGS = {"checkpoint_sha256": "checkpoint", "perturb": "perturbations"}
# Settings in `run.json` that say what is played, and not how.
IDENTITY = ("checkpoint", "checkpoint_sha256", "env", "env_kwargs", "seed", "protocol", "perturb")
SIGNS = {"success": "✓", "failure": "✗"}


def report(config: ReportConfig, console: Console | None = None) -> Path:
    """Write a web page about evaluations; it needs no other file and no network.

    Args:
        config: Options of the report.
        console: Where the path of the page is printed; the default is the terminal.

    Returns:
        Path of the page.

    Raises:
        ResultsError: A folder holds no results, two have the same name, or the page exists.
        MissingExtraError: matplotlib is not installed.
    """
    # Refuse before any work is done.
    if config.output.is_dir():
        raise ResultsError(f"{config.output} is a folder; name a file, such as report.html in it")
    if config.output.exists() and not config.overwrite:
        raise ResultsError(
            f"{config.output} exists; choose another --output, or replace it with --overwrite"
        )
    runs = read_runs(config.runs)

    # The page appears when it is complete.
    page = make_page(runs, config.max_video_mib)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.output, page)
    size = config.output.stat().st_size
    console = console or Console()
    console.print(f"report: {escape(str(config.output))} ({size / 2**20:.1f} MiB)")
    return config.output


def make_page(runs: Sequence[Run], max_video_mib: float) -> str:
    """Return the page as HTML.

    Args:
        runs: Evaluations, at least one.
        max_video_mib: MiB of videos to embed at most.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    groups = task_groups(runs)
    sections = [_head(runs)]
    if any(run.episodes for run in runs):
        sections += [_success(runs, groups), _times(runs)]
    if len(runs) > 1:
        sections.append(_comparisons(runs, groups))
    sections.append(_episodes(runs, groups, max_video_mib))

    title = join(f"Evaluation of {', '.join(run.name for run in runs)}")
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=title, content=join(*sections))


# -- what was measured -----------------------------------------------------------------------------


def _head(runs: Sequence[Run]) -> Html:
    """Return the title and one card per run."""
    title = f"Evaluation of {runs[0].name}"
    if len(runs) > 1:
        title = f"Comparison of {len(runs)} evaluations"
    return element(
        "header",
        element("h1", title),
        element("p", "Made by “wam report” from the files of “wam eval”.", class_="note"),
        element("div", *[_card(run, k) for k, run in enumerate(runs)], class_="cards"),
    )


def _card(run: Run, index: int) -> Html:
    """Return the result of a run in large type, and what was measured."""
    successes = sum(episode.success for episode in run.episodes)
    large = rate_text(run.episodes)
    small = (
        f"{successes} of {len(run.episodes)} episodes succeeded; "
        f"95 % interval {interval_text(run.episodes)}"
    )
    if not run.episodes:
        small = "No episode is finished."
    result = element("p", element("strong", large), small, class_="result")
    more = definitions(provenance(run))
    return element(
        "section",
        element("h2", _run_name(run, index)),
        result,
        *[element("p", text, class_="warning") for text in notices(run)],
        definitions(facts(run)),
        element("details", element("summary", "Weights, versions and files"), more),
        class_="card",
    )


def notices(run: Run) -> list[str]:
    """Return what a reader of a run's numbers must know."""
    counted = len(run.episodes)
    if not run.summary:
        return [
            f"This evaluation is not finished: there is no summary.json yet. "
            f"The page counts the {counted} episodes that exist."
        ]
    if run.summarized_episodes != counted:
        return [
            f"summary.json covers {run.summarized_episodes} episodes, episodes.jsonl has "
            f"{counted}: other runs of “wam eval” used the folder too, or one is not finished. "
            f"The page counts all {counted}."
        ]
    return []


def facts(run: Run) -> dict[str, str]:
    """Return what was measured and how, by the name of each fact."""
    rows = {
        "checkpoint": describe(run.fact("checkpoint")),
        "env": describe(run.fact("env")),
        "env arguments": describe(run.fact("env_kwargs")),
        "protocol": _protocol(run.fact("protocol")),
        "perturbations": describe(run.fact("perturb")),
        "playing": _playing(run),
        "seeds": _seeds(run),
        "latency": _latency(run),
        "device": describe(run.fact("device")),
    }
    return {name: text for name, text in rows.items() if text}


def provenance(run: Run) -> dict[str, str]:
    """Return with which weights, programs and memory it was measured, and when."""
    rows = {
        "SHA-256": describe(run.fact("checkpoint_sha256")),
        "commit": describe(run.fact("commit")),
        "versions": describe(run.fact("versions")),
        "dtype": describe(run.fact("dtype")),
        "parallel envs": describe(run.fact("envs")),
        "files from": f"{run.first_write:%Y-%m-%d %H:%M} UTC",
        "files until": f"{run.last_write:%Y-%m-%d %H:%M} UTC",
    }
    if run.fact("parameters") is not None:
        rows["parameters"] = f"{run.fact('parameters') / 1e6:.2f} M"
    if run.fact("peak_memory_bytes") is not None:
        rows["peak memory"] = f"{run.fact('peak_memory_bytes') / 2**20:.0f} MiB"
    return {name: text for name, text in rows.items() if text}


def describe(value: Any) -> str:
    """Return a value from a JSON file as text; empty if it is null or an empty collection."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name} {describe(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(describe(entry) for entry in value)
    return str(value)


def _playing(run: Run) -> str:
    """Describe the settings that replace the checkpoint's own."""
    if run.summary:
        return describe(run.fact("playing"))
    # `run.json` has them among the others.
    others = {name: value for name, value in run.settings.items() if name not in IDENTITY}
    return describe(others)


def _protocol(value: Any) -> str:
    """Describe a protocol and the settings that depart from it."""
    if not isinstance(value, dict):
        return describe(value)
    text = describe(value.get("name"))
    overridden = describe(value.get("overridden") or None)
    if overridden:
        text += f"; overridden: {overridden}"
    return text


def _seeds(run: Run) -> str:
    """Return the range of the seeds that were played."""
    seeds = [episode.seed for episode in run.episodes]
    if not seeds:
        return ""
    return f"{min(seeds)} … {max(seeds)}"


def _latency(run: Run) -> str:
    """Return quantiles of the latency of a chunk."""
    values = latencies(run)
    if values.size == 0:
        return ""
    median = np.median(values)
    return f"median {median:.0f} ms, p95 {np.quantile(values, 0.95):.0f} ms per chunk"


# -- success and times -----------------------------------------------------------------------------


def _success(runs: Sequence[Run], groups: Sequence[Group]) -> Html:
    """Return the success rates as bars and as a table."""
    header = ["task", "success", "95 % interval", "episodes", "steps"]
    rows = []
    for group in groups:
        if len(runs) == 1:
            cells = _success_cells(runs[0], group)
            rows.append(row(group.label, cells, group.kind))
            continue
        rows.append(heading_row(group.label, len(header), group.kind))
        for k, run in enumerate(runs):
            rows.append(row(_run_name(run, k), _success_cells(run, group), "inner"))

    bars = _plot(
        success_bars(runs, groups),
        _legend(runs),
        "Bars: share of the episodes that succeeded. Lines: Wilson's 95 % intervals.",
    )
    note = (
        "Intervals are over episodes; they do not include the variation between training seeds. "
        "Rows over several tasks count every episode once. Steps: median over successes."
    )
    numbers = table("Success by task", header, rows)
    return element(
        "section",
        element("h2", "Success"),
        element("div", bars, numbers, class_="plots"),
        element("p", note, class_="note"),
    )


def _success_cells(run: Run, group: Group) -> list[str]:
    """Return the cells of one group and run after the head of their row."""
    episodes = run.of_tasks(group.tasks)
    steps = [episode.steps for episode in episodes if episode.success]
    median = MISSING
    if steps:
        median = f"{np.median(steps):.0f}"
    return [rate_text(episodes), interval_text(episodes), str(len(episodes)), median]


def rate_text(episodes: Sequence[Episode]) -> str:
    """Return the success rate in percent; a dash without episodes."""
    if not episodes:
        return MISSING
    return f"{np.mean([episode.success for episode in episodes]):.1%}"


def interval_text(episodes: Sequence[Episode]) -> str:
    """Return the 95 % interval of the success rate; a dash without episodes."""
    if not episodes:
        return MISSING
    low, high = wilson_interval(sum(episode.success for episode in episodes), len(episodes))
    return f"{low:.0%} … {high:.0%}"


def _times(runs: Sequence[Run]) -> Html:
    """Return the plots of latency and of steps to success."""
    plots = [
        _plot(
            success_over_steps(runs),
            _legend(runs),
            "Steps to success: share of all episodes that succeeded within so many control steps.",
        )
    ]
    if any(latencies(run).size for run in runs):
        plots.append(
            _plot(
                latency_histogram(runs),
                _legend(runs),
                "Latency of a chunk; the last bar also counts the slowest 1 %. A batched call "
                "counts in full for each of its envs.",
            )
        )
    return element(
        "section", element("h2", "Steps and latency"), element("div", *plots, class_="plots")
    )


def _plot(svg: Html, legend: Html, caption: str) -> Html:
    """Return a plot with its legend and caption."""
    return element("figure", legend, svg, element("figcaption", caption), class_="plot")


def _legend(runs: Sequence[Run]) -> Html:
    """Return the names of the runs with their colours; empty for a single run."""
    if len(runs) == 1:
        return Html()
    names = [_run_name(run, k) for k, run in enumerate(runs)]
    return element("p", *names, class_="legend")


def _run_name(run: Run, index: int) -> Html:
    """Return the name of a run after its colour."""
    swatch = element("span", class_="swatch", style=f"background:{run_color(index)}")
    return element("span", swatch, run.name)


# -- comparison ------------------------------------------------------------------------------------


def _comparisons(runs: Sequence[Run], groups: Sequence[Group]) -> Html:
    """Return a table for every two runs."""
    note = (
        "Two runs are paired by task and seed. p: McNemar's exact test, the probability of a "
        "split between “only A” and “only B” at least this uneven if both were equally good. "
        "It is not corrected for the number of rows."
    )
    pairs = [_comparison(a, b, groups) for a, b in itertools.combinations(runs, 2)]
    heading = element("h2", "Paired comparison")
    return element("section", heading, element("p", note, class_="note"), *pairs)


def _comparison(a: Run, b: Run, groups: Sequence[Group]) -> Html:
    """Return the comparison of two runs, or why there is none."""
    names = f"A = {a.name}, B = {b.name}"
    if a.fact("env") != b.fact("env"):
        return element("p", f"{names}: not paired, because their envs differ.")
    rows = []
    for group in groups:
        cells = paired_cells(a.of_tasks(group.tasks), b.of_tasks(group.tasks))
        if cells:
            rows.append(row(group.label, cells, group.kind))
    if not rows:
        return element("p", f"{names}: not paired, because they share no task and seed.")

    differences = ", ".join(_differences(a, b)) or "nothing that the results record"
    header = ["task", "episodes", "B − A, points", "p", "both", "only A", "only B", "neither"]
    caption = f"{names}. They differ in: {differences}."
    return table(caption, header, rows)


def paired_cells(a: Sequence[Episode], b: Sequence[Episode]) -> list[str]:
    """Return the difference of the rates over shared episodes, the p value, and the counts.

    Args:
        a: Episodes of run A.
        b: Episodes of run B.

    Returns:
        The cells of a row after its head; empty if no task and seed is in both.
    """
    a_results = {(episode.task, episode.seed): episode.success for episode in a}
    b_results = {(episode.task, episode.seed): episode.success for episode in b}
    shared = [key for key in a_results if key in b_results]
    if not shared:
        return []

    p_value, counts = mcnemar(
        [a_results[key] for key in shared], [b_results[key] for key in shared]
    )
    difference = (counts.only_b - counts.only_a) / len(shared)
    p_text = f"{p_value:.3f}"
    if p_value < 0.001:
        p_text = "< 0.001"
    difference_text = f"{100 * difference:+.1f}".replace("-", "−")
    return [str(len(shared)), difference_text, p_text, *map(str, counts)]


def _differences(a: Run, b: Run) -> list[str]:
    """Return the names of the settings in which two runs differ."""
    names = dict.fromkeys([*a.settings, *b.settings, "protocol", "perturb"])
    return [SETTINGS.get(name, name) for name in names if a.fact(name) != b.fact(name)]


# -- episodes --------------------------------------------------------------------------------------


def _episodes(runs: Sequence[Run], groups: Sequence[Group], max_video_mib: float) -> Html:
    """Return every episode by task, with the task's videos."""
    # Task by task, so that the videos of different runs stand together.
    budget = VideoBudget(int(max_video_mib * 2**20))
    tasks = []
    for group in groups:
        if group.kind == "single":
            played = [_played(run, k, group.label, budget) for k, run in enumerate(runs)]
            tasks.append(element("section", element("h3", group.label), *played, class_="task"))

    rule = media_rule(runs, max_video_mib)
    key = "One box per episode: ✓ success or ✗ failure, its seed, and at the right its steps."
    heading = element("h2", "Episodes")
    return element("section", heading, element("p", key, class_="note"), rule, *tasks)


def _played(run: Run, index: int, task: str, budget: VideoBudget) -> Html:
    """Return the episodes of one task and run."""
    episodes = run.of_tasks([task])
    successes = sum(episode.success for episode in episodes)
    count = f": {successes} of {len(episodes)} succeeded"
    media = task_media(run, task, budget)
    kind = "played"
    if media:
        kind = "played filmed-too"
    return element(
        "div",
        element("p", _run_name(run, index), count, class_="who"),
        element("ul", *[_box(episode) for episode in episodes], class_="episodes"),
        media,
        failed_frames(run, task),
        class_=kind,
    )


def _box(episode: Episode) -> Html:
    """Return the box of one episode."""
    result = result_name(episode)
    return element(
        "li",
        element("span", SIGNS[result], aria_hidden="true"),
        element("span", f"{result}, seed", class_="hidden"),
        f" {episode.seed} ",
        element(
            "span", element("span", "steps ", class_="hidden"), str(episode.steps), class_="steps"
        ),
        class_=result,
        title=f"{episode.task}, seed {episode.seed}: {result} after {episode.steps} steps",
    )
