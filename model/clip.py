"""CLIP's modified ResNet and text transformer, made dense (CRIS Sec. 3.1).

B batch, C channels, H W map size, L tokens, D embedding width. Parameter names are OpenAI's, so
that CLIP archives and CRIS checkpoints load by name.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import made_once, product_type
from model.recompute import checkpointed

HEAD_WIDTH = 64  # channels per attention head, in CLIP's attention pool and text transformer


@dataclass(frozen=True)
class ClipSizes:
    """Every size that a CLIP with a ResNet image encoder is built from."""

    embed_dim: int  # of the space that images and sentences share
    image_resolution: int  # pixels a side that the attention pool's positions were trained at
    vision_layers: tuple[int, int, int, int]  # blocks in each of the four stages
    vision_width: int  # channels of the first stage before expansion
    context_length: int  # tokens
    vocab_size: int
    transformer_width: int
    transformer_heads: int
    transformer_layers: int


# Convolutions that a BatchNorm follows immediately, so that model/fold.py may fold it.
CONV_BN = tuple((f"conv{i}", f"bn{i}") for i in (1, 2, 3))


class Bottleneck(nn.Module):
    """Residual block whose convolutions keep stride 1; an average pool before conv3 strides."""

    expansion = 4
    FOLDED = CONV_BN

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample: nn.Sequential | None = None
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, 4·width, H/stride, W/stride)."""
        shortcut = x if self.downsample is None else self.downsample(self.pool(x))
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = self.bn3(self.conv3(self.pool(x)))
        return F.relu(x + shortcut, inplace=True)


