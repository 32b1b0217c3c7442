"""The options of training: what both families share, and what each adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from wam_policy.data.config import DataConfig
from wam_policy.errors import ConfigError
from wam_policy.models.fast_wam.loss import LossConfig
from wam_policy.models.fast_wam.variants import VariantName
from wam_policy.models.light_wam.loss import LightLossConfig
from wam_policy.normalize import Mode

Part = Literal["all", "video", "action", "embodiment", "lora"]
Tracker = Literal["tensorboard", "trackio", "wandb"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the averaged weights; the defaults are the papers', but that gradients are really clipped."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    weight_decay_on: Literal["all", "matrices"] = "all"
    """What decays: every weight, as in the papers, or not the norms, biases, modulations and other vectors."""
    warmup_steps: int | None = None
    """Steps in which the rate rises to its full height; the default is a twentieth of the run."""
    max_grad_norm: float = 1.0
    """Largest norm of all gradients together; "inf" leaves them alone, as the references in effect do."""
    ema_decay: float = 0.0
    """Decay of the averaged weights, which are then the ones that are kept; 0: there are none."""

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1 or self.max_grad_norm <= 0 or self.learning_rate < 0:
            raise ConfigError(
                f"`ema_decay` must lie in [0, 1), `max_grad_norm` be positive, `learning_rate` not negative, got {self}"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig(DataConfig):
    """Training of a policy on a LeRobot dataset: what every family needs."""

    output_dir: Path
    """Folder of the run: `checkpoint/`, `checkpoints/`, `curve.jsonl`; started again, a run goes on where it was."""
    text_encoder: Path | None = None
    """Folder of the text encoder (`text_encoder/`, `tokenizer/`) that embeds prompts which the weights a run begins from don't
    know; the default is theirs, else a small one with random weights."""
    prompt_cache: Path | None = None
    """Folder of that encoder's embeddings, ours or the reference implementations': what is in it isn't made again."""
    state_normalization: Mode = "min_max"
    """How the state is normalised."""
    action_normalization: Mode = "min_max"
    """How the actions are."""
    stats: Path | None = None
    """Statistics of this data to normalise by, a `dataset_stats.json`; the default is to compute them."""
    keep_normalization: bool = False
    """Normalise as the policy that a run begins from does, not by this data's statistics: for the same robot, another task."""
    dataset_weights: tuple[float, ...] = ()
    """How often windows of each dataset are drawn, in any unit; the default is as often as there are."""
    replan: int = 0
    """Actions played before the next chunk; 0: as the policy a run begins from plays, else 8."""
    num_inference_steps: int = 0
    """Denoising steps, of actions or of imagined frames; 0: likewise, else 10."""
    prompt_template: str | None = None
    """Prompt template; the default is that of the policy a run begins from, of raw weights the papers', else "{task}"."""
    token_length: int | None = None
    """Tokens that prompts are padded to; the default is likewise, 128 for a text encoder's own, else 8."""
    steps: int = 20_000
    """Updates of the weights."""
    batch_size: int = 32
    """Windows per update."""
    gradient_accumulation_steps: int = 1
    """Parts that a batch is computed in, one after the other."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """What passes are computed in; weights, gradients and what the optimizer keeps are float32."""
    compile: bool = True
    """Compile every block; worth it for more than some hundred steps."""
    gradient_checkpointing: bool = False
    """Compute the inside of blocks anew on the way back instead of keeping it: less memory, a third more time."""
    fsdp: bool = False
    """Of several processes: cut weights, gradients and what the optimizer keeps over them (FSDP2) instead of copying them."""
    seed: int = 0
    save_steps: int = 1000
    """Steps between checkpoints."""
    save_total_limit: int = 2
    """Newest checkpoints that are kept."""
    validation_fraction: float = 0.0
    """Part of the episodes that are held out; what the policy is worth on them is measured at every checkpoint."""
    validation_windows: int = 64
    """Windows of them that are used."""
    validation_videos: int = 4
    """How many of these have their future imagined, for the PSNR and the contact sheet; 0: none."""
    eval_env: str | None = None
    """Play every checkpoint in this env (a Gymnasium id) too; results in `eval/`."""
    eval_tasks: tuple[str, ...] = ()
    """Values of the env's `task` argument; none: the env is made without it."""
    eval_episodes: int = 10
    """Episodes per task, from seed 0."""
    report_to: tuple[Tracker, ...] = ()
    """Also hand the rows of the curve to these."""
    logging_steps: int = 50
    """Steps between rows of the curve."""

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "batch_size",
            "gradient_accumulation_steps",
            "save_steps",
            "save_total_limit",
            "logging_steps",
            "window_stride",
            "num_threads",
            "validation_windows",
        )
        if small := [name for name in counts if getattr(self, name) < 1]:
            raise ConfigError(f"{', '.join(f'`{name}`' for name in small)} must be positive")
        if self.dataset_weights and (
            len(self.dataset_weights) != len(self.dataset) or min(self.dataset_weights) <= 0
        ):
            raise ConfigError(
                f"`dataset_weights` must be positive, one for each of {len(self.dataset)} datasets, got {self.dataset_weights}"
            )
        if self.keep_normalization and self.stats is not None:
            raise ConfigError(
                "`keep_normalization` and `stats` both say how to normalise: leave one of them out"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                f"`validation_fraction` must lie in [0, 1), got {self.validation_fraction}"
            )
        if self.gradient_checkpointing and self.compute_dtype == "bfloat16" and not self.compile:
            raise ConfigError(
                "uncompiled, `gradient_checkpointing` computes blocks anew when their bfloat16 weights are gone: compile them"
            )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"a batch of {self.batch_size} can't be computed in {self.gradient_accumulation_steps} equal parts"
            )


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """Sizes of the two experts; the defaults make the embedded policy."""

    patch_size: tuple[int, int, int] = (1, 1, 1)
    video_dim: int = 128
    video_ffn_dim: int = 512
    action_expert_dim: int = 96
    action_expert_ffn_dim: int = 384
    layers: int = 6
    heads: int = 4
    head_dim: int = 32
    text_dim: int = 64
    freq_dim: int = 64


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Training of a Fast-WAM on a LeRobot dataset."""

    pretrained_path: tuple[str | Path, ...] = ()
    """What to begin from, folders, Hub ids or "embedded:<name>": a policy, or the parts that `wam convert` made of raw Wan
    weights and of an action expert's; their sizes count, not `sizes`."""
    variant: VariantName = "fast"
    """What the actions see: the observed frame, the video being denoised ("joint"), or the finished video ("idm")."""
    pretrained_part: Literal["all", "video"] = "all"
    """What is taken of `pretrained_path`: everything, or only the video expert, out of which a new action expert is made."""
    trainable: Part = "all"
    """What is trained: everything, only the video expert, all but the video expert, only the layers that the robot's own
    numbers go through, or these and low-rank additions to every layer of the blocks, which are merged into checkpoints."""
    lora_rank: int = 16
    """Of the additions."""
    lora_alpha: float = 32.0
    """They are weighed by this over the rank."""
    model: SizeConfig = field(default_factory=SizeConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        lost = {"video": "action", "action": "video", "embodiment": "video"}.get(self.trainable)
        if lost is not None and getattr(self.loss, f"lambda_{lost}"):
            raise ConfigError(
                f"`trainable` {self.trainable!r} freezes the {lost} expert, whose loss would be lost: `--loss.lambda-{lost} 0`"
            )
        if self.lora_rank < 1:
            raise ConfigError(f"`lora_rank` must be positive, got {self.lora_rank}")
        if self.trainable != "all" and self.trainable != "video" and not self.pretrained_path:
            raise ConfigError(
                f"`trainable` {self.trainable!r} freezes weights nobody trained: say what to begin from, `--pretrained-path`"
            )
        if self.pretrained_part != "all" and not self.pretrained_path:
            raise ConfigError(
                f"`pretrained_part` {self.pretrained_part!r} of nothing: say what to begin from, `--pretrained-path`"
            )


@dataclass(frozen=True, kw_only=True)
class LightSizeConfig:
    """Sizes of what is trained beside the frozen video expert; the defaults make the embedded policy."""

    taps: tuple[int, ...] = (1, 3, 4)
    adapter_dim: int = 32
    lora_rank: int = 32
    lora_alpha: float = 64.0
    queries: int = 16
    pool_heads: int = 4
    layer_dim: int = 192
    trunk_dim: int = 384
    trunk_blocks: int = 1
    step_dim: int = 64
    video_pool: int = 2


@dataclass(frozen=True, kw_only=True)
class LightTrainConfig(RunConfig):
    """Training of a Light-WAM, on a frozen video expert, on a LeRobot dataset."""

    pretrained_path: str | Path
    """What holds the video expert, a folder, a Hub id or "embedded:<name>": a policy, or what `wam convert` made of raw Wan
    weights. A Light-WAM's own sizes count, not `sizes`."""
    model: LightSizeConfig = field(default_factory=LightSizeConfig)
    loss: LightLossConfig = field(default_factory=LightLossConfig)


AnyTrainConfig = TrainConfig | LightTrainConfig

DataT = TypeVar("DataT", bound=DataConfig)
