"""Pictures and videos of a report, as data within the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
from PIL import Image

from wam_policy.errors import ResultsError
from wam_policy.evaluation.report_html import Html, element, image, join
from wam_policy.evaluation.report_runs import Run, result_name
from wam_policy.evaluation.results import Episode, last_frame_path, video_path
from wam_policy.utils.pictures import read_picture

# What the videos of a task show, by the end of their names.
SHOWN = {
    "": "the episode",
    "_imagined": "real frames above imagined ones",
    "_explained": "what the action head attends to",
}
JPEG_QUALITY = 85
MAX_STILL_WIDTH = 640  # pixels
MAX_FAILURES = 24  # failed episodes of a task whose last frame is shown


@dataclass
class VideoBudget:
    """How many bytes of videos still fit into the page."""

    remaining: int

    def take(self, size: int) -> bool:
        """Reserve room for a video; return whether there was enough."""
        if size > self.remaining:
            return False
        self.remaining -= size
        return True


def last_frame(path: Path) -> Image.Image | None:
    """Return the last frame of a video; None if no frame can be decoded."""
    last = None
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                last = frame
    except (av.FFmpegError, IndexError):
        # A damaged file: IndexError is that of a file without a video stream.
        return None
    if last is None:
        return None
    picture: Image.Image = last.to_image()
    return picture


def data_uri(kind: str, data: bytes) -> str:
    """Return data of a media type as the address of an image or a video."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def still_uri(picture: Image.Image) -> str:
    """Return a picture as a JPEG of limited width."""
    small = picture.copy()
    # The height follows from the width.
    small.thumbnail((MAX_STILL_WIDTH, picture.height))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return data_uri("image/jpeg", buffer.getvalue())


def task_media(run: Run, task: str, budget: VideoBudget) -> Html:
    """Return the videos of a task, each with the last frame as its still.

    Args:
        run: Evaluation that wrote the videos.
        task: Name of the task.
        budget: Room for videos; one that does not fit is shown as its last frame.
    """
    shown = []
    for suffix, what in SHOWN.items():
        path = video_path(run.folder, task, suffix)
        if path.is_file():
            shown.append(_figure(run, task, path, what, budget))
    if not shown:
        return Html()
    return element("div", *shown, class_="media")


def failed_frames(run: Run, task: str) -> Html:
    """Return the last frames of the episodes of a task that failed, as far as they were kept."""
    failed = [episode for episode in run.of_tasks([task]) if not episode.success]
    figures = []
    for episode in failed[:MAX_FAILURES]:
        path = last_frame_path(run.folder, task, episode.seed)
        if not path.is_file():
            continue
        try:
            source = still_uri(Image.fromarray(read_picture(path, path, ResultsError)))
        except ResultsError:
            # The other pictures are still worth showing.
            figures.append(element("p", f"{path.name} cannot be read"))
            continue
        what = f"seed {episode.seed}, after {episode.steps} steps"
        still = image(source, f"last frame of {task}, {what}")
        figures.append(element("figure", still, element("figcaption", what), class_="filmed"))
    if not figures:
        return Html()

    title = "Last frames of the episodes that failed"
    if len(failed) > MAX_FAILURES:
        title = f"{title}, the first {MAX_FAILURES} of {len(failed)}"
    return element(
        "details",
        element("summary", title),
        element("div", *figures, class_="failures"),
        class_="failed-frames",
    )


def _figure(run: Run, task: str, path: Path, what: str, budget: VideoBudget) -> Html:
    """Return one video, or its last frame, with its caption."""
    episode = filmed_episode(run, task)
    caption = f"{what}{_outcome(episode)}"
    still = last_frame(path)
    if still is None:
        return element("p", f"{path.name} cannot be decoded; remove it and run `wam eval` again")

    # The still stays visible on paper, and until the video plays.
    size = path.stat().st_size
    if budget.take(size):
        picture = element(
            "video",
            controls="",
            playsinline="",
            preload="none",
            poster=still_uri(still),
            src=data_uri("video/mp4", path.read_bytes()),
            width=str(still.width),
            height=str(still.height),
            aria_label=f"{task}: {caption}",
        )
    else:
        picture = image(still_uri(still), f"last frame of {task}: {caption}")
        caption = f"last frame; the video ({size / 2**20:.1f} MiB) is {path.name}; {caption}"

    kind = "filmed"
    if episode is not None and not episode.success:
        kind = "filmed failed"
    return element("figure", picture, element("figcaption", caption), class_=kind)


def filmed_episode(run: Run, task: str) -> Episode | None:
    """Return the episode that a task's videos show, that of the first seed; None if unknown."""
    for episode in run.episodes:
        if episode.task == task and episode.seed == run.settings.get("seed"):
            return episode
    return None


def _outcome(episode: Episode | None) -> str:
    """Describe the filmed episode; it was played again for the video."""
    if episode is None:
        return ""
    return (
        f" of seed {episode.seed}, played again: {result_name(episode)} after {episode.steps} steps"
    )


def media_rule(runs: Sequence[Run], max_video_mib: float) -> Html:
    """Return the rule by which videos are embedded, for the reader."""
    rule = (
        "An evaluation films the first seed of each task. "
        f"Videos are embedded in the order of the page up to {max_video_mib:g} MiB in total; "
        "beyond it, and before a video plays, its last frame is shown."
    )
    filmed = any(video_path(run.folder, task).is_file() for run in runs for task in run.tasks)
    if not filmed:
        rule = "There are no videos in these results folders."
    return join(element("p", rule, class_="note"))