class DenseAttentionPool(nn.Module):
    """CLIP's attention pool with every position as a query and no class token.

    The `connect` shortcut is CRIS's own, no archive holds it.
    """

    def __init__(self, grid: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.grid = grid
        self.num_heads = in_channels // HEAD_WIDTH
        # Row 0 belonged to CLIP's class token; it stays for the checkpoints' sake.
        self.positional_embedding = nn.Parameter(
            torch.randn(grid**2 + 1, in_channels) / in_channels**0.5
        )
        self.k_proj = nn.Linear(in_channels, in_channels)
        self.q_proj = nn.Linear(in_channels, in_channels)
        self.v_proj = nn.Linear(in_channels, in_channels)
        self.c_proj = nn.Linear(in_channels, out_channels)
        self.connect = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W)."""
        height, width = x.shape[-2:]
        table = self.positional_embedding[1:]
        positions = resizing_matrix(self.grid, height, width, table.dtype, table.device) @ table
        pixels = x.flatten(2).transpose(1, 2) + positions.to(x.dtype)
        q, k, v = (
            proj(pixels).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        pooled = self.c_proj(attended).transpose(1, 2).unflatten(2, (height, width))
        if x.device.type == "cpu":
            # BatchNorm's gradients go silently wrong there at batch 1 when they arrive with the
            # strides of permuted tokens (torch 2.13).
            pooled = pooled.contiguous()
        return F.relu(pooled + self.connect(x), inplace=True)


@made_once
def resizing_matrix(
    grid: int, height: int, width: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the bicubic weights from a square grid to a map: (1, H·W, grid²).

    A matrix, because CUDA's backward pass of bicubic interpolation is not deterministic.
    """
    cells = torch.eye(grid**2, dtype=dtype, device=device).view(1, -1, grid, grid)
    resized = F.interpolate(cells, (height, width), mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


class DenseResNet(nn.Module):
    """CLIP's image encoder, returning three maps instead of one vector.

    Args:
        sizes: of the CLIP; `embed_dim`, `image_resolution`, `vision_layers`, `vision_width` count.
        recompute: keep what enters stem, bottlenecks and attention pool alone, see `checkpointed`.
    """

    FOLDED = CONV_BN

    def __init__(self, sizes: ClipSizes, recompute: bool = False) -> None:
        super().__init__()
        width = sizes.vision_width
        self.recompute = recompute
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        channels = [width, *(width * 2**i * Bottleneck.expansion for i in range(4))]
        for i, blocks in enumerate(sizes.vision_layers):
            stage = [Bottleneck(channels[i], width * 2**i, stride=1 if i == 0 else 2)]
            stage += [Bottleneck(channels[i + 1], width * 2**i) for _ in range(blocks - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.attnpool = DenseAttentionPool(
            sizes.image_resolution // 32, channels[-1], sizes.embed_dim
        )

    def stem(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, width, S/4, S/4)."""
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        return self.avgpool(x)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode normalised images.

        Args:
            image: (B, 3, S, S) float; S a multiple of 32.
        Returns:
            C3 (B, 8·width, S/8, S/8), C4 (B, 16·width, S/16, S/16), C5 (B, embed_dim, S/32, S/32).
        """
        x = checkpointed(self.stem, image, recompute=self.recompute)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = checkpointed(block, x, recompute=self.recompute)
            maps.append(x)
        _, c3, c4, c5 = maps
        return c3, c4, checkpointed(self.attnpool, c5, recompute=self.recompute)


class QuickGELU(nn.Module):
    """The GELU approximation that CLIP was trained with: x·sigmoid(1.702x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, elementwise."""
        return x * torch.sigmoid(1.702 * x)


class TextBlock(nn.Module):
    """Pre-norm transformer layer of CLIP's text encoder."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x (B, L, D), hidden (L, L), -inf where a token is not seen -> (B, L, D)."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=hidden, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TextTransformer(nn.Module):
    """The stack of text layers; a module of its own only for CLIP's parameter names."""

    def __init__(self, width: int, layers: int, heads: int, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.resblocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D); a token sees itself and those before it."""
        hidden = causal_mask(x.shape[1], product_type(x), x.device)
        for block in self.resblocks:
            x = checkpointed(block, x, hidden, recompute=self.recompute)
        return x


@made_once
def causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what is added to attention: (L, L), -inf where a token comes later, 0 elsewhere."""
    return torch.full((length, length), -math.inf, dtype=dtype, device=device).triu(1)


class DenseCLIP(nn.Module):
    """CLIP with dense image features and per-token text features.

    Args:
        sizes: of both encoders.
        recompute: of both encoders, keep what enters each block alone, see `checkpointed`.
    """

    def __init__(self, sizes: ClipSizes, recompute: bool = False) -> None:
        super().__init__()
        width = sizes.transformer_width
        self.visual = DenseResNet(sizes, recompute)
        self.transformer = TextTransformer(
            width, sizes.transformer_layers, sizes.transformer_heads, recompute
        )
        self.token_embedding = nn.Embedding(sizes.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(sizes.context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, sizes.embed_dim))
        # CLIP's temperature: in every checkpoint, used by nothing here. Frozen, so that no
        # parameter is without a gradient (DistributedDataParallel would have to search for it).
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as CLIP was before its training (Radford et al. 2021, released code).

        With two exceptions, for the small models that are trained from scratch here. Residual
        branches start active, not at zero: there is a block a stage, and without its branch a
        stage is linear. Tokens and positions start as large as what the first layer adds to
        them (CLIP's: 0.02 and 0.01), or every token would be the mean of those before it.
        """
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        nn.init.normal_(self.positional_embedding, std=0.2)
        width = self.ln_final.normalized_shape[0]
        nn.init.normal_(self.text_projection, std=width**-0.5)
        depth = len(self.transformer.resblocks)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * width * depth) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * depth) ** -0.5)
        pool = self.visual.attnpool
        for proj in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
            nn.init.normal_(proj.weight, std=proj.in_features**-0.5)

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `DenseResNet.forward`."""
        return self.visual(image)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode sentences.

        Args:
            tokens: (B, L) int64 ids, padded with 0; the end token has the largest id.
        Returns:
            word_feats (B, L, transformer_width), unprojected, and sent_feat (B, embed_dim), the
            projected state at the end token.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        word_feats = self.ln_final(self.transformer(x))
        end = word_feats[torch.arange(tokens.shape[0], device=tokens.device), tokens.argmax(dim=-1)]
        return word_feats, end @ self.text_projection
