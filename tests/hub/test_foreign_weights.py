"""Weights of other people: names and kinds of tensors are right, or refused by name."""

import json
import zipfile

import pytest
import torch
from foreign_files import RELEASE, SIZES, lerobot, tensors, upstream
from safetensors.torch import save_file
from tiny import make_light_policy

from wam_policy import WAMPolicy
from wam_policy.errors import WeightsError
from wam_policy.hub.foreign import key_mapping, pickles

# -- names of tensors ------------------------------------------------------------------------------


def prefixed(mapping, prefix):
    return {prefix + name: x for name, x in mapping.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d | {"mot": prefixed(d["mot"], "_orig_mod.")},
        lambda d: d | {"proprio_encoder": prefixed(d["proprio_encoder"], "module.")},
        lambda d: {"model": d, "epoch": 3},
        lambda d: {"state_dict": {"module": d}},
        lambda d: (
            d
            | {
                "mot": {
                    name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): x
                    for name, x in prefixed(d["mot"], "_fsdp_wrapped_module.").items()
                }
            }
        ),
    ],
)
def test_names_of_wrapped_modules_are_stripped_wherever_they_stand(tmp_path, change):
    path = upstream(tmp_path, tensors())
    plain = WAMPolicy.from_pretrained(path, release=RELEASE, mmap=False).model.state_dict()
    torch.save(change(torch.load(path, weights_only=True)), path)
    wrapped = WAMPolicy.from_pretrained(path, release=RELEASE).model.state_dict()
    assert all(torch.equal(wrapped[name], x) for name, x in plain.items())


def test_a_tensor_under_two_names_with_two_values_is_refused(tmp_path):
    path = upstream(tmp_path, tensors())
    payload = torch.load(path, weights_only=True)
    encoder = payload["proprio_encoder"]
    payload["proprio_encoder"] = encoder | prefixed(
        {n: x + 1 for n, x in encoder.items()}, "module."
    )
    torch.save(payload, path)
    with pytest.raises(WeightsError, match="twice, with different values"):
        WAMPolicy.from_pretrained(path, release=RELEASE)


@pytest.mark.parametrize("number", ["7", "999999999999", "9" * 5000])
def test_numbers_of_blocks_are_counted_not_trusted(tmp_path, number):
    ours = tensors()
    ours[f"video.blocks.{number}.self_attn.q.weight"] = ours.pop(
        "video.blocks.1.self_attn.q.weight"
    )
    with pytest.raises(WeightsError, match=r"hold 3 blocks, but not number 2"):
        WAMPolicy.from_pretrained(upstream(tmp_path, ours), release=RELEASE)


# -- files of torch.save ---------------------------------------------------------------------------


