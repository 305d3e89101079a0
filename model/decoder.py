"""The vision-language decoder: pixels attend to pixels, then to the words (CRIS Sec. 3.2).

B batch, C channels, H W map size, L tokens. Pixels are a sequence of H·W positions, row by row.
Sequences have their positions first, as `nn.MultiheadAttention` computes.
"""

import math

import torch
from torch import Tensor, nn

from model.layers import LayerNorm, made_once, product_type
from model.recompute import checkpointed


class DecoderLayer(nn.Module):
    """Pre-norm self-attention over pixels, cross-attention to words, feed-forward.

    Unlike the usual layer, each attention's output and the hidden layer are normalised as well.
    """

    def __init__(self, channels: int, num_heads: int, dim_ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attn_norm = LayerNorm(channels)
        self.cross_attn_norm = LayerNorm(channels)
        self.self_attn = nn.MultiheadAttention(channels, num_heads, dropout)
        self.multihead_attn = nn.MultiheadAttention(channels, num_heads, dropout)
        self.ffn = nn.Sequential(
            nn.Linear(channels, dim_ffn),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            LayerNorm(dim_ffn),
            nn.Linear(dim_ffn, channels),
        )
        self.norm1 = LayerNorm(channels)
        self.norm2 = LayerNorm(channels)
        self.norm3 = LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, vis: Tensor, words: Tensor, vis_pos: Tensor, word_pos: Tensor, padding: Tensor
    ) -> Tensor:
        """vis (H·W, B, C), words (L, B, C), positions of each, padding (B, L) -> (H·W, B, C)."""
        x = self.norm1(vis)
        q = x + vis_pos
        x = self.self_attn(q, q, x, need_weights=False)[0]
        vis = vis + self.dropout(self.self_attn_norm(x))
        q = self.norm2(vis) + vis_pos
        x = self.multihead_attn(q, words + word_pos, words, padding, need_weights=False)[0]
        vis = vis + self.dropout(self.cross_attn_norm(x))
        return vis + self.dropout(self.ffn(self.norm3(vis)))


class Decoder(nn.Module):
    """A stack of `DecoderLayer`s and a last normalisation.

    Args:
        channels: of the map and of the words.
        dim_ffn: hidden width of the feed-forward part.
        dropout: probability, attention weights included.
        recompute: keep what enters each layer alone, see `model.recompute.checkpointed`.
    """

    def __init__(
        self,
        num_layers: int,
        channels: int,
        num_heads: int,
        dim_ffn: int,
        dropout: float,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.layers = nn.ModuleList(
            DecoderLayer(channels, num_heads, dim_ffn, dropout) for _ in range(num_layers)
        )
        self.norm = LayerNorm(channels)

    def forward(self, vis: Tensor, words: Tensor, pad_mask: Tensor) -> Tensor:
        """Let every pixel attend to the words.

        Args:
            vis: (B, C, H, W) float, neck output at stride 16.
            words: (B, L, C) float, token features including padding.
            pad_mask: (B, L) bool, True where the token is padding.
        Returns:
            (B, C, H, W), channels-last in memory.
        """
        _, channels, height, width = vis.shape
        dtype, device = vis.dtype, vis.device
        vis_pos = map_positions(height, width, channels, dtype, device)[:, None]
        word_pos = sequence_positions(words.shape[1], channels, dtype, device)[:, None]
        words = words.to(dtype).transpose(0, 1)
        padding = torch.zeros(pad_mask.shape, dtype=product_type(vis), device=device)
        padding.masked_fill_(pad_mask, -math.inf)
        # The sum through the layers stays in float32 whatever their products compute in.
        wide = torch.promote_types(dtype, torch.float32)
        x = vis.flatten(2).permute(2, 0, 1).to(wide, memory_format=torch.contiguous_format)
        for layer in self.layers:
            x = checkpointed(layer, x, words, vis_pos, word_pos, padding, recompute=self.recompute)
        pixels = self.norm(x).transpose(0, 1).contiguous()  # (B, H·W, C)
        return pixels.transpose(1, 2).unflatten(2, (height, width))


@made_once
def sequence_positions(
    length: int, channels: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Sine-cosine positions 0 … length-1: (length, channels), sine and cosine interleaved."""
    rates = torch.exp(
        torch.arange(0, channels, 2, device=device, dtype=torch.float32)
        * (-math.log(10000.0) / channels)
    )
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(dtype)


@made_once
def map_positions(
    height: int, width: int, channels: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Positions of a map, row by row: (H·W, channels); x in the first half, y in the second."""
    xs = sequence_positions(width, channels // 2, dtype, device)
    ys = sequence_positions(height, channels // 2, dtype, device)
    both = [xs[None].expand(height, -1, -1), ys[:, None].expand(-1, width, -1)]
    return torch.cat(both, dim=-1).flatten(0, 1)
