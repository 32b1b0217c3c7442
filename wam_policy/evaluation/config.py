"""Options of an evaluation and of a report on evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from wam_policy.errors import ConfigError
from wam_policy.models.fast_wam.variants import ActionMode
from wam_policy.wrappers.perturbations import check_perturbations

METAWORLD_TASKS = ("reach-v3", "button-press-topdown-v3", "drawer-open-v3", "window-open-v3")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation of a checkpoint in a registered env."""

    checkpoint: str = "embedded:metaworld-fast-wam"
    """Folder, file of a known release, Hub id, or "embedded:<name>"."""
    env: str = "wam_policy/MetaWorld-v0"
    """Gymnasium env id."""
    tasks: tuple[str, ...] = METAWORLD_TASKS
    """Values of the env's `task` argument; if empty, the env is created without that argument."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Other arguments of the env, NAME VALUE …, for example `size 128`."""
    protocol: str | None = None
    """Named protocol of LIBERO: "fastwam", "lightwam", "openpi", "lerobot" or "vla-eval". It sets
    the env, its step limits, settling and fixtures, the tasks of `suite`, `episodes` and `replan`.
    Options that are given as well replace the protocol's; the results record them."""
    suite: tuple[str, ...] = ()
    """Suites of LIBERO or LIBERO-PRO that the protocol plays all tasks of."""
    perturb: dict[str, int] = field(default_factory=dict)
    """Perturbations of the env by severity 1 to 5, NAME SEVERITY …, for example `camera 3`."""
    episodes: int = 50
    """Episodes per task; episode i uses the seed `seed + i`."""
    num_envs: int = 2
    """Number of simulator processes; one batched policy drives all of them."""
    ray: str | None = None
    """Address of a Ray cluster whose workers play the episodes, "auto" for the one of this machine;
    "local" starts one here. With a CUDA device each worker takes a GPU of its own."""
    ray_workers: int = 2
    """Ray workers; each loads the policy and has `num_envs` simulators."""
    timeout: float = 600.0
    """Seconds after which a simulator that does not answer is killed and its episode repeated."""
    seed: int = 0
    """Seed of the first episode. The embedded checkpoints were trained on seeds from 1,000,000."""
    output_dir: Path = Path("runs/eval")
    """Folder for the results; an evaluation that is started again resumes from it."""
    video: bool = True
    """Write one mp4 per task."""
    imagine: bool = False
    """Compare imagined with real futures: PSNR, and one mp4 per task (real frames on top)."""
    explain: bool = False
    """Write one mp4 per task with heat maps of a Light-WAM's attention, one per tap feature."""
    replan: int | None = None
    """Actions executed of each chunk; the default is the checkpoint's."""
    max_steps: int | None = None
    """Steps after which an episode is truncated; the default is the env's own limit, or 1000 for an
    env that declares none."""
    horizon: int | None = None
    """Actions per chunk; the default is the checkpoint's."""
    mode: ActionMode | None = None
    """What the action tokens attend to during denoising; the default is the checkpoint's."""
    ensemble: float | None = None
    """Average overlapping chunks by exp(-ensemble * i), oldest first; default: the checkpoint's."""
    num_inference_steps: int | None = None
    """Denoising steps of a Fast-WAM's actions; the default is the checkpoint's."""
    device: str = "cpu"
    """PyTorch device that the policy runs on."""
    compile: bool = False
    """Compile the policy first (see `wam_policy.inference`)."""

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.num_envs < 1:
            raise ConfigError(
                f"`episodes` and `num_envs` must be positive, "
                f"got {self.episodes} and {self.num_envs}"
            )
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"`max_steps` must be positive, got {self.max_steps}")
        if self.ray_workers < 1:
            raise ConfigError(f"`ray_workers` must be positive, got {self.ray_workers}")
        if self.timeout <= 0:
            raise ConfigError(f"`timeout` must be a positive number of seconds, got {self.timeout}")
        check_perturbations(self.perturb)

    def task_argument(self, task: str) -> str | None:
        """Return the env's `task` argument; None for an env that has no tasks."""
        return task if self.tasks else None

    @property
    def overrides(self) -> dict[str, float | str]:
        """The settings of chunk prediction and execution that replace the checkpoint's."""
        settings = {
            "replan": self.replan,
            "horizon": self.horizon,
            "ensemble": self.ensemble,
            "mode": self.mode,
            "num_inference_steps": self.num_inference_steps,
            "compile": self.compile or None,
        }
        return {name: value for name, value in settings.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """A page about one or several evaluations."""

    runs: Positional[tuple[Path, ...]]
    """Results folders of `wam eval`, or of `wam compare`, which stands for those in it."""
    output: Path = Path("report.html")
    """HTML file to write."""
    overwrite: bool = False
    """Replace the file if it exists."""
    max_video_mib: float = 16.0
    """MiB of videos to embed at most; a video beyond it is shown as its last frame."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("a report needs a results folder; name one: wam report RUN")
        if not self.max_video_mib >= 0:
            raise ConfigError(
                f"`max_video_mib` must be 0 or more, got {self.max_video_mib}; "
                f"0 shows every video as its last frame"
            )