def rewrite(path, change):
    """Write a zip archive anew, each entry as `change(name, content)` says."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content, compress_type=change(name))


def test_compressed_entries_are_read_right(tmp_path):
    path = upstream(tmp_path, tensors())
    plain = torch.load(path, weights_only=True)
    rewrite(path, lambda name: zipfile.ZIP_DEFLATED if "data/" in name else zipfile.ZIP_STORED)
    read = pickles.read_pickle(path)
    assert all(torch.equal(read["mot"][name], x) for name, x in plain["mot"].items())


def test_a_bit_that_is_flipped_in_a_tensor_is_noticed_by_the_checksum(tmp_path):
    path = upstream(tmp_path, tensors())
    data = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["proprio_encoder"]["weight"]
    at = data.index(weight.view(torch.uint8).numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"checksum of .* does not match"):
        WAMPolicy.from_pretrained(path, release=RELEASE)


def test_a_file_whose_checksums_were_turned_off_is_read(tmp_path):
    path = tmp_path / "weights.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(pickles.read_pickle(path)["a"], torch.ones(3))


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.ones(4, 4).to_sparse(), "layout torch.sparse_coo"),
        (torch.ones(4, 4, dtype=torch.complex64), "torch.complex64"),
        (torch.ones(1).expand(10**6), "of fewer numbers"),
        (torch.empty(3, device="meta"), "on meta"),
        (torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "torch.qint8"),
    ],
)
def test_tensors_of_other_kinds_are_refused_by_name(tmp_path, tensor, match):
    path = upstream(tmp_path, tensors())
    payload = torch.load(path, weights_only=True)
    payload["mot"]["extra"] = tensor
    torch.save(payload, path)
    with pytest.raises(WeightsError, match=rf"extra is .*{match}|cannot be read"):
        WAMPolicy.from_pretrained(path, release=RELEASE)


# -- adapters --------------------------------------------------------------------------------------


def write_adapter(folder, base, ours, *, trained=(), **config):
    """Write a LoRA in LeRobot's layout for two layers, and return the merged weights."""
    folder.mkdir()
    content = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 6.0}
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    torch.manual_seed(1)
    names = key_mapping.lerobot(SIZES.layers)
    adapter = {}
    merged = {name: x.clone().float() for name, x in ours.items()}
    for path in ("video.blocks.0.self_attn.q", "action.blocks.1.ffn.0"):
        rows, columns = ours[f"{path}.weight"].shape
        down, up = torch.randn(2, columns), torch.randn(rows, 2)
        foreign = next(iter(key_mapping.from_native({f"{path}.": 0}, names)))
        adapter[f"base_model.model.{foreign}lora_A.weight"] = down
        adapter[f"base_model.model.{foreign}lora_B.weight"] = up
        merged[f"{path}.weight"] += 3.0 * up @ down
    for name in trained:
        merged[name] = torch.randn(ours[name].shape)
        (foreign,) = key_mapping.from_native({name: 0}, names)
        adapter[f"base_model.model.{foreign}"] = merged[name]
    save_file(adapter, folder / "adapter_model.safetensors")
    return merged


def test_an_adapter_is_merged_into_its_base(tmp_path):
    ours = tensors(torch.float32)
    base = lerobot(tmp_path / "base", ours)
    trained = ("action.head.weight",)
    merged = write_adapter(tmp_path / "adapter", base, ours, trained=trained)
    policy = WAMPolicy.from_pretrained(tmp_path / "adapter", dtype="float32")
    state = policy.model.state_dict()
    assert state.keys() == merged.keys()
    assert all(torch.allclose(state[name].float(), x, atol=1e-5) for name, x in merged.items())
    assert same_file(base, ours)


def same_file(folder, ours):
    """Whether the base's file still holds its own weights."""
    stored = WAMPolicy.from_pretrained(folder, dtype="float32").model.state_dict()
    return all(torch.equal(stored[name], x) for name, x in ours.items())


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"base_model_name_or_path": "lab/base"}, "an adapter .* of 'lab/base', which cannot be"),
        ({"base_model_name_or_path": None}, "names no base"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias 'all'"),
        ({"r": 0}, "rank 0"),
        ({"r": "2"}, "expected int"),
        ({"r": 3}, "does not fit its base"),
    ],
)
def test_an_adapter_that_cannot_be_merged_says_how_to(tmp_path, monkeypatch, config, match):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ours = tensors(torch.float32)
    base = lerobot(tmp_path / "base", ours)
    write_adapter(tmp_path / "adapter", base, ours, **config)
    with pytest.raises(WeightsError, match=rf"(?s){match}.*merge_and_unload"):
        WAMPolicy.from_pretrained(tmp_path / "adapter")


def test_an_adapter_of_other_layers_is_refused(tmp_path):
    ours = tensors(torch.float32)
    write_adapter(tmp_path / "adapter", make_light_base(tmp_path), ours)
    with pytest.raises(WeightsError, match="layers that its base does not have"):
        WAMPolicy.from_pretrained(tmp_path / "adapter")


def make_light_base(tmp_path):
    return make_light_policy().save_pretrained(tmp_path / "light")
