"""The frozen parts of a run: its prompt embeddings and its video codec."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from wam_policy.config import PolicyConfig, Source
from wam_policy.data.config import DataConfig
from wam_policy.data.mixture import Mixture
from wam_policy.errors import ConfigError
from wam_policy.hub import components as frozen
from wam_policy.hub.download import DownloadOptions
from wam_policy.hub.prompt_cache import PromptCache
from wam_policy.models.encoders.text import PromptEmbeddings, TextEncoder, untrained_encoder
from wam_policy.models.encoders.vae import VAE
from wam_policy.training.config import LightTrainConfig, TrainConfig
from wam_policy.training.initialization import InitWeights

logger = logging.getLogger(__name__)


def embed_prompts(
    config: TrainConfig | LightTrainConfig,
    contract: PolicyConfig,
    dataset: Mixture,
    begin: InitWeights | None,
) -> PromptEmbeddings:
    """The prompts of a dataset: as the weights a run begins from know them, else as their text encoder embeds them; and theirs.

    Where there is none, a small encoder with random weights makes embeddings that tell the sentences apart.

    Raises:
        CheckpointError: no text encoder where one was said to be.
        PromptError: no text encoder, and a cache of embeddings that lacks one.
    """
    wanted = sorted({contract.prompt.prompt(sentence) for sentence in dataset.instructions()})
    length, width, source = (
        contract.prompt.token_length,
        contract.model.text_dim,
        None if begin is None else begin.text,
    )
    theirs = {} if begin is None else begin.prompts
    known = {
        prompt: embedding.float()
        for prompt, embedding in theirs.items()
        if len(embedding) <= length
    }
    place = config.output_dir if begin is None else begin.root
    if config.text_encoder is not None:
        source, place = Source(subfolder=config.text_encoder.name), config.text_encoder.parent

    def encoder() -> TextEncoder:
        if source is not None:
            return frozen.load_text(
                source, place, DownloadOptions(), dtype=torch.float32, device=torch.device("cpu")
            )
        return untrained_encoder(wanted, width, config.seed)

    if (
        begin is not None
        and source is None
        and (new := [prompt for prompt in wanted if prompt not in known])
    ):
        logger.warning(
            "%s has no text encoder, and no embeddings of %s: they get new ones",
            begin.folder,
            "; ".join(new),
        )
    cache = None if config.prompt_cache is None else PromptCache(config.prompt_cache, length)
    unknown = cache is not None and source is None  # random embeddings don't go into a cache
    prompts = PromptEmbeddings(
        known,
        token_length=length,
        text_dim=width,
        encoder=None if unknown else encoder,
        cache=cache,
    )
    prompts.add(wanted)
    prompts.drop_encoder()
    check_distinct_prompts(prompts, wanted)
    return prompts


def check_distinct_prompts(prompts: PromptEmbeddings, wanted: Sequence[str]) -> None:
    """Refuse prompts of which nothing is left that tells them apart.

    Raises:
        ConfigError: two have the same embedding, as they were cut.
    """
    seen: dict[str, str] = {}
    for prompt in wanted:
        embedding = prompts.table[prompt]
        twin = seen.setdefault(
            hashlib.sha256(embedding.float().numpy().tobytes()).hexdigest(), prompt
        )
        if twin != prompt:
            raise ConfigError(
                f"{twin!r} and {prompt!r} have the same embedding: raise --token-length {prompts.token_length}"
            )
        if len(embedding) == prompts.token_length:
            logger.warning(
                "%r fills all %d tokens: it may have been cut, --token-length",
                prompt,
                prompts.token_length,
            )


def codec_folder(
    config: DataConfig, policy: PolicyConfig | None = None, folder: Path | None = None
) -> Path:
    """The folder of a run's codec: the one that is named, else that of the policy, and its folder, that it begins from.

    Raises:
        ConfigError: there is neither.
        CheckpointError: it can't be found.
    """
    if config.codec is not None:
        return config.codec
    if policy is None or folder is None:
        raise ConfigError(
            "which video codec? There is no policy to take it from: name its folder, --codec"
        )
    return frozen.component_folder(policy.vae, folder, DownloadOptions())


def load_codec(config: DataConfig, device: torch.device) -> VAE:
    """The codec of a run, in float32."""
    place = codec_folder(config)
    return frozen.load_vae(
        Source(subfolder=place.name),
        place.parent,
        DownloadOptions(),
        dtype=torch.float32,
        device=device,
    )
