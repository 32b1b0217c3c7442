"""`wam import-minari`: a Minari dataset as a LeRobot one, which everything else here reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from wam_policy.config import from_plain
from wam_policy.contract import EnvContract
from wam_policy.data.lerobot_writer import LeRobotWriter
from wam_policy.errors import DatasetError, MissingExtraError
from wam_policy.utils.deprecation import warn_renamed
from wam_policy.wrappers.observation import rotate_180
from wam_policy.wrappers.paths import get_path


@dataclass(frozen=True, kw_only=True)
class MinariConfig:
    """Import of a Minari dataset."""

    dataset: str
    """Id of a dataset in Minari's folder (`minari download …`), or the folder of one."""
    contract: Path
    """JSON of an `EnvContract`: where cameras and state are in an observation, what the actions mean, the instruction."""
    output_dir: Path
    """Folder of the new LeRobot v3.0 dataset."""
    fps: int
    """Steps per second of the recording; Minari doesn't say."""


def import_minari(config: MinariConfig) -> Path:
    """Write the dataset and return its folder; its last observations, which no action follows, are left out.

    Raises:
        DatasetError: no such dataset, a contract that doesn't fit it or says too little, numbers that aren't finite.
        MissingExtraError: minari isn't installed.
    """
    contract = _contract(config.contract)
    episodes = _open(config.dataset)
    first = next(episodes.iterate_episodes())
    sizes = {
        name: _picture(first, path, config.dataset).shape[1:3]
        for name, path in contract.cameras.items()
    }
    assert contract.state is not None and contract.instruction is not None
    writer = LeRobotWriter(
        config.output_dir,
        fps=config.fps,
        robot_type=str(config.dataset),
        cameras={f"observation.images.{name}": size for name, size in sizes.items()},
        vectors={"observation.state": contract.state_names, "action": contract.action.names},
        action=contract.action,
    )
    with writer, Progress() as progress:
        for episode in progress.track(
            episodes.iterate_episodes(), total=episodes.total_episodes, description="importing"
        ):
            place, length = f"{config.dataset}, episode {episode.id}", len(episode.actions)
            pictures = {
                f"observation.images.{n}": _picture(episode, p, place)[:length]
                for n, p in contract.cameras.items()
            }
            numbers = {
                "observation.state": _numbers(
                    get_path(episode.observations, contract.state), len(contract.state_names), place
                ),
                "action": _numbers(episode.actions, contract.action.dim, place),
            }
            turned = {f"observation.images.{name}" for name in contract.rotated_cameras}
            pictures = {key: rotate_180(x) if key in turned else x for key, x in pictures.items()}
            writer.add_episode(
                contract.instruction, pictures, {key: x[:length] for key, x in numbers.items()}
            )
    return config.output_dir


def _contract(path: Path) -> EnvContract:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and "turned" in data:
            warn_renamed("`turned`", "`rotated_cameras`")
            data["rotated_cameras"] = data.pop("turned")
        contract = from_plain(EnvContract, data, "contract")
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{path} is no contract ({error}); see `wam_policy.contract.EnvContract`"
        ) from error
    if contract.state is None or contract.instruction is None:
        raise DatasetError(
            f"{path} must say `state`, `state_names` and `instruction`: a Minari dataset doesn't"
        )
    return contract


def _open(name: str) -> Any:
    try:
        import minari
    except ImportError as error:
        raise MissingExtraError("minari", "minari") from error
    folder = Path(name)
    try:
        if folder.is_dir():
            return minari.MinariDataset(folder / "data" if (folder / "data").is_dir() else folder)
        return minari.load_dataset(name)
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"no Minari dataset {name!r} ({error}): `minari list local` shows those there are"
        ) from error


def _picture(episode: Any, path: str, place: str) -> np.ndarray:
    """Pictures of an episode, uint8 [T + 1, H, W, 3]."""
    found = np.asarray(get_path(episode.observations, path))
    if found.ndim != 4 or found.shape[-1] != 3 or found.dtype != np.uint8:
        raise DatasetError(
            f"{place}: {path!r} isn't uint8 [T, H, W, 3] but {found.dtype} {list(found.shape)}"
        )
    return found


def _numbers(found: Any, dim: int, place: str) -> np.ndarray:
    """Vectors of an episode, float32 [T, dim]."""
    vectors = np.asarray(found, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise DatasetError(
            f"{place}: the contract names {dim} numbers, the dataset has {list(vectors.shape)}"
        )
    if not np.isfinite(vectors).all():
        raise DatasetError(
            f"{place} holds a number that isn't finite in row {int(np.argwhere(~np.isfinite(vectors))[0, 0])}"
        )
    return vectors
