"""The package equals the reference implementations on the recorded tensors."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wam_policy.models.layers.precision import REFERENCE

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("reference", HERE / "reference.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)


@pytest.mark.parametrize(
    "name", ["fastwam_dev", "lightwam_dev", "init_dev", "bf16_dev", "vae_dev", "text_dev", "io_dev"]
)
def test_every_recorded_tensor_is_within_tolerance(name, capsys):
    assert reference.main([str(HERE / "golden" / f"{name}.safetensors")]) == 0, (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("kind", "values"), [("fastwam", reference.fast_wam), ("lightwam", reference.light_wam)]
)
def test_the_reference_precision_gives_the_recorded_numbers_in_float32_too(kind, values):
    recorded = load_file(HERE / f"golden/{kind}_dev.safetensors")
    info = json.loads((HERE / f"golden/{kind}_dev.json").read_text())
    model = values.build(recorded, info, REFERENCE, torch.float32)
    if kind == "fastwam":
        ours = dict(values.inference(model, recorded, info["steps"]))
    else:
        ours = {"infer/action": values.actions(model, recorded, torch.float32, info["horizon"])}
    assert ours and all(
        reference.error(x, recorded[name]) <= reference.TOLERANCE for name, x in ours.items()
    )


def test_a_file_that_can_t_be_compared_fails_and_the_others_still_are(tmp_path, capsys):
    (tmp_path / "fastwam_x.safetensors").write_bytes(b"broken")
    assert (
        reference.main(
            [str(tmp_path / "fastwam_x.safetensors"), str(HERE / "golden/text_dev.safetensors")]
        )
        == 1
    )
    assert "2 of 2 tensors" in capsys.readouterr().out


def test_a_wrong_tensor_is_reported_and_fails(tmp_path, capsys):
    tensors = load_file(HERE / "golden/fastwam_dev.safetensors")
    tensors["fastwam/infer/action"][0, 0, 0] += 1e-3
    save_file(tensors, tmp_path / "wrong.safetensors")
    shutil.copy(HERE / "golden/fastwam_dev.json", tmp_path / "wrong.json")
    assert reference.main([str(tmp_path / "wrong.safetensors")]) == 1
    over = [line for line in capsys.readouterr().out.splitlines() if "OVER" in line]
    assert len(over) == 1 and over[0].endswith("fastwam/infer/action")


def test_a_model_without_proprio_and_with_other_steps_is_compared_too(tmp_path, capsys):
    """The recorded values are another model's: the numbers must fail, not the format."""
    tensors = load_file(HERE / "golden/fastwam_dev.safetensors")
    bare = {name: x for name, x in tensors.items() if "proprio" not in name}
    save_file(bare, tmp_path / "bare.safetensors")
    info = json.loads((HERE / "golden/fastwam_dev.json").read_text()) | {
        "proprio_dim": None,
        "steps": 4,
    }
    (tmp_path / "bare.json").write_text(json.dumps(info))
    assert reference.main([str(tmp_path / "bare.safetensors")]) == 1
    out = capsys.readouterr().out
    assert "OVER" in out and "nan" not in out and "of 72 tensors" in out


def test_a_file_with_nothing_to_compare_fails(tmp_path):
    save_file(
        {"in/x": load_file(HERE / "golden/fastwam_dev.safetensors")["in/action"]},
        tmp_path / "empty.safetensors",
    )
    assert reference.main([str(tmp_path / "empty.safetensors")]) == 1
