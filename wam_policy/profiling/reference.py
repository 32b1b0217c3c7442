"""The forward pass as the references compute it, with any of the exact savings put in: what the fast one is measured against.

Here nothing is clever: the text's keys and values are computed in every pass, masks are passed where all is true, rotary
positions are complex float64 numbers, timesteps are embedded for every token, the codec is a 3-D network. Each saving is one
`if`. Source: spec/fastwam.md section 7, spec/lightwam.md section 7.
"""

# B batch, S tokens, L rows of a padded prompt, T actions in a chunk, D width

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor, nn

from wam_policy import sampling
from wam_policy.inference.weight_transforms import fuse_projections
from wam_policy.models import flow_matching
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.layers.attention import KeyValue
from wam_policy.models.layers.linear import Linear
from wam_policy.models.layers.lora import LoRALinear
from wam_policy.models.layers.rope import Rope, action_rope
from wam_policy.models.layers.text_padding import MIN_PADDING_SLOTS, padding_biases
from wam_policy.models.layers.transformer import Block, DiT, Text, modulate
from wam_policy.models.layers.video_dit import VideoDiT, embed_patches
from wam_policy.models.light_wam.action_head import QueryPooler
from wam_policy.models.light_wam.fold import fold_pooler, merge_lora
from wam_policy.models.light_wam.folded import LeanPooler
from wam_policy.models.light_wam.model import LightWAM
from wam_policy.policy import WAMPolicy

SHARED = {
    "text": "the text's keys and values once per instruction",
    "padding": "a prompt's padding as a few keys that count as often as there are rows",
    "modulations": "modulations of all timesteps once, not for every token and step",
    "masks": "no masks where all is true",
    "rope": "real rotary tables, made once",
    "fused": "projections of the same input as one product",
    "codec": "the codec of one picture as a 2-D network",
}
FAST = SHARED | {"last_layer": "the last video block ends with its keys and values"}
LIGHT = SHARED | {
    "last_tap": "no block after the last tap",
    "lora": "LoRA merged into the weights",
    "pooling": "pooling queries absorbed into one matrix of scores",
    "steps": "embeddings of a chunk's steps once",
}


def savings_of(policy: WAMPolicy) -> dict[str, str]:
    """The exact savings of a policy's family: name -> what it is."""
    return FAST if isinstance(policy.model, FastWAM) else LIGHT


T = TypeVar("T")


class Conditions(NamedTuple):
    """What one observation conditions the passes on."""

    prompt: Tensor  # [B, n, text_dim], the rows that are used
    proprio: Tensor | None  # [B, 1, text_dim]
    bias: Tensor | None  # [B, 1, 1, n + 1]


