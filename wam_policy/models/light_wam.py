"""Light-WAM: a frozen video expert with LoRA and in-stream adapters, whose states a regression head turns into a chunk.

Source: spec/lightwam.md sections 1 and 3.
"""

# B batch, C latent channels, F latent frames, h w latent grid, L text tokens, T actions in a chunk, A numbers per action

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor, nn

from wam_policy.models.config import LightWAMConfig
from wam_policy.models.layers import FAST, KeyValue, Precision, append_proprio
from wam_policy.models.lora import attach
from wam_policy.models.mot import run
from wam_policy.models.state_fusion import StateFusionActionExpert, Taps
from wam_policy.models.video_dit import VideoDiT


class Adapter(nn.Module):
    """A residual bottleneck in the stream; new, it adds nothing."""

    def __init__(self, dim: int, inner: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.down_proj, self.up_proj = nn.Linear(dim, inner), nn.Linear(inner, dim)
        nn.init.zeros_(self.up_proj.weight)
        nn.init.zeros_(self.up_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, S, D] -> [B, S, D]."""
        return x + self.scale * self.up_proj(F.gelu(self.down_proj(self.norm(x)), approximate="tanh"))


class LightWAM(nn.Module):
    """The video expert with what adapts it, the action head and the proprio encoder."""

    def __init__(self, config: LightWAMConfig, precision: Precision = FAST) -> None:
        super().__init__()
        self.config, self.precision = config, precision
        self.video = VideoDiT(config, precision)
        if config.lora_rank:
            attach(self.video, config.lora_paths(), rank=config.lora_rank, alpha=config.lora_alpha)
        self.adapters = nn.ModuleDict(
            {str(tap): Adapter(config.video_dim, config.adapter_dim, config.adapter_scale) for tap in config.taps}
        )
        self.expert = StateFusionActionExpert(config)
        self.proprio_encoder = None if config.proprio_dim is None else nn.Linear(config.proprio_dim, config.text_dim)

    def context(self, prompt: Tensor, proprio: Tensor | None) -> Tensor:
        """Append the proprio token [B, P] to prompt embeddings [B, L, text_dim]."""
        return append_proprio(prompt, proprio, self.proprio_encoder)

    def _watch(self, latents: Tensor, t: Tensor, text: list[KeyValue], *, blocks: int | None) -> tuple[Tensor, Tensor, Taps]:
        """The stream after so many blocks [B, S, D], its time embedding, and what the taps before recorded."""
        frames, rows, columns = self.video.grid(latents)
        stream, embedding = self.video.stream(latents, t, text)
        taps: list[dict[str, Tensor]] = []

        def adapt(i: int, x: Tensor) -> Tensor:
            if str(i) not in self.adapters:
                return x
            adapted = self.adapters[str(i)](x)
            taps.append({"backbone": x, "adapted": adapted, "delta": adapted - x})
            return adapted

        x, _ = run(stream, first=rows * columns if frames > 1 else 0, after=adapt, blocks=blocks)
        return x, embedding, taps

    def states(self, first_frame: Tensor, text: list[KeyValue]) -> Taps:
        """What the taps record of the observation [B, C, 1, h, w]; blocks after the last tap are not run."""
        t = first_frame.new_zeros(len(first_frame), 1)
        return self._watch(first_frame, t, text, blocks=self.config.taps[-1] + 1)[2]

    def velocity(self, latents: Tensor, t: Tensor, text: list[KeyValue]) -> Tensor:
        """Velocity [B, C, F, h, w] of a pooled clip whose first frame is clean, at timesteps `t` [B] of the later frames."""
        t_frames = t.unsqueeze(1).repeat(1, latents.shape[2])
        t_frames[:, 0] = 0
        x, embedding, _ = self._watch(latents, t_frames, text, blocks=None)
        return self.video.read(x, embedding, self.video.grid(latents))

    def act(self, first_frame: Tensor, context: Tensor, horizon: int) -> Tensor:
        """Actions [B, horizon, A] for latents [B, C, 1, h, w] of the observation and `context` from `context()`."""
        return self.expert(self.states(first_frame, self.video.embed_text(context)), horizon)


def pool(latents: Tensor, factor: int) -> Tensor:
    """Average latents [B, C, F, h, w] over squares of `factor` latent pixels."""
    return F.avg_pool3d(latents, (1, factor, factor))
