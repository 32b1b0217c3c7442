"""Light-WAM: a frozen video expert with LoRA and in-stream adapters, whose states a regression head turns into a chunk.

Source: spec/lightwam.md sections 1 and 3.
"""

# B batch, C latent channels, F latent frames, h w latent grid, L text tokens, T actions in a chunk, A numbers per action

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor, nn

from wam_policy.models.config import LightWAMConfig
from wam_policy.models.layers.linear import Linear
from wam_policy.models.layers.lora import attach_lora
from wam_policy.models.layers.mot import run_blocks
from wam_policy.models.layers.precision import FAST, Precision
from wam_policy.models.layers.rope import Rope
from wam_policy.models.layers.transformer import SharedText, Text, append_proprio
from wam_policy.models.layers.video_dit import VideoDiT
from wam_policy.models.light_wam.action_head import StateFusionActionExpert, Taps
from wam_policy.models.light_wam.folded import LeanVideo


class Adapter(nn.Module):
    """A residual bottleneck in the stream; new, it adds nothing."""

    def __init__(self, dim: int, inner: int, scale: float, eps: float) -> None:
        super().__init__()
        self.scale = scale
        self.norm = nn.LayerNorm(dim, eps)
        self.down_proj, self.up_proj = Linear(dim, inner), Linear(inner, dim)
        nn.init.zeros_(self.up_proj.weight)
        nn.init.zeros_(self.up_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to tokens [B, S, D]."""
        return self.scale * self.up_proj(F.gelu(self.down_proj(self.norm(x)), approximate="tanh"))


class LightWAM(nn.Module):
    """The video expert with what adapts it, the action head and the proprio encoder."""

    def __init__(self, config: LightWAMConfig, precision: Precision = FAST) -> None:
        super().__init__()
        self.config, self.precision = config, precision
        self.video = (
            VideoDiT(config, precision)
            if config.lean_steps is None
            else LeanVideo(config, precision)
        )
        if config.lora_rank:
            attach_lora(
                self.video, config.lora_paths(), rank=config.lora_rank, alpha=config.lora_alpha
            )
        self.adapters = nn.ModuleDict(
            {
                str(tap): Adapter(
                    config.video_dim, config.adapter_dim, config.adapter_scale, config.eps
                )
                for tap in config.taps
            }
        )
        self.expert = StateFusionActionExpert(config)
        self.proprio_encoder = (
            None if config.proprio_dim is None else Linear(config.proprio_dim, config.text_dim)
        )

    def context(self, prompt: Tensor, proprio: Tensor | None) -> Tensor:
        """Append the proprio token [B, P] to prompt embeddings [B, L, text_dim]."""
        return append_proprio(prompt, proprio, self.proprio_encoder)

    def make_tap_recorder(self) -> tuple[list[dict[str, Tensor]], Callable[[int, Tensor], Tensor]]:
        """A list, and what adapts the tokens after each block and records the taps' features in that list."""
        taps: list[dict[str, Tensor]] = []

        def adapt(i: int, x: Tensor) -> Tensor:
            if str(i) not in self.adapters:
                return x
            delta = self.adapters[str(i)](x)
            taps.append({"backbone": x, "adapted": x + delta, "delta": delta})
            return taps[-1]["adapted"]

        return taps, adapt

    def tap_features(
        self, first_frame: Tensor, text: Text | SharedText, rope: Rope | None = None
    ) -> Taps:
        """What the taps record of the observation [B, C, 1, h, w]; blocks after the last tap are not run.

        Args:
            first_frame: its latents.
            text: from `video.embed_text`.
            rope: of its tokens; None: it is made.
        """
        taps, adapt = self.make_tap_recorder()
        rope = self.video.rope(first_frame) if rope is None else rope
        if isinstance(self.video, LeanVideo):
            assert isinstance(text, Text), "a lean model's text is kept"
            self.video.run_blocks(first_frame, rope, text, adapt)
            return taps
        still = self.video.embed_time(first_frame.new_zeros(1, 1))
        stream = self.video.stream(first_frame, self.video.shared_modulations(still), rope, text)
        run_blocks(stream, return_kv=False, after_block=adapt, num_blocks=self.config.taps[-1] + 1)
        return taps

    def velocity(self, latents: Tensor, t: Tensor, text: Text | SharedText) -> Tensor:
        """Velocity [B, C, F, h, w] of a pooled clip whose first frame is clean, at timesteps `t` [B] of the later frames."""
        assert isinstance(self.video, VideoDiT), "a lean model has no video head"
        frames, rows, columns = grid = self.video.grid(latents)
        time = self.video.embed_clip_time(t, frames)
        stream = self.video.stream(
            latents, self.video.shared_modulations(time), self.video.rope(latents), text
        )
        x, _ = run_blocks(
            stream,
            num_observed_tokens=rows * columns if frames > 1 else 0,
            return_kv=False,
            after_block=self.make_tap_recorder()[1],
        )
        return self.video.decode(x, time.embedding, grid)

    def predict_actions(self, first_frame: Tensor, context: Tensor, horizon: int) -> Tensor:
        """Actions [B, horizon, A] for latents [B, C, 1, h, w] of the observation and `context` from `context()`."""
        return self.expert(self.tap_features(first_frame, self.video.embed_text(context)), horizon)


def is_trainable(name: str) -> bool:
    """Whether the parameter of this name is trained; the rest, the video expert's trunk, is frozen.

    Source: spec/lightwam.md section 1.5.
    """
    return not name.startswith("video.") or name.startswith("video.head.") or ".lora_" in name


def pool_latents(latents: Tensor, factor: int) -> Tensor:
    """Average latents [B, C, F, h, w] over squares of `factor` latent pixels."""
    return F.avg_pool3d(latents, (1, factor, factor))