class ReferenceForward:
    """A policy's forward pass, one instruction for a whole batch, in the mode "first_frame"."""

    def __init__(
        self, policy: WAMPolicy, savings: Sequence[str] = (), horizon: int | None = None
    ) -> None:
        """Put a forward pass together.

        Args:
            policy: one whose model isn't lean.
            savings: what is saved, names of `savings_of(policy)`.
            horizon: actions per chunk; the default is the contract's.
        """
        self.policy, self.savings = policy, frozenset(savings)
        self.horizon = policy.chunk_length(horizon)
        self.model: FastWAM | LightWAM = policy.model
        if isinstance(self.model, LightWAM):
            assert self.model.config.lean_steps is None, "a lean Light-WAM has its savings built in"
            self.model = self._adapted(self.model)
        if "fused" in self:
            self.model = _fused(self.model)
        self._kept: dict[Any, Any] = {}

    def __contains__(self, saving: str) -> bool:
        return saving in self.savings

    def _adapted(self, model: LightWAM) -> LightWAM:
        """A Light-WAM with LoRA merged and poolers absorbed, where those are saved."""
        if not self.savings & {"lora", "pooling"}:
            return model
        model = copy.deepcopy(model)
        for path, layer in list(model.video.named_modules()):
            if "lora" in self and isinstance(layer, LoRALinear):
                weight, bias = merge_lora(layer)
                plain = Linear(layer.in_features, layer.out_features).to(layer.weight)
                plain.load_state_dict({"weight": weight, "bias": bias})
                model.video.set_submodule(path, plain)
        for poolers in model.expert.layer_poolers if "pooling" in self else ():
            assert isinstance(poolers, nn.ModuleDict)
            for source, pooler in list(poolers.items()):
                assert isinstance(pooler, QueryPooler)
                absorbed = LeanPooler(model.config).to(pooler.query_tokens)
                absorbed.load_state_dict(
                    dict(pooler.state_dict(), **dict(fold_pooler(pooler))), strict=False
                )
                poolers[source] = absorbed
        return model.eval()

    # -- stages --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] -> latents [B, C, 1, h, w]."""
        return (
            self.policy.vae.encode_first_frame(image)
            if "codec" in self
            else self.policy.vae.encode(image.unsqueeze(2))
        )

    @torch.no_grad()
    def prefill(
        self, first: Tensor, prompt: str, proprio: Tensor | None
    ) -> tuple[Conditions, Sequence[object]]:
        """Run the video expert over the observed latents: a Fast-WAM's keys and values, a Light-WAM's taps."""
        conditions, model = self._conditions(len(first), prompt, proprio), self.model
        taps: list[dict[str, Tensor]] = []
        cache: list[KeyValue] = []
        blocks = len(model.video.blocks)
        if isinstance(model, LightWAM):
            blocks = model.config.taps[-1] + 1 if "last_tap" in self else blocks
            taps, after = model.make_tap_recorder()
        x = embed_patches(model.video.patch_embedding, first)
        assert isinstance(model.video, VideoDiT)
        times = first.new_zeros(len(x), 1 if "modulations" in self else x.shape[1])
        modulations = self._modulations(model.video, times, "still")
        text, rope = (
            self._text(model.video, conditions, prompt),
            self._rope(model.video.rope(first)),
        )
        for i, block in enumerate(model.video.blocks[:blocks]):
            query, own = self._inputs(block, x, modulations[i], rope)
            cache.append(own)
            if "last_layer" in self and i == blocks - 1:
                break
            x = self._finish(block, x, query, own, modulations[i], text, i)
            x = after(i, x) if isinstance(model, LightWAM) else x
        return conditions, taps if isinstance(model, LightWAM) else cache

    @torch.no_grad()
    def act(
        self, conditions: Conditions, seen: Sequence[object], prompt: str, noise: Tensor | None
    ) -> Tensor:
        """Normalised actions [B, T, A]; `seen` is from `prefill`, the noise [B, T, A] a Fast-WAM's."""
        model = self.model
        if isinstance(model, LightWAM):
            steps = self._keep("steps", lambda: model.expert.step_embeddings(self.horizon))
            fused = model.expert.fuse_taps(seen)  # type: ignore[arg-type]  # a Light-WAM's are taps
            return model.expert.output(model.expert.output_norm(fused.unsqueeze(1) + steps))
        assert noise is not None
        action, expert = noise, model.action
        schedule = sampling.sampler_schedule(
            self.policy.config, model, self.policy.config.sampling.action_shift
        )
        for step, (t, delta) in enumerate(zip(*(x.unbind() for x in schedule), strict=True)):
            modulations = self._modulations(expert, t.expand(len(action), 1), f"step {step}")
            text = self._text(expert, conditions, prompt)
            x = expert.action_encoder(action.to(expert.action_encoder.weight.dtype))
            rope = self._rope(
                action_rope(self.horizon, model.config.head_dim, x.device, model.precision.rope)
            )
            for i, block in enumerate(expert.blocks):
                query, own = self._inputs(block, x, modulations[i], rope)
                pairs = zip(seen[i], own, strict=True)  # type: ignore[call-overload]
                both = KeyValue(*(torch.cat(pair, dim=2) for pair in pairs))
                x = self._finish(block, x, query, both, modulations[i], text, i)
            action = flow_matching.euler_step(action, expert.head(x), delta)
        return action

    # -- pieces --------------------------------------------------------------------------------------------------------

    def _keep(self, saving: str, make: Callable[[], T], key: Any = None) -> T:
        """What `make` gives, once if that is saved."""
        if saving not in self:
            return make()
        if (saving, key) not in self._kept:
            self._kept[saving, key] = make()
        return self._kept[saving, key]

    def _conditions(self, size: int, prompt: str, proprio: Tensor | None) -> Conditions:
        policy, dtype = self.policy, self.policy.dtype
        rows = policy.prompts.embed([prompt], device=policy.device, dtype=dtype)
        tokens, length = len(policy.prompts.table[prompt]), policy.prompts.token_length
        biases: list[float] | None = None
        if "padding" in self and tokens + MIN_PADDING_SLOTS < length:
            rows = rows.narrow(1, 0, tokens + MIN_PADDING_SLOTS)
            biases = (
                [0.0] * tokens
                + padding_biases(length - tokens, MIN_PADDING_SLOTS, dtype)
                + [0.0] * (proprio is not None)
            )
        token = None
        if proprio is not None:
            assert self.model.proprio_encoder is not None
            token = self.model.proprio_encoder(proprio).unsqueeze(1)
        bias = (
            None
            if biases is None
            else torch.tensor(biases, dtype=dtype, device=rows.device).expand(size, 1, 1, -1)
        )
        return Conditions(rows.expand(size, -1, -1), token, bias)

    def _text(self, expert: DiT, conditions: Conditions, prompt: str) -> Text:
        if "text" not in self:
            rows = [x for x in (conditions.prompt, conditions.proprio) if x is not None]
            return Text(expert.embed_text(torch.cat(rows, dim=1)).layers, conditions.bias)
        key = (id(expert), prompt, len(conditions.prompt))
        layers = self._keep("text", lambda: expert.embed_text(conditions.prompt).layers, key)
        token = conditions.proprio
        if token is not None:  # once per observation, not once per pass
            if self._kept.get(("observed", id(expert)), (None,))[0] is not token:
                pairs = zip(layers, expert.embed_text(token).layers, strict=True)
                both = [
                    KeyValue(*(torch.cat(x, dim=2) for x in zip(*pair, strict=True)))
                    for pair in pairs
                ]
                self._kept["observed", id(expert)] = (token, both)
            layers = self._kept["observed", id(expert)][1]
        return Text(layers, conditions.bias)

    def _modulations(self, expert: DiT, times: Tensor, key: str) -> list[Tensor]:
        return self._keep(
            "modulations",
            lambda: expert.modulations(expert.embed_time(times).modulation),
            (key, len(times)),
        )

    def _rope(self, rope: Rope) -> Rope | Tensor:
        """Tables as they are, or as complex numbers, made anew in every pass."""
        return rope if "rope" in self else torch.complex(rope.cos.double(), rope.sin.double())

    def _inputs(
        self, block: Block, x: Tensor, modulation: Tensor, rope: Rope | Tensor
    ) -> tuple[Tensor, KeyValue]:
        if isinstance(rope, Rope):
            return block.attention_inputs(x, modulation, rope)
        shift, scale = modulation.unbind(2)[:2]
        normed = F.layer_norm(x, x.shape[-1:], eps=block.eps)
        query, (key, value) = block.self_attn.query_key_value(modulate(normed, shift, scale))
        return _rotate_complex(query, rope), KeyValue(_rotate_complex(key, rope), value)

    def _finish(
        self,
        block: Block,
        x: Tensor,
        query: Tensor,
        own: KeyValue,
        modulation: Tensor,
        text: Text,
        i: int,
    ) -> Tensor:
        mask, bias = None, text.bias
        if "masks" not in self:
            mask = torch.ones(query.shape[2], own.key.shape[2], dtype=torch.bool, device=x.device)
            if bias is None:
                bias = torch.ones(
                    len(x),
                    1,
                    x.shape[1],
                    text.layers[i].key.shape[2],
                    dtype=torch.bool,
                    device=x.device,
                )
        attended = F.scaled_dot_product_attention(query, *own, attn_mask=mask)
        return block.finish_block(x, attended, modulation, text.layers[i], bias)


def _fused(model: FastWAM | LightWAM) -> FastWAM | LightWAM:
    """A twin with fused projections; those with LoRA can't be."""
    if isinstance(model, FastWAM):
        return fuse_projections(model)
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    assert isinstance(twin.video, VideoDiT)
    for block in twin.video.blocks:
        for attention, names in ((block.self_attn, "qkv"), (block.cross_attn, "kv")):
            if all(type(getattr(attention, name)) is Linear for name in names):
                attention.fuse(names)
    return twin.eval()


def _rotate_complex(x: Tensor, table: Tensor) -> Tensor:
    """Rotate [B, H, S, d] by complex numbers [S, d / 2], in float64."""
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * table
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
