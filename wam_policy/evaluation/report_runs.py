"""What a report shows: evaluations read from their results folders, and their groups of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from wam_policy.errors import ResultsError
from wam_policy.evaluation.results import EPISODES, RUN, SUMMARY, Episode, read_episodes
from wam_policy.utils import documents

CURE = "remove it and run `wam eval` again"


@dataclass(frozen=True)
class Run:
    """One evaluation."""

    name: str
    folder: Path
    settings: dict[str, Any]  # content of `run.json`
    summary: dict[str, Any]  # content of `summary.json`; empty if the evaluation is not finished
    episodes: list[Episode]  # in the order in which they ended
    first_write: datetime
    last_write: datetime

    def fact(self, name: str) -> Any:
        """Return an entry of the summary, or else of the settings; None if neither has it."""
        return self.summary.get(name, self.settings.get(name))

    def of_tasks(self, tasks: Sequence[str]) -> list[Episode]:
        """Return the episodes of some tasks, by the order of the tasks and then by seed."""
        chosen = [episode for episode in self.episodes if episode.task in tasks]
        return sorted(chosen, key=lambda episode: (tasks.index(episode.task), episode.seed))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, those of the summary first."""
        played = [episode.task for episode in self.episodes]
        return list(dict.fromkeys([*self.summary.get("tasks", {}), *played]))

    @property
    def summarized_episodes(self) -> int:
        """The number of episodes in the summary."""
        rows = self.summary.get("tasks", {}).values()
        return sum(row["episodes"] for row in rows)


@dataclass(frozen=True)
class Group:
    """Tasks whose episodes are counted together: one task, a suite, or all."""

    label: str
    tasks: tuple[str, ...]
    kind: Literal["single", "total"]  # class of its rows in a table


def result_name(episode: Episode) -> str:
    """Return "success" or "failure"."""
    if episode.success:
        return "success"
    return "failure"


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read evaluations.

    Args:
        paths: Folders of `wam eval`, or of `wam compare`, which stand for those in them.

    Returns:
        The evaluations in the order of the folders.

    Raises:
        ResultsError: A folder holds no results or unreadable ones, or two have the same name.
    """
    folders = [folder for path in paths for folder in _results_folders(path.resolve())]
    names = [folder.name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            same = ", ".join(str(folder) for folder in folders if folder.name == name)
            raise ResultsError(
                f"several results folders are called {name!r} ({same}); "
                f"a report names runs by their folders: rename one, or leave it out"
            )
    return [_read_run(folder) for folder in folders]


def _results_folders(folder: Path) -> list[Path]:
    """Return a folder of `wam eval` itself, or those in a folder of `wam compare`."""
    if (folder / RUN).is_file():
        return [folder]
    inner = sorted(path.parent for path in folder.glob(f"*/{RUN}"))
    if not inner:
        raise ResultsError(
            f"{folder} holds no results (neither it nor a folder in it has a {RUN}); "
            f"give the --output-dir of a `wam eval` or `wam compare`"
        )
    return inner


def _read_run(folder: Path) -> Run:
    """Read one folder of `wam eval`; its summary and its episodes may not be there yet."""
    summary = {}
    if (folder / SUMMARY).is_file():
        summary = documents.read_json_object(folder / SUMMARY, ResultsError, CURE)

    paths = [folder / name for name in (RUN, EPISODES, SUMMARY)]
    times = [path.stat().st_mtime for path in paths if path.is_file()]
    return Run(
        name=folder.name,
        folder=folder,
        settings=documents.read_json_object(folder / RUN, ResultsError, CURE),
        summary=summary,
        episodes=read_episodes(folder),
        first_write=datetime.fromtimestamp(min(times), UTC),
        last_write=datetime.fromtimestamp(max(times), UTC),
    )


def task_groups(runs: Sequence[Run]) -> list[Group]:
    """Return what success is counted over: each task, each suite if there are several, and all.

    A suite is what stands before the "/" in the name of a task.

    Args:
        runs: Evaluations; a task of any of them counts.
    """
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    groups = [Group(task, (task,), kind="single") for task in tasks]

    # The only task of an env without tasks has the name of the env.
    env_ids = {run.fact("env") for run in runs}
    suites: dict[str, list[str]] = {}
    for task in tasks:
        suite, slash, _ = task.partition("/")
        if slash and task not in env_ids:
            suites.setdefault(suite, []).append(task)
    if len(suites) > 1:
        for suite, members in suites.items():
            groups.append(Group(f"suite {suite}", tuple(members), kind="total"))

    if len(tasks) > 1:
        groups.append(Group("all episodes", tuple(tasks), kind="total"))
    return groups
