"""Tests of the text slots and their cache."""

import pytest
import torch
import torch.nn.functional as F  # PyTorch's own name for it
from tiny import make_config

from wam_policy.inference.text_cache import TextCache
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.layers.precision import FAST
from wam_policy.models.registry import build_model


def make(tokens: list[int], dtype=torch.float64, length: int = 40):
    torch.manual_seed(0)
    model = build_model(make_config().model, FAST).to(dtype)
    table = {f"prompt {n}": torch.randn(n, 8) for n in tokens}
    return model, PromptEmbeddings(table, token_length=length, text_dim=8)


@pytest.mark.parametrize("room", [5, 7, 40])
@torch.no_grad()
def test_attention_to_the_slots_equals_attention_to_the_padded_prompt(room):
    model, prompts = make([5, 1])
    cache = TextCache(model, prompts, room)
    texts = cache.allocate_slots(2)
    cache.write_slots(cache.entries("prompt 5"), texts, 0)
    cache.write_slots(cache.entries("prompt 1"), texts, 1)
    token = torch.randn(2, 1, 8, dtype=torch.float64)
    padded = prompts.embed(["prompt 5", "prompt 1"], device=token.device, dtype=token.dtype)
    query = torch.randn(2, 2, 3, 12, dtype=torch.float64)
    for expert, text in zip((model.video, model.action), texts, strict=True):
        whole, own = expert.embed_text(torch.cat((padded, token), dim=1)), expert.embed_text(token)
        for slots, state, expected in zip(text.layers, own.layers, whole.layers, strict=True):
            slots.key[:, :, :1], slots.value[:, :, :1] = state.key, state.value
            found = F.scaled_dot_product_attention(query, *slots, attn_mask=text.bias)
            assert torch.allclose(
                found, F.scaled_dot_product_attention(query, *expected), atol=1e-10
            )


def test_a_prompt_without_padding_has_slots_that_nothing_looks_at():
    model, prompts = make([40])
    cache = TextCache(model, prompts, 40)
    texts = cache.allocate_slots(1)
    cache.write_slots(cache.entries("prompt 40"), texts, 0)
    assert texts[0].bias.isfinite().sum() == 1 + 40


def test_entries_are_computed_once(monkeypatch):
    model, prompts = make([5])
    cache, calls = TextCache(model, prompts, 5), []
    embed = type(model.video).embed_text
    monkeypatch.setattr(
        type(model.video), "embed_text", lambda self, x: (calls.append(1), embed(self, x))[1]
    )
    texts = cache.allocate_slots(2)
    cache.write_slots(cache.entries("prompt 5"), texts, 0)
    cache.write_slots(cache.entries("prompt 5"), texts, 1)
    assert len(calls) == 1 and torch.equal(texts[0].layers[0].key[0], texts[0].layers[0].key[1])


def test_a_new_embedding_of_a_known_prompt_is_a_new_entry():
    model, prompts = make([5])
    cache = TextCache(model, prompts, 5)
    old = cache.entries("prompt 5")
    assert cache.entries("prompt 5") is old
    prompts.put("prompt 5", torch.randn(4, 8))
    assert cache.entries("prompt 5") is not old


def test_not_more_entries_are_kept_than_there_is_room_for(monkeypatch):
    from wam_policy.inference import text_cache as text

    monkeypatch.setattr(text, "MAX_PROMPTS", 2)
    model, prompts = make([1, 2, 3])
    cache = TextCache(model, prompts, 5)
    first = cache.entries("prompt 1")
    for n in (2, 3):
        cache.entries(f"prompt {n}")
    assert len(cache._entries) == 2 and cache.entries("prompt 1") is not first
