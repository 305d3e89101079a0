"""Dropout whose draws are cheap on a CPU, where torch's take as long as a large matrix product.

torch draws a double for each value there, one after the other. Sixteen bits tell just as well what
is kept: four values a draw.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

LEVELS = 2**16  # of a draw: a probability is rounded to a multiple of 1 / LEVELS


class Dropout(nn.Dropout):
    """`nn.Dropout`, not in place, of a probability below 1; drawn by `draw_kept` on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, elementwise."""
        is_dense = not self.training or self.p == 0
        if is_dense or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        kept, share = draw_kept(x.shape, self.p)
        return (x * kept).mul_(1 / share)


def draw_kept(shape: Sequence[int], dropout: float) -> tuple[Tensor, float]:
    """Draw which values stay, on the CPU, with torch's generator.

    Args:
        dropout: probability of 0, in [0, 1).
    Returns:
        1 or 0 (uint8, which multiplies faster than bool), and the exact probability of 1: at
        least 1 / LEVELS, so that what stays can be divided by it.
    """
    count = math.prod(shape)
    dropped = min(round(dropout * LEVELS), LEVELS - 1)
    draws = torch.empty(-(-count // 4), dtype=torch.int64, device="cpu").random_(-(2**63), None)
    levels = draws.view(torch.int16)[:count]
    kept = torch.ge(levels, dropped - LEVELS // 2).view(torch.uint8)
    return kept.view(tuple(shape)), 1 - dropped / LEVELS
