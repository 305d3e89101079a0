"""The training objective."""

import torch.nn.functional as F
from torch import Tensor


def resize_target(mask: Tensor, size: tuple[int, int], target: str = "nearest") -> Tensor:
    """Bring the ground truth to the logits' resolution.

    Args:
        mask: (B, 1, S, S) float in [0, 1], soft at its edges.
        size: (H, W) of the logits.
        target: "nearest" takes one pixel of each cell, as released; "area" the mean of the cell,
            which puts the referent's edge where it is (docs/scores.md).
    Returns:
        (B, 1, H, W) float in [0, 1].
    """
    return F.interpolate(mask, size, mode=target)


def text_to_pixel_loss(logits: Tensor, mask: Tensor, target: str = "nearest") -> Tensor:
    """Text-to-pixel contrastive loss (CRIS Sec. 3.3) as released: mean binary cross-entropy.

    Every pixel is a positive or a negative for its sentence's kernel.

    Args:
        logits: (B, 1, H, W), H and W a quarter of the mask's.
        mask: (B, 1, S, S) float in [0, 1].
        target: see `resize_target`.
    Returns:
        Scalar, float32 whatever the logits are.
    """
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(
        logits, resize_target(mask, logits.shape[-2:], target)
    )
