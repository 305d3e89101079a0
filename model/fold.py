"""BatchNorm folded into the layer before it: the same function for inference in fewer passes."""

from collections.abc import Callable, Iterable
from copy import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

TOLERANCE = 1e-3


@torch.no_grad()
def fold_batch_norm(model: nn.Module, folds: bool = True) -> nn.Module:
    """Return a twin of the model for inference, equal to 1e-5.

    In it a convolution or linear layer has taken over the statistics of the BatchNorm that is
    known to be applied right after it: in an `nn.Sequential`, or where a module lists the two in
    `FOLDED`. The twin is in evaluation mode and cheap: everything else, it shares.

    Args:
        model: left as it is, its mode included. What it learns afterwards, the twin's folded
            layers do not see.
        folds: False gives a twin in evaluation mode and no more.
    """
    twin = copy(model)
    twin.training = False
    twin._modules = {
        name: None if child is None else fold_batch_norm(child, folds)
        for name, child in model._modules.items()
    }
    for before, after in _in_order(model) if folds else ():
        layer, norm = model._modules[before], model._modules[after]
        is_linear = type(layer) in (nn.Conv2d, nn.Linear)
        if is_linear and isinstance(norm, _BatchNorm) and norm.track_running_stats:
            twin._modules[before] = _fused(layer, norm)
            twin._modules[after] = nn.Identity().eval()
    return twin


@torch.inference_mode()
def check_folding(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    """Compare what the folded model gives with what the model gives in evaluation mode.

    Args:
        run: calls a model, in float32.
    Raises:
        RuntimeError: they differ by more than `TOLERANCE` of the largest output; the text names
            the first BatchNorm whose output does.
    """
    twins = fold_batch_norm(model, folds=False), fold_batch_norm(model)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        if not _differ(*map(run, twins)):
            return
        plain, folded = (_outputs(twin, run) for twin in twins)
    norms = [name for name, child in model.named_modules() if isinstance(child, _BatchNorm)]
    found = (n for n in norms if n in plain and n in folded and _differ(plain[n], folded[n]))
    raise RuntimeError(
        f"folding BatchNorm changes what the model computes, at {next(found, 'a module')}: there "
        "it is not applied right after the layer before it; do not register the two in an "
        "nn.Sequential or in FOLDED"
    )


def _outputs(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Return the last output of each module by name."""
    names = {id(child): name for name, child in model.named_modules()}
    found = {}

    def note(child: nn.Module, _: tuple, output: object) -> None:
        if id(child) in names and isinstance(output, Tensor):
            found[names[id(child)]] = output.clone()

    hook = register_module_forward_hook(note)
    try:
        run(model)
    finally:
        hook.remove()
    return found


def _differ(plain: Tensor, folded: Tensor) -> bool:
    return bool((plain - folded).abs().max() > TOLERANCE * plain.abs().max())


def _in_order(model: nn.Module) -> Iterable[tuple[str, str]]:
    """Return names of children of which the second is known to be applied after the first."""
    if type(model).forward is nn.Sequential.forward:
        return list(zip(model._modules, list(model._modules)[1:], strict=False))
    return getattr(model, "FOLDED", ())


def _fused(layer: nn.Conv2d | nn.Linear, norm: _BatchNorm) -> nn.Module:
    """Return the layer with the weights that do what the two did."""
    twin = copy(layer)
    twin.training = False
    fuse = fuse_conv_bn_weights if isinstance(layer, nn.Conv2d) else fuse_linear_bn_weights
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    weight, bias = fuse(layer.weight, layer.bias, *statistics)
    twin._parameters = {"weight": weight, "bias": bias}
    return twin
