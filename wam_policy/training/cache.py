"""`wam cache`: encodes a dataset before a training run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from wam_policy.data.config import CacheConfig
from wam_policy.data.encoded_dataset import windows_of
from wam_policy.data.latent_cache import load_or_encode
from wam_policy.data.mixture import Mixture
from wam_policy.hub import checkpoint
from wam_policy.training import initialization, resolve
from wam_policy.training.components import codec_folder, load_codec
from wam_policy.training.distributed import init_processes


def cache(config: CacheConfig) -> Path:
    """Encode a dataset's windows into `config.cache` and return it; what is there already isn't encoded again.

    Raises:
        DatasetError: the dataset is broken, or the cache holds other latents.
    """
    torch.set_num_threads(config.num_threads)
    dataset = Mixture(config.dataset, config.camera_map)
    with init_processes(config.device) as devices:
        with devices.main_first():
            folder = (
                None
                if config.pretrained_path is None
                else initialization.checkpoint_folder(config.pretrained_path)
            )
            policy = None if folder is None else checkpoint.read_config(folder)
            config = replace(config, codec=codec_folder(config, policy, folder))
        config = resolve.inherit_from_policy(config, policy)
        vae = load_codec(config, devices.device)
        load_or_encode(
            config,
            resolve.camera_config(config, dataset, policy),
            vae,
            dataset,
            windows_of(config, dataset),
        )
    return config.cache
