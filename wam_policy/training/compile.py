"""Compilation of a model for training: every block in place, so that names of weights stay.

See docs/method.md, "Exact savings".
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wam_policy.errors import CompileError
from wam_policy.models.layers.attention import KeyValue
from wam_policy.models.layers.transformer import Block, BlockInput
from wam_policy.utils.compiler import Backend, persist_compile_cache, with_own_code

ModelT = TypeVar("ModelT", bound=nn.Module)


def compile_training(
    model: ModelT, *, backend: Backend | None = "inductor", checkpointing: bool = False
) -> ModelT:
    """Compile each block of a model in place, without graph breaks and for static shapes.

    The blocks of one expert share their compiled code, so compile time does not grow with depth.
    Without gradients the model runs uncompiled, in any shape.

    Args:
        model: A Fast-WAM or a fat Light-WAM; changed.
        backend: Backend of `torch.compile`; None leaves the blocks uncompiled.
        checkpointing: Recompute the activations inside blocks in the backward pass.

    Returns:
        The same model.

    Raises:
        CompileError: The model has no blocks that can be trained.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise CompileError(
            "this model has no blocks to train: a lean checkpoint can only act, start from a fat "
            "or slim one"
        )

    # Compiled code is cached on the disk, and shared by all blocks of the same sizes.
    persist_compile_cache()
    forward = with_own_code(_checkpointed_forward if checkpointing else Block.block_forward)
    if backend is not None:
        forward = torch.compile(forward, backend=backend, fullgraph=True, dynamic=False)
    for block in blocks:
        block.set_train_forward(forward)
    return model


def _checkpointed_forward(block: Block, inputs: BlockInput) -> tuple[Tensor, KeyValue | None]:
    """Run `Block.block_forward`, whose activations the backward pass recomputes.

    Compiled as a whole, so that the compiler sees both passes at once.
    """
    result: tuple[Tensor, KeyValue | None] = checkpoint(
        Block.block_forward, block, inputs, use_reentrant=False
    )
    return result
