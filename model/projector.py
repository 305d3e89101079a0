"""The text-to-pixel projector: the sentence becomes a 3×3 kernel over the pixels (CRIS Sec. 3.3).

B batch, C channels, H W map size. The paper describes a dot product of a sentence vector with
each pixel; the released code, followed here, gives each sentence a 3×3 kernel and a bias.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import conv_bn_relu

KERNEL = 3


class Projector(nn.Module):
    """Upsamples the pixels to stride 4 and convolves them with the sentence's own kernel.

    Args:
        sent_dim: width of the sentence feature.
        in_channels: channels of the decoder's map; half as many are left at stride 4.
    """

    def __init__(self, sent_dim: int, in_channels: int) -> None:
        super().__init__()
        self.channels = in_channels // 2
        self.vis = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            conv_bn_relu(in_channels, in_channels, 3),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            conv_bn_relu(in_channels, self.channels, 3),
            nn.Conv2d(self.channels, self.channels, 1),
        )
        self.txt = nn.Linear(sent_dim, self.channels * KERNEL**2 + 1)

    def forward(self, vis: Tensor, sent_feat: Tensor) -> Tensor:
        """vis (B, C, H, W), sent_feat (B, D) -> logits (B, 1, 4H, 4W)."""
        pixels = self.vis(vis)
        kernel, bias = self.txt(sent_feat).split([self.channels * KERNEL**2, 1], dim=1)
        kernel = kernel.unflatten(1, (self.channels, KERNEL**2))
        return dynamic_conv(pixels, kernel, bias)


def dynamic_conv(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Convolve each sample with its own one-output kernel, zero-padded.

    One matrix product gives the response of every tap at every pixel, and `fold` moves each
    response to the pixel that it belongs to and adds: many times faster than a grouped
    convolution with as many groups as samples.

    Args:
        x: (B, C, H, W).
        kernel: (B, C, 9), taps row by row.
        bias: (B, 1).
    Returns:
        (B, 1, H, W).
    """
    # fold scatters a tap's response where convolution gathers it, hence the reversed taps.
    taps = torch.bmm(kernel.flip(2).transpose(1, 2), x.flatten(2))
    out = F.fold(taps, x.shape[-2:], KERNEL, padding=KERNEL // 2)
    return out + bias[:, :, None, None]
