"""Damaged files of other projects are refused, or load as before."""

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from foreign_files import (
    LIGHT,
    RELEASE,
    SIZES,
    lerobot,
    light_tensors,
    light_upstream,
    tensors,
    upstream,
)
from fuzz_harness import Campaign, Outcome
from fuzz_mutations import damage_document, damage_json, damaged_copies

from wam_policy import WAMPolicy
from wam_policy.presets import ReleaseInfo

CASES = 2100
KINDS = ("fast wam", "lerobot", "light wam")


def write(kind: str, folder: Path) -> tuple[Path, ReleaseInfo | None]:
    """Write a checkpoint of a kind, and return its path and what it does not record."""
    if kind == "lerobot":
        config = {"action_dit_config": {"attn_head_dim": SIZES.head_dim}}
        return lerobot(folder, tensors(), **config), None
    if kind == "light wam":
        release = ReleaseInfo(preset="libero", head_dim=LIGHT.head_dim)
        return light_upstream(folder, light_tensors()), release
    return upstream(folder, tensors()), RELEASE


def damage_yaml(path: Path, rng: random.Random) -> tuple[str, bool]:
    data = yaml.safe_load(path.read_text())
    done, is_plausible = damage_document(data, rng)
    path.write_text(yaml.safe_dump(data))
    return f"{path.name}: {done}", is_plausible


ENTRIES = {".json": damage_json, ".yaml": damage_yaml}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_file_of_another_project_loads_otherwise(tmp_path, kind):
    torch.set_num_threads(1)
    campaign = Campaign(f"foreign files, {kind}", str(tmp_path / "log"))
    base = tmp_path / "base"
    folder = tmp_path / "damaged"
    source, release = write(kind, base)
    policy = WAMPolicy.from_pretrained(source, release=release)
    weights = policy.model.state_dict()
    contract = json.loads(policy.config.to_json())
    copies = damaged_copies(base, folder, CASES // len(KINDS), random.Random(kind), ENTRIES)

    for i, (path, damage) in enumerate(copies):
        # Bits of numbers that no checksum covers, and valid numbers, cannot be told from others.
        is_plausible = damage.is_plausible
        if damage.kind == "bytes":
            is_plausible = path.suffix in (".safetensors", ".json", ".yaml")

        def judge(may_differ=is_plausible) -> Outcome:
            """Load the damaged file, and compare weights and contract."""
            place = folder / source.relative_to(base)
            loaded = WAMPolicy.from_pretrained(place, release=release)
            loaded.check_weights()
            state = loaded.model.state_dict()
            same_weights = state.keys() == weights.keys() and all(
                torch.equal(state[name], x) for name, x in weights.items()
            )
            same_contract = json.loads(loaded.config.to_json()) == contract
            if same_weights and same_contract:
                return Outcome.EQUAL
            return Outcome.PLAUSIBLE if may_differ else Outcome.SILENT

        campaign.run(f"{i}: {damage.what}", judge)
    campaign.report()
