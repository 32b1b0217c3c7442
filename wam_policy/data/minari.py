"""`wam import-minari`: converts a Minari dataset to a LeRobot dataset."""

# T actions of an episode, H W pixels

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from rich.progress import Progress

from wam_policy.contract import EnvContract
from wam_policy.data.lerobot_reader import CAMERA_PREFIX
from wam_policy.data.lerobot_writer import LeRobotWriter
from wam_policy.errors import ConfigError, DatasetError, MissingExtraError
from wam_policy.utils import documents
from wam_policy.utils.arrays import as_array
from wam_policy.utils.json_dataclass import from_plain
from wam_policy.wrappers.observation_map import rotate_180
from wam_policy.wrappers.paths import get_path


@dataclass(frozen=True, kw_only=True)
class MinariConfig:
    """Import of a Minari dataset."""

    dataset: str
    """Id of a dataset in Minari's folder (`minari download …`), or the folder of one."""
    contract: Path
    """JSON file of an `EnvContract`: paths of the cameras and the state in an observation, meaning
    of the actions, instruction."""
    output_dir: Path
    """Folder of the new LeRobot v3.0 dataset."""
    fps: int
    """Steps per second of the recording, which Minari does not store."""


def import_minari(config: MinariConfig) -> Path:
    """Convert a Minari dataset and return the folder of the LeRobot dataset.

    The last observation of an episode, which no action follows, is left out.

    Args:
        config: Source, contract and target.

    Raises:
        DatasetError: There is no such dataset, the contract does not fit it or is incomplete, or a
            number is not finite.
        MissingExtraError: The package minari is not installed.
    """
    contract = _read_contract(config.contract)
    dataset = _open_dataset(config.dataset)

    _check_action_space(dataset, config.dataset)

    # The first episode tells how large the frames are.
    first = next(dataset.iterate_episodes())
    cameras = {}
    for name, path in contract.cameras.items():
        frames = _camera_frames(first, path, config.dataset)
        cameras[CAMERA_PREFIX + name] = frames.shape[1:3]

    assert contract.instruction is not None
    writer = LeRobotWriter(
        config.output_dir,
        fps=config.fps,
        robot_type=config.dataset,
        cameras=cameras,
        vectors={"observation.state": contract.state_names, "action": contract.action.names},
        action=contract.action,
    )
    with writer, Progress() as progress:
        episodes = progress.track(
            dataset.iterate_episodes(), total=dataset.total_episodes, description="importing"
        )
        for episode in episodes:
            where = f"{config.dataset}, episode {episode.id}"
            images = _episode_images(episode, contract, where)
            vectors = _episode_vectors(episode, contract, where)
            writer.add_episode(contract.instruction, images, vectors)
    return config.output_dir


def _episode_images(episode: Any, contract: EnvContract, where: str) -> dict[str, np.ndarray]:
    """Return the frames of every camera, uint8 [T, H, W, 3], the right way up."""
    length = len(episode.actions)
    images = {}
    for name, path in contract.cameras.items():
        frames = _camera_frames(episode, path, where)[:length]
        if name in contract.rotated_cameras:
            frames = rotate_180(frames)
        images[CAMERA_PREFIX + name] = frames
    return images


def _episode_vectors(episode: Any, contract: EnvContract, where: str) -> dict[str, np.ndarray]:
    """Return states and actions of an episode, float32 [T, numbers]."""
    assert contract.state is not None
    observed = get_path(episode.observations, contract.state)
    state = _finite_vectors(observed, len(contract.state_names), where)
    action = _finite_vectors(episode.actions, contract.action.dim, where)
    return {"observation.state": state[: len(action)], "action": action}


def _read_contract(path: Path) -> EnvContract:
    data = documents.read_json_object(path, DatasetError, "write an `EnvContract`")
    if "turned" in data:
        data = _rename_turned(data, path)
    try:
        contract = from_plain(EnvContract, data, "contract")
    except ConfigError as error:
        raise DatasetError(
            f"{path} is not a contract ({error}); see `wam_policy.contract.EnvContract`"
        ) from error
    if contract.state is None or contract.instruction is None:
        raise DatasetError(
            f"{path} must set `state`, `state_names` and `instruction`: a Minari dataset does not "
            f"contain them"
        )
    return contract


def _rename_turned(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the data of a contract with the present name of its rotated cameras.

    Raises:
        DatasetError: Both names are present.
    """
    if "rotated_cameras" in data:
        raise DatasetError(
            f"{path}: `turned` is the old name of `rotated_cameras`: keep only `rotated_cameras`"
        )
    # Not a DeprecationWarning, which Python hides from users of a library.
    warnings.warn(
        f"{path}: `turned` is now called `rotated_cameras`; the old name will be removed",
        FutureWarning,
        stacklevel=2,
    )
    return {"rotated_cameras" if name == "turned" else name: data[name] for name in data}


def _open_dataset(name: str) -> Any:
    """Open a Minari dataset by its folder or its id."""
    try:
        import minari
    except ImportError as error:
        raise MissingExtraError("minari", "minari") from error

    folder = Path(name)
    try:
        if not folder.is_dir():
            return minari.load_dataset(name)
        data = folder / "data"
        return minari.MinariDataset(data if data.is_dir() else folder)
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"no Minari dataset {name!r} ({error}): `minari list local` lists the available ones"
        ) from error


def _check_action_space(dataset: Any, name: str) -> None:
    """Check that actions are vectors."""
    space = dataset.action_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise DatasetError(
            f"{name}: actions must be vectors (a Box with one axis), but the dataset's action "
            f"space is {space!s:.200}; convert the dataset, or choose another"
        )


def _camera_frames(episode: Any, path: str, where: str) -> np.ndarray:
    """Return one camera's frames of an episode, uint8 [T + 1, H, W, 3]."""
    frames = np.asarray(get_path(episode.observations, path))
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise DatasetError(
            f"{where}: {path!r}: expected uint8 [T, H, W, 3], "
            f"got {frames.dtype} {list(frames.shape)}; correct `cameras` of the contract"
        )
    return frames


def _finite_vectors(values: Any, dim: int, where: str) -> np.ndarray:
    """Return the vectors of an episode, float32 [rows, dim]."""
    vectors = as_array(values, where, DatasetError)
    if vectors.dtype.kind not in "fiub":
        raise DatasetError(f"{where}: expected numbers, got {vectors.dtype}")
    vectors = vectors.astype(np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise DatasetError(
            f"{where}: the contract names {dim} numbers, the dataset has {list(vectors.shape)}; "
            f"correct the names of the contract"
        )
    not_finite = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(not_finite):
        raise DatasetError(
            f"{where}: a number is not finite in row {not_finite[0]}; remove the episode"
        )
    return vectors
