"""BatchNorm folded into the layer before it: the same function for inference in fewer passes."""

from collections.abc import Callable, Iterable
from copy import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

TOLERANCE = 1e-3


@torch.no_grad()
def fold_batch_norm(
    model: nn.Module, folds: Callable[[nn.Module], bool] = lambda _: True
) -> nn.Module:
    """Return a twin of the model for inference, equal to 1e-5.

    In it a convolution or linear layer has taken over the statistics of the BatchNorm that is
    known to be applied right after it: in an `nn.Sequential`, or where a module lists the two in
    `FOLDED`. The twin is in evaluation mode and cheap: everything else, it shares.

    Args:
        model: left as it is, its mode included. What it learns afterwards, the twin's folded
            layers do not see.
        folds: tells of which modules the children are folded.
    """
    twin = copy(model)
    twin.training = False
    twin._modules = {
        name: None if child is None else fold_batch_norm(child, folds)
        for name, child in model._modules.items()
    }
    for before, after in _in_order(model) if folds(model) else ():
        layer, norm = model._modules[before], model._modules[after]
        is_linear = type(layer) in (nn.Conv2d, nn.Linear)
        if is_linear and isinstance(norm, _BatchNorm) and norm.track_running_stats:
            fuse = fuse_linear_bn_weights if type(layer) is nn.Linear else fuse_conv_bn_weights
            statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            weight, bias = fuse(layer.weight, layer.bias, *statistics)
            twin._modules[before]._parameters = {"weight": weight, "bias": bias}
            twin._modules[after] = nn.Identity().eval()
    return twin


@torch.inference_mode()
def check_folding(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    """Compare what the folded model gives with what the model gives in evaluation mode.

    Args:
        run: calls a model, in float32.
    Raises:
        RuntimeError: they differ by more than `TOLERANCE` of the largest output; the text names
            the first module whose folding alone makes such a difference.
    """

    def changes(folds: Callable[[nn.Module], bool]) -> bool:
        off = (run(fold_batch_norm(model, folds)) - plain).abs().max()
        return bool(off > TOLERANCE * plain.abs().max())

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = run(fold_batch_norm(model, lambda _: False))
        if not changes(lambda _: True):
            return
        parts = [(name, part) for name, part in model.named_modules() if _in_order(part)]
        found = (name for name, part in parts if changes(lambda m, part=part: m is part))
        name = next(found, "several modules together")
    raise RuntimeError(
        f"folding BatchNorm changes what the model computes, at {name}: there it is not applied "
        "right after the layer before it; do not register the two in an nn.Sequential or in FOLDED"
    )


def _in_order(model: nn.Module) -> Iterable[tuple[str, str]]:
    """Return names of children of which the second is known to be applied after the first."""
    if type(model).forward is nn.Sequential.forward:
        return list(zip(model._modules, list(model._modules)[1:], strict=False))
    return getattr(model, "FOLDED", ())
