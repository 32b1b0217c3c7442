"""Damaged checkpoints of this package are refused, act as before, or fail their verification."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz_harness import Campaign, Outcome
from fuzz_mutations import damage_json, damaged_copies
from tiny import make_light_policy, make_observation, make_policy

from wam_policy import WAMPolicy
from wam_policy.config import Source
from wam_policy.errors import CheckpointError
from wam_policy.hub import checksums, weights
from wam_policy.models.encoders.text import PromptEmbeddings, untrained_encoder

CASES = 5200
KINDS = ("fast", "shards", "text", "light", "lean")


def save(kind: str, folder: Path) -> dict:
    """Save a policy of a kind, and return an observation for it."""
    if kind in ("light", "lean"):
        make_light_policy().save_pretrained(folder, form="lean" if kind == "lean" else None)
        return make_observation(side=32)
    policy = make_policy()
    if kind == "text":
        policy = make_policy(text=Source(subfolder="text"))
        encoder = untrained_encoder(["do: fly"], 8, 0)
        policy.prompts = PromptEmbeddings(
            policy.prompts.table, token_length=5, text_dim=8, load_encoder=lambda: encoder
        )
        policy.save_pretrained(folder)
        return make_observation(task="fly")
    policy.save_pretrained(folder)
    if kind == "shards":
        (folder / "model.safetensors").unlink()
        weights.write_weights(folder, policy.model.state_dict(), shard_bytes=4000)
        checksums.write(folder)
    return make_observation()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_checkpoint_acts_otherwise_unnoticed(tmp_path, kind):
    torch.set_num_threads(1)
    campaign = Campaign(f"checkpoints, {kind}", str(tmp_path / "log"))
    base = tmp_path / kind
    folder = tmp_path / "damaged"
    observation = save(kind, base)
    expected = WAMPolicy.from_pretrained(base).predict_chunk(observation)

    def judge() -> Outcome:
        """Act by the damaged checkpoint."""
        chunk = WAMPolicy.from_pretrained(folder).predict_chunk(observation)
        assert np.isfinite(chunk).all()
        if chunk.shape == expected.shape and np.array_equal(chunk, expected):
            return Outcome.EQUAL
        try:
            checksums.verify(folder)
        except CheckpointError:
            return Outcome.NOTICED
        return Outcome.SILENT

    entries = {".json": damage_json}
    copies = damaged_copies(base, folder, CASES // len(KINDS), random.Random(kind), entries)
    for i, (_, damage) in enumerate(copies):
        campaign.run(f"{i}: {damage.what}", judge)
    campaign.report()
