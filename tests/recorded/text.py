"""Our value of what a recorded UMT5 encoder feeds a policy."""

from collections.abc import Iterator
from typing import Any

import torch
from recorded.fast_wam import under
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from wam_policy.hub.foreign import key_mapping


@torch.no_grad()
def tensors(recorded: dict[str, Tensor], info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Our value of each recorded tensor."""
    config = UMT5Config(
        vocab_size=info["vocab"],
        d_model=info["dim"],
        d_kv=info["dim_attn"] // info["num_heads"],
        d_ff=info["dim_ffn"],
        num_layers=info["num_layers"],
        num_heads=info["num_heads"],
        relative_attention_num_buckets=info["num_buckets"],
    )
    model = UMT5EncoderModel(config).eval()
    weights = key_mapping.to_native(
        under(recorded, "weights/"), key_mapping.umt5(info["num_layers"])
    )
    model.load_state_dict(weights | {"encoder.embed_tokens.weight": weights["shared.weight"]})
    ids, mask = recorded["in/ids"], recorded["in/mask"]
    embedding = model(input_ids=ids, attention_mask=mask).last_hidden_state
    yield "embedding", embedding
    yield "context", embedding * mask.unsqueeze(-1)
