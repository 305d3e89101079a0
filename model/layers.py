"""What several parts of the model are made of."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Sums in float32 and returns the type of the products that follow.

    Autocast on CUDA would copy a half input to float32, keep that, and return float32, which each
    product casts back.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose last axes are normalised -> the same."""
        if not _is_autocast(x):
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return y.to(product_type(x))


def product_type(x: Tensor) -> torch.dtype:
    """Return the type in which a product with `x` computes: autocast's, or its own."""
    return torch.get_autocast_dtype(x.device.type) if _is_autocast(x) else x.dtype


def _is_autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def made_once(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep each table that a function of sizes, type and device makes.

    On a GPU making one takes more launches than its use. A traced program makes its own.
    """
    made = cache(make)

    @wraps(make)
    def get(*args: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return make(*args)
        with torch.inference_mode(False), torch.no_grad():
            return made(*args)

    get.cache_clear = made.cache_clear
    return get


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    """Convolution that keeps the map's size, BatchNorm, ReLU: keys `0` and `1`."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
