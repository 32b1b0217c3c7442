"""Run by LeRobot's own Python: writes a dataset by its classes, and beside it what was put in.

With a second argument, the folder of another dataset, it reads that one by LeRobot's classes too.
"""

import sys
from pathlib import Path

import numpy as np

folder = Path(sys.argv[1])
# LeRobot imports torchvision, which has no build for this PyTorch, and uses none of it here.
stubs = folder / "stubs"
for module in (
    "torchvision",
    "torchvision/transforms",
    "torchvision/transforms/v2",
    "torchvision/io",
):
    (stubs / module).mkdir(parents=True, exist_ok=True)
    (stubs / module / "__init__.py").write_text("ToTensor = Transform = VideoReader = object\n")
sys.path.insert(0, str(stubs))

from ledataset.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402

features = {
    "observation.images.front": {
        "dtype": "video",
        "shape": (64, 96, 3),
        "names": ["height", "width", "channels"],
    },
    "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    "action": {"dtype": "float32", "shape": (3,), "names": ["delta_x", "delta_y", "gripper"]},
    "observation.force": {"dtype": "float32", "shape": (1,), "names": ["force"]},
}
dataset = LeRobotDataset.create(
    "toy/real", fps=10, features=features, root=folder / "data", use_videos=True
)
rng, kept = np.random.default_rng(0), {"frames": [], "state": [], "action": []}
for episode, length in enumerate((20, 12, 16)):
    for t in range(length):
        frame = np.full((64, 96, 3), 20 * episode + 10 * t, np.uint8)
        state, action = (
            rng.normal(size=2).astype(np.float32),
            rng.uniform(-1, 1, 3).astype(np.float32),
        )
        values = {"observation.images.front": frame, "observation.state": state, "action": action}
        values["observation.force"] = np.float32([t])
        dataset.add_frame(values | {"task": f"task {episode % 2}"})
        for name, value in zip(kept, (frame, state, action), strict=True):
            kept[name].append(value)
    dataset.save_episode()
dataset.finalize()
np.savez(folder / "kept.npz", **{name: np.stack(values) for name, values in kept.items()})

if len(sys.argv) > 2:
    other = LeRobotDataset("toy/other", root=sys.argv[2])
    # Its rows are cast to the declared features; its videos would need FFmpeg's libraries.
    actions = [other.hf_dataset[i]["action"] for i in range(len(other))]
    tasks = np.array(list(other.meta.tasks.index))
    np.savez(folder / "other.npz", action=np.stack(actions), tasks=tasks)
