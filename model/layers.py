"""The two compounds that neck and projector are made of."""

from torch import nn


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    """Convolution that keeps the map's size, BatchNorm, ReLU: keys `0` and `1`."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def linear_bn_relu(in_features: int, out_features: int) -> nn.Sequential:
    """Linear layer, BatchNorm over the batch, ReLU: keys `0` and `1`."""
    return nn.Sequential(
        nn.Linear(in_features, out_features, bias=False),
        nn.BatchNorm1d(out_features),
        nn.ReLU(inplace=True),
    )
