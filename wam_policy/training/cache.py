"""`wam cache`: encodes a dataset before a training run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from wam_policy.data.config import CacheConfig
from wam_policy.data.encoded_dataset import windows_of
from wam_policy.data.latent_cache import encoded
from wam_policy.data.mixture import Mixture
from wam_policy.hub import checkpoint
from wam_policy.training import initialization, resolve
from wam_policy.training.components import codec_of, codec_place
from wam_policy.training.distributed import joined


def cache(config: CacheConfig) -> Path:
    """Encode a dataset's windows into `config.cache` and return it; what is there already isn't encoded again.

    Raises:
        DatasetError: the dataset is broken, or the cache holds other latents.
    """
    torch.set_num_threads(config.threads)
    dataset = Mixture(config.dataset, config.camera_map)
    with joined(config.device) as devices:
        with devices.first_alone():
            folder = None if config.init is None else initialization.folder_of(config.init)
            policy = None if folder is None else checkpoint.read_config(folder)
            config = replace(config, codec=codec_place(config, policy, folder))
        config = resolve.inherited(config, policy)
        vae = codec_of(config, devices.device)
        encoded(config, resolve.cameras(config, dataset, policy), vae, dataset, windows_of(config, dataset))
    return config.cache
