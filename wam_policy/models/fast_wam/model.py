"""Fast-WAM: a video expert and an action expert that reads the video expert's keys and values.

Source: spec/fastwam.md section 2. How it is trained is in `objective`, how actions and frames are drawn from it in `sampling`.
"""

# B batch, C latent channels, F latent frames, h w latent grid, L text tokens, T actions in a chunk, A numbers per action

from __future__ import annotations

import torch
from torch import Tensor, nn

from wam_policy.models.config import FastWAMConfig
from wam_policy.models.fast_wam.action_dit import ActionDiT
from wam_policy.models.layers.attention import KeyValue
from wam_policy.models.layers.linear import Linear
from wam_policy.models.layers.mot import Stream, narrow_kv, run_blocks
from wam_policy.models.layers.precision import FAST, Precision
from wam_policy.models.layers.rope import action_rope
from wam_policy.models.layers.transformer import SharedText, Text, TimeEmbedding, append_proprio
from wam_policy.models.layers.video_dit import VideoDiT


class FastWAM(nn.Module):
    """The two experts and the proprio encoder; every variant has these and nothing else."""

    def __init__(self, config: FastWAMConfig, precision: Precision = FAST) -> None:
        super().__init__()
        self.config, self.precision = config, precision
        self.video = VideoDiT(config, precision)
        self.action = ActionDiT(config, precision)
        self.proprio_encoder = (
            None if config.proprio_dim is None else Linear(config.proprio_dim, config.text_dim)
        )

    def context(self, prompt: Tensor, proprio: Tensor | None) -> Tensor:
        """Append the proprio token [B, P] to prompt embeddings [B, L, text_dim]."""
        return append_proprio(prompt, proprio, self.proprio_encoder)

    def encode_clip(
        self, latents: Tensor, t: Tensor, text: Text | SharedText, *, decode: bool
    ) -> tuple[Tensor | None, list[KeyValue]]:
        """Run the video expert over a whole clip, whose first frame is the observation.

        Args:
            latents: [B, C, F, h, w], frame 0 clean.
            t: [B] timestep of the later frames.
            text: from `video.shared_text`.
            decode: False leaves the velocity out.

        Returns:
            The velocity [B, C, F, h, w] (None if not read), and the keys and values of all tokens, one pair per block.
        """
        frames, rows, columns = grid = self.video.grid(latents)
        time = self.video.embed_clip_time(t, frames)
        stream = self.video.stream(
            latents, self.video.shared_modulations(time), self.video.rope(latents), text
        )
        x, cache = run_blocks(
            stream, num_observed_tokens=rows * columns if frames > 1 else 0, need_output=decode
        )
        return self.video.decode(x, time.embedding, grid) if decode else None, cache

    def action_velocity(
        self,
        action: Tensor,
        time: TimeEmbedding,
        text: SharedText,
        context_kv: list[KeyValue],
        mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B, T, A] of noisy actions, which see each other and the video.

        Args:
            action: [B, T, A].
            time: of their timestep, from `action.embed_time`.
            text: from `action.shared_text`.
            context_kv: keys and values of the video, one pair per block.
            mask: see `mot.attend`.
        """
        rope = action_rope(
            action.shape[1], self.config.head_dim, action.device, self.precision.rope
        )
        tokens = self.action.action_encoder(action.to(self.action.action_encoder.weight.dtype))
        stream = Stream(self.action, tokens, self.action.shared_modulations(time), rope, text)
        x, _ = run_blocks(stream, (context_kv,), mask=mask, return_kv=False)
        return self.action.head(x)

    def forward(
        self,
        latents: Tensor,
        t_video: Tensor,
        action: Tensor,
        t_action: Tensor,
        context: Tensor,
        *,
        attend_video: bool = False,
        context_clip: tuple[Tensor, Tensor] | None = None,
        attend_full_video: Tensor | None = None,
        text_bias: Tensor | None = None,
        decode_video: bool = True,
        decode_actions: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predict both velocities of one training step.

        Args:
            latents: [B, C, F, h, w], frame 0 clean, the others noisy.
            t_video: [B] timestep of the noisy frames.
            action: [B, T, A] noisy actions.
            t_action: [B] their timestep.
            context: [B, L + 1, text_dim], from `context()`.
            attend_video: the actions see the whole clip, not only its first frame.
            context_clip: another copy of the clip and its timesteps, which the actions see in the clip's place.
            attend_full_video: bool [B], the samples whose actions see the whole clip; None: all of them.
            text_bias: of the context's first rows; see `DiT.shared_text`.
            decode_video: False leaves the video's velocity out.
            decode_actions: False leaves the actions' out.

        Returns:
            Video velocity [B, C, F, h, w] and action velocity [B, T, A], None where not read.
        """
        text, velocity = self.video.shared_text(context, text_bias), None
        cache: list[KeyValue] = []
        if not decode_actions:
            return self.encode_clip(latents, t_video, text, decode=decode_video)[0], None
        if decode_video or context_clip is None:
            velocity, cache = self.encode_clip(latents, t_video, text, decode=decode_video)
        if context_clip is not None:
            _, cache = self.encode_clip(*context_clip, text, decode=False)
        _, rows, columns = self.video.grid(latents)
        seen = cache if attend_video else narrow_kv(cache, rows * columns)
        mask = None
        if attend_full_video is not None:
            visible = torch.arange(seen[0].key.shape[2] + action.shape[1], device=action.device)
            later = (visible >= rows * columns) & (visible < seen[0].key.shape[2])
            mask = (attend_full_video.unsqueeze(1) | ~later)[:, None, None]
        time, text = (
            self.action.embed_time(t_action.unsqueeze(1)),
            self.action.shared_text(context, text_bias),
        )
        return velocity, self.action_velocity(action, time, text, seen, mask)
