"""Gradient checkpointing: activations that are computed again instead of being kept."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpointed(function: Callable, *inputs: Tensor, recompute: bool) -> Any:
    """`function(*inputs)`; with `recompute` only the inputs are kept for the backward pass.

    It then calls the function a second time, with the same dropout; outputs, gradients and
    BatchNorm's running statistics are what they are without.

    Args:
        function: a module or a method of one.
    """
    if not (recompute and torch.is_grad_enabled()):
        return function(*inputs)
    owner = getattr(function, "__self__", function)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _statistics_kept(owner)

    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let every BatchNorm below `module` count the batch into copies of its statistics.

    Without statistics at all it would save fewer tensors than the first time, which torch refuses.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        for name, value in buffers.items():
            setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, value in buffers.items():
                setattr(norm, name, value)
