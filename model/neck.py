"""The cross-modal feature pyramid (CRIS Sec. 3.1, "Cross-modal Neck").

B batch, C channels, H W map size. `f3 f4 f5` follow the maps C3 C4 C5 at stride 8, 16, 32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import conv_bn_relu, made_once


class ImageFeatures(NamedTuple):
    """Hold what the neck needs of an image without a sentence: C3, C4, C5 after their projections.

    v3 (B, fpn_out[0], S/16, S/16), v4 (B, fpn_out[1], S/16, S/16), v5 (B, fpn_out[2], S/32, S/32).
    """

    v3: Tensor
    v4: Tensor
    v5: Tensor

    def repeat(self, image_index: Tensor) -> "ImageFeatures":
        """One row a sentence: row i is that of image `image_index[i]`."""
        return ImageFeatures(*(v.index_select(0, image_index) for v in self))


class CoordConv(nn.Module):
    """3×3 convolution that also sees each pixel's x and y in [-1, 1]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = conv_bn_relu(in_channels + 2, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        _, channels, height, width = x.shape
        conv, *others = self.conv1
        # Apart from the map: 2 more channels would cost it its alignment, and a copy.
        of_map, of_place = conv.weight.split([channels, 2], dim=1)
        places = coordinates(height, width, x.dtype, x.device)
        x = F.conv2d(x, of_map, conv.bias, padding=conv.padding)
        x = x + F.conv2d(places, of_place, padding=conv.padding)
        for layer in others:
            x = layer(x)
        return x


class Neck(nn.Module):
    """Fuses the three image maps with the sentence into one map at stride 16.

    Args:
        fpn_in: channels of C3, C4, C5.
        fpn_out: channels of the pyramid; the output has `fpn_out[1]`.
        sent_dim: width of the sentence feature.
    """

    def __init__(self, fpn_in: Sequence[int], fpn_out: Sequence[int], sent_dim: int) -> None:
        super().__init__()
        in3, in4, in5 = fpn_in
        out3, out4, out5 = fpn_out
        self.txt_proj = nn.Sequential(
            nn.Linear(sent_dim, out5, bias=False), nn.BatchNorm1d(out5), nn.ReLU(inplace=True)
        )
        self.f1_v_proj = conv_bn_relu(in5, out5, 1)
        self.norm_layer = nn.Sequential(nn.BatchNorm2d(out5), nn.ReLU(inplace=True))
        self.f2_v_proj = conv_bn_relu(in4, out4, 3)
        self.f2_cat = conv_bn_relu(out4 + out5, out4, 1)
        self.f3_v_proj = conv_bn_relu(in3, out3, 3)
        self.f3_cat = conv_bn_relu(out3 + out4, out4, 1)
        self.f4_proj5 = conv_bn_relu(out5, out4, 3)
        self.f4_proj4 = conv_bn_relu(out4, out4, 3)
        self.f4_proj3 = conv_bn_relu(out4, out4, 3)
        self.aggr = conv_bn_relu(3 * out4, out4, 1)
        self.coordconv = nn.Sequential(CoordConv(out4, out4), conv_bn_relu(out4, out4, 3))

    def project(self, c3: Tensor, c4: Tensor, c5: Tensor) -> ImageFeatures:
        """The part that needs no sentence, so that an image with ten of them pays it once."""
        v3 = F.avg_pool2d(self.f3_v_proj(c3), 2)
        return ImageFeatures(v3, self.f2_v_proj(c4), self.f1_v_proj(c5))

    def forward(self, features: ImageFeatures, sent_feat: Tensor) -> Tensor:
        """features of B images, sent_feat (B, D) -> (B, fpn_out[1], S/16, S/16)."""
        gate = self.txt_proj(sent_feat)[:, :, None, None]
        f5 = self.norm_layer(features.v5 * gate)
        f4 = self.f2_cat(torch.cat([features.v4, upsample(f5)], dim=1))
        f3 = self.f3_cat(torch.cat([features.v3, f4], dim=1))
        maps = [self.f4_proj3(f3), self.f4_proj4(f4), upsample(self.f4_proj5(f5))]
        return self.coordconv(self.aggr(torch.cat(maps, dim=1)))


@made_once
def coordinates(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return each pixel's x and y in [-1, 1]: (1, 2, H, W)."""
    xs = torch.linspace(-1, 1, width, device=device, dtype=dtype)
    ys = torch.linspace(-1, 1, height, device=device, dtype=dtype)
    return torch.stack(torch.meshgrid(xs, ys, indexing="xy"))[None]


def upsample(x: Tensor) -> Tensor:
    """Twice the size, bilinear, as everywhere in the model (align_corners=False)."""
    # Autocast gives float32, and would make what is joined with it float32 as well.
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False).to(x.dtype)
