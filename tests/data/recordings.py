"""Small recordings of this package's writer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tiny import LAYOUT

from wam_policy.contract import ActionLayout
from wam_policy.data.lerobot_writer import LeRobotWriter


def make_writer(
    folder: Path,
    cameras: Mapping[str, tuple[int, int]],
    *,
    state: Sequence[str] = (),
    action: ActionLayout = LAYOUT,
) -> LeRobotWriter:
    """Start a recording at 10 frames per second.

    Args:
        folder: Folder of the dataset.
        cameras: Height and width of the frames of each camera's feature.
        state: Names of the state's numbers; none for a dataset without a state.
        action: Layout of the actions.
    """
    vectors = {"observation.state": tuple(state)} if state else {}
    return LeRobotWriter(
        folder,
        fps=10,
        robot_type="toy",
        cameras=dict(cameras),
        vectors=vectors | {"action": action.names},
        action=action,
    )
