"""Encoded windows are found again if they are exactly those, and refused if they aren't."""

import shutil
from dataclasses import replace

import pytest
import torch
from training_data import make_config

from wam_policy.data import latent_cache
from wam_policy.data.config import CacheConfig
from wam_policy.data.latent_cache import LatentShards, load_or_encode
from wam_policy.data.mixture import Mixture
from wam_policy.data.windows import policy_windows
from wam_policy.errors import DatasetError
from wam_policy.training import resolve
from wam_policy.training.cache import cache
from wam_policy.training.components import load_codec
from wam_policy.training.trainer import train


@pytest.fixture
def config(data, codec, tmp_path):
    shape = {"frame_stride": 1, "window_stride": 1, "num_threads": 1}
    return CacheConfig(dataset=(data,), codec=codec, cache=tmp_path / "cache", **shape)


def encode(config, vae=None):
    dataset, config = Mixture(config.dataset), resolve.inherit_from_policy(config, None)
    windows = policy_windows(dataset, config)
    return load_or_encode(
        config,
        resolve.camera_config(config, dataset),
        vae or load_codec(config, torch.device("cpu")),
        dataset,
        windows,
    )


class Nothing:
    """A codec that must not be asked."""

    def parameters(self):
        yield torch.zeros(())


def test_files_hold_what_memory_holds_and_are_found_again(config, monkeypatch):
    monkeypatch.setattr(latent_cache, "MIN_SHARD_WINDOWS", 10)
    memory = encode(replace(config, cache=None))
    assert cache(config) == config.cache
    assert sorted(path.name for path in config.cache.iterdir()) == [
        f"shard_{i:05}.safetensors" for i in range(3)
    ]
    found = encode(config, Nothing())  # nothing is encoded any more
    assert isinstance(found, LatentShards) and len(found) == len(memory) == 36
    index = torch.tensor([35, 0, 17, 17, 4])
    assert torch.equal(found[index], memory[index])


def test_an_encoding_that_was_killed_goes_on(config, monkeypatch):
    monkeypatch.setattr(latent_cache, "MIN_SHARD_WINDOWS", 10)
    cache(config)
    whole = encode(config, Nothing())[torch.arange(36)]
    last = config.cache / "shard_00002.safetensors"
    last.rename(last.with_name(last.name + ".partial"))
    before = (config.cache / "shard_00000.safetensors").stat().st_mtime_ns
    cache(config)
    assert (config.cache / "shard_00000.safetensors").stat().st_mtime_ns == before
    assert torch.equal(encode(config, Nothing())[torch.arange(36)], whole)


def test_a_cache_of_other_windows_is_refused(config):
    cache(config)
    with pytest.raises(DatasetError, match="another dataset, codec, canvas or stride: remove it"):
        cache(replace(config, window_stride=2))
    with pytest.raises(DatasetError, match="another dataset, codec, canvas or stride: remove it"):
        cache(replace(config, cameras=("wrist", "front")))
    (config.cache / "shard_00000.safetensors").write_bytes(b"broken")
    with pytest.raises(DatasetError, match="cannot be read"):
        cache(config)


@pytest.mark.parametrize("what", ["codec", "data"])
def test_a_cache_of_another_codec_or_changed_data_is_refused(config, tmp_path, what):
    cache(config)
    if what == "codec":
        other = replace(config, codec=shutil.copytree(config.codec, tmp_path / "codec"))
        file = next(other.codec.glob("*.safetensors"))
    else:
        data = shutil.copytree(config.dataset[0], tmp_path / "data")
        other = replace(config, dataset=(str(data),))
        cache(other)  # a copy elsewhere is the same data
        file = next(data.glob("videos/**/*.mp4"))
    file.write_bytes(file.read_bytes() + bytes(1) if what == "data" else _flipped(file))
    with pytest.raises(DatasetError, match="another dataset, codec, canvas or stride: remove it"):
        cache(other)


def _flipped(file):
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    return bytes(whole)


def test_a_run_from_the_cache_is_the_run_from_memory(config, codec, tmp_path):
    folders = [
        train(make_config(config.dataset[0], codec, tmp_path / name, cache=place, steps=3))
        for name, place in (("memory", None), ("first", config.cache), ("again", config.cache))
    ]
    first = (folders[0] / "model.safetensors").read_bytes()
    assert all((folder / "model.safetensors").read_bytes() == first for folder in folders[1:])


def test_a_camera_that_the_dataset_lacks_is_named(config):
    with pytest.raises(DatasetError, match=r"no camera 'top'"):
        cache(replace(config, cameras=("top",)))
