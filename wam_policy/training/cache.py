"""`wam cache`: encodes a dataset before a training run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from wam_policy.data.config import CacheConfig
from wam_policy.data.latent_cache import load_or_encode
from wam_policy.data.mixture import open_datasets
from wam_policy.data.windows import policy_windows
from wam_policy.hub import checkpoint
from wam_policy.training import initialization, resolve
from wam_policy.training.components import codec_folder, load_codec
from wam_policy.training.distributed import init_processes


def cache(config: CacheConfig) -> Path:
    """Encode the windows of a dataset into `config.cache`; those already there are skipped.

    Args:
        config: Options of the encoding.

    Returns:
        `config.cache`.

    Raises:
        DatasetError: The dataset is broken, or the cache holds other latents.
        ConfigError: No codec is named, an option contradicts the preset, or the device does not
            exist.
        CheckpointError: The policy or the codec does not exist.
        MissingExtraError: There are several processes and accelerate is not installed.
    """
    torch.set_num_threads(config.num_threads)
    with init_processes(config.device) as processes:
        # The first process downloads; the others then find the files.
        folder = None
        policy = None
        with processes.main_first():
            dataset = open_datasets(config)
            if config.pretrained_path is not None:
                folder = initialization.checkpoint_folder(config.pretrained_path)
                policy = checkpoint.read_config(folder)
            config = replace(config, codec=codec_folder(config, policy, folder))

        config = resolve.inherit_from_policy(config, policy)
        vae = load_codec(config, processes.device)
        cameras = resolve.camera_config(config, dataset, policy)
        load_or_encode(config, cameras, vae, dataset, policy_windows(dataset, config))
    return config.cache
