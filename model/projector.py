"""The text-to-pixel projector: the sentence becomes a 3×3 kernel over the pixels (CRIS Sec. 3.3).

B batch, C channels, H W map size. The paper describes a dot product of a sentence vector with
each pixel; the released code, followed here, gives each sentence a 3×3 kernel and a bias.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import conv_bn_relu, made_once

KERNEL = 3


class UpsampleConv(nn.Sequential):
    """Upsamples ×2, then convolves, normalises and rectifies: keys `0` and `1`."""

    FOLDED = (("0", "1"),)

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(*conv_bn_relu(in_channels, out_channels, KERNEL))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, 2H, 2W)."""
        conv, *others = self
        x = upsample_conv(x, conv.weight, conv.bias)
        for layer in others:
            x = layer(x)
        return x


class Projector(nn.Module):
    """Upsamples the pixels to stride 4 and convolves them with the sentence's own kernel.

    Args:
        sent_dim: width of the sentence feature.
        in_channels: channels of the decoder's map; half as many are left at stride 4.
    """

    def __init__(self, sent_dim: int, in_channels: int) -> None:
        super().__init__()
        self.channels = in_channels // 2
        # Named as in the checkpoints, where upsampling has numbers 0 and 2.
        self.vis = nn.ModuleDict(
            {
                "1": UpsampleConv(in_channels, in_channels),
                "3": UpsampleConv(in_channels, self.channels),
                "4": nn.Conv2d(self.channels, self.channels, 1),
            }
        )
        self.txt = nn.Linear(sent_dim, self.channels * KERNEL**2 + 1)

    def forward(self, vis: Tensor, sent_feat: Tensor) -> Tensor:
        """vis (B, C, H, W), sent_feat (B, D) -> logits (B, 1, 4H, 4W).

        The last 1×1 convolution, being linear, is not run: its weights move into the kernel.
        """
        x = self.vis["3"](self.vis["1"](vis))
        pointwise = self.vis["4"]
        kernel, bias = self.txt(sent_feat).split([self.channels * KERNEL**2, 1], dim=1)
        kernel = kernel.unflatten(1, (self.channels, KERNEL**2)).transpose(1, 2)
        # In the order of channels last, as training stores it: so the gradient gets its strides.
        mixing = pointwise.weight.permute(0, 2, 3, 1).flatten(1)
        return dynamic_conv(x, kernel @ mixing, kernel @ pointwise.bias[:, None], bias)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 3×3 convolution (zero padding) of the map upsampled ×2 bilinearly.

    Both are linear, so the nine taps are applied first, at low resolution, as one matrix product
    with a quarter of the multiplications; then each tap's response is upsampled, shifted by its
    offset and added, rows first, then columns, which `resampling_matrix` does in one product each.

    Args:
        x: (B, C, H, W).
        weight: (O, C, 3, 3).
        bias: (O,).
    Returns:
        (B, O, 2H, 2W), channels-last in memory.
    """
    batch, _, height, width = x.shape
    out_channels = weight.shape[0]
    rows = resampling_matrix(height, x.dtype, x.device).flatten(1)  # (2H, 3·H): tap, source row
    columns = resampling_matrix(width, x.dtype, x.device)
    columns = columns.transpose(1, 2).flatten(1)  # (2W, W·3): source, tap
    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)  # (B·H·W, C), copied once or not at all
    # (3, C, 3·O): row tap; channel; column tap and output channel
    taps = weight.permute(2, 1, 3, 0).flatten(2).contiguous()
    # One product of two matrices a row tap: (B·H·W, C) @ (C, 3·O).
    responses = [(pixels @ tap).view(batch, height, -1) for tap in taps]
    tall = rows @ torch.cat(responses, dim=1)  # (B, 2H, W·3·O)
    tall = tall.view(-1, width * KERNEL, out_channels)  # (B·2H, W·3, O)
    if bias is None:
        out = columns @ tall  # (B·2H, 2W, O)
    else:
        out = torch.baddbmm(bias, columns.expand(tall.shape[0], -1, -1), tall)
    return out.unflatten(0, (batch, 2 * height)).permute(0, 3, 1, 2)


@made_once
def resampling_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One axis of "upsample ×2 bilinearly, then shift by -1, 0 or 1 with zeros coming in".

    Args:
        size: N, pixels before.
    Returns:
        (2N, 3, N): entry (i, k, j) is the weight of source j in pixel i + k - 1 of the upsampled
        axis, and 0 where that pixel lies outside.
    """
    identity = torch.eye(size, device=device)[None]
    upsampled = F.interpolate(identity, scale_factor=2, mode="linear", align_corners=False)[0].T
    padded = F.pad(upsampled, (0, 0, 1, 1))
    shifted = [padded[k : k + 2 * size] for k in range(KERNEL)]
    return torch.stack(shifted, dim=1).to(dtype)


def dynamic_conv(x: Tensor, kernel: Tensor, offset: Tensor, bias: Tensor) -> Tensor:
    """Convolve each sample with its own one-output kernel, zero-padded.

    One matrix product gives the response of every tap at every pixel, and `fold` moves each
    response to the pixel that it belongs to and adds: many times faster than a grouped
    convolution with as many groups as samples.

    Args:
        x: (B, C, H, W).
        kernel: (B, 9, C), taps row by row.
        offset: (B, 9, 1), added to a tap's response wherever there is a pixel under it.
        bias: (B, 1).
    Returns:
        (B, 1, H, W).
    """
    # fold scatters a tap's response where convolution gathers it, hence the reversed taps.
    responses = torch.baddbmm(offset.flip(1), kernel.flip(1), x.flatten(2))
    out = F.fold(responses, x.shape[-2:], KERNEL, padding=KERNEL // 2)
    return out + bias[:, :, None, None]
