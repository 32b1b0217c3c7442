"""Trains a policy on a recorded dataset: latents are encoded once, then a plain loop over shuffled windows."""

from __future__ import annotations

import copy
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import nn

from wam_policy.config import Source
from wam_policy.hub import frozen
from wam_policy.hub.locate import Download
from wam_policy.models.text import Prompts, untrained_encoder
from wam_policy.policy import WAMPolicy
from wam_policy.training import family, start
from wam_policy.training.config import LightTrainConfig, TrainConfig
from wam_policy.training.examples import examples
from wam_policy.training.lerobot_reader import LeRobotDataset
from wam_policy.training.schedule import warm_cosine

logger = logging.getLogger(__name__)


@torch.no_grad()
def average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights a step towards the model's, where those are trained."""
    pairs = [(a, b) for a, b in zip(ema.parameters(), model.parameters(), strict=True) if b.requires_grad]
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)


def train(config: TrainConfig | LightTrainConfig) -> Path:
    """Train, and return the folder of the checkpoint. `curve.jsonl` holds the losses, averaged between its rows."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    dataset = LeRobotDataset(config.dataset)
    here = torch.device("cpu")
    codec = Source(subfolder=config.codec.name)
    vae = frozen.load_vae(codec, config.codec.parent, Download(), dtype=torch.float32, device=here)
    folders = config.init if isinstance(config, TrainConfig) else (config.init,)
    begin = start.read(*folders) if folders else None
    config = family.settled(config, begin)
    contract = family.contract(config, dataset, vae, begin)
    texts = sorted({contract.prompt.prompt(episode.task) for episode in dataset.episodes})
    prompts = Prompts(
        {},
        token_length=config.token_length,
        text_dim=contract.model.text_dim,
        encoder=lambda: untrained_encoder(texts, contract.model.text_dim, config.seed),
    )
    data = examples(config, contract, dataset, vae, prompts)
    batches = data.batches(config.batch_size, generator)
    model = family.new_model(contract, begin)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen_ones = {id(p): p for p in model.parameters() if not p.requires_grad}
    ema = copy.deepcopy(model, frozen_ones).requires_grad_(False)  # the frozen parameters are shared, not copied
    sizes = [sum(p.numel() for p in group) / 1e6 for group in (model.parameters(), trained)]
    logger.info("%d windows, %.2f M parameters, %.2f M of them trained", len(data.latents), *sizes)
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, config.steps, config.warmup))
    config.out.mkdir(parents=True, exist_ok=True)
    policy = WAMPolicy(contract, ema, vae=vae, prompts=prompts)
    sums, began = np.zeros(2), time.monotonic()
    with Progress() as progress, (config.out / "curve.jsonl").open("w") as curve:
        bar = progress.add_task("training", total=config.steps)
        for step in range(1, config.steps + 1):
            losses = family.losses(config, model, next(batches), generator)
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            nn.utils.clip_grad_norm_(trained, config.clip)
            optimizer.step()
            schedule.step()
            average(ema, model, min(config.ema, (1 + step) / (10 + step)))
            sums += losses.video.item(), losses.action.item()
            if step % 50 == 0 or step == config.steps:
                every = (step - 1) % 50 + 1
                row = {"step": step, "video": sums[0] / every, "action": sums[1] / every}
                row["seconds"] = round(time.monotonic() - began, 1)
                curve.write(json.dumps(row) + "\n")
                curve.flush()
                logger.info("%s", row)
                progress.update(bar, completed=step, description=f"video {row['video']:.3f} action {row['action']:.3f}")
                sums[:] = 0
            if step % config.save_every == 0 or step == config.steps:
                policy.save_pretrained(config.out / "checkpoint", dtype=torch.bfloat16)
    return config.out / "checkpoint"
