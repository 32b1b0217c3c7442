"""The compiled training entry point: every block of a model compiled in place, its names as they were."""

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
    """Compile each block of a model in place, without graph breaks and for the shapes it meets; names of weights stay.

    Blocks of one expert share their code, so a deep model compiles as fast as a shallow one. Where no gradients are wanted the
    model computes as before, in any shape.

    Args:
        model: a Fast-WAM or a fat Light-WAM.
        backend: of `torch.compile`; None: blocks are not compiled.
        checkpointing: compute the inside of blocks anew on the way back instead of keeping it.

    Raises:
        CompileError: it has no blocks that can be trained.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise CompileError(
            "this model has no blocks to train: a lean checkpoint only acts, begin from a fat or slim one"
        )
    persist_compile_cache()
    learning = with_own_code(_anew if checkpointing else Block.block_forward)
    if backend is not None:
        learning = torch.compile(learning, backend=backend, fullgraph=True, dynamic=False)
    for block in blocks:
        block.set_train_forward(learning)
    return model


def _anew(block: Block, inputs: BlockInput) -> tuple[Tensor, KeyValue | None]:
    """`Block.block_forward`, whose inside is computed again on the way back; compiled as one, so that it is compiled once."""
    result: tuple[Tensor, KeyValue | None] = checkpoint(
        Block.block_forward, block, inputs, use_reentrant=False
    )
    return result
