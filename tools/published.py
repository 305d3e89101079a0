"""CRIS as the paper's release formulates it, in plain code: what speed is compared with.

Nothing trains or predicts with this. It has the modules, and so the names and weights, of
`model.segmenter.Segmenter`, and computes the same numbers (tests/model/test_golden.py) the long
way: every sentence encodes its image anew, alone in its batch, in NCHW; the projector upsamples
before it convolves; each sentence's kernel is a group of a convolution; attention returns its
weights; post-processing waits for the network and the network for it. CLIP's blocks and the
geometry are the release's here too.

B batch, C channels, H W map size, L tokens, D embedding width, S side of the network's input.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from model.decoder import map_positions, sequence_positions
from model.loss import resize_target, text_to_pixel_loss
from model.neck import coordinates
from model.segmenter import Segmenter
from utils.metrics import intersection_and_union, training_scores
from utils.records import RecordReader, RefRecord
from utils.tokenizer import tokenize
from utils.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    PROTOCOLS,
    load_image,
    load_mask,
    load_square_mask,
    restore_size,
    upsample_probability,
)


class Published(nn.Module):
    """The network, of a segmenter's modules. `model(image, tokens)` -> logits (B, 1, S/4, S/4)."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.backbone = segmenter.backbone
        self.neck = segmenter.neck
        self.decoder = segmenter.decoder
        self.proj = segmenter.proj
        self.to(memory_format=torch.contiguous_format)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """image (B, 3, S, S), tokens (B, L)."""
        return self.stages(image, tokens)["logits"]

    def stages(self, image: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Return what the golden files describe: the maps, the text, neck, decoder, logits."""
        visual = self.backbone.visual
        c3 = visual.layer2(visual.layer1(visual.stem(image)))
        c4 = visual.layer3(c3)
        c5 = pool_densely(visual.attnpool, visual.layer4(c4))
        words, state = self.backbone.encode_text(tokens)
        fused = fuse(self.neck, c3, c4, c5, state)
        pixels = decode(self.decoder, fused, words, tokens == 0)
        logits = project(self.proj, pixels, state)
        maps = {"c3": c3, "c4": c4, "c5": c5, "words": words, "state": state}
        return maps | {"neck": fused, "decoder": pixels, "logits": logits}


# ------------------------------------------------------------------------------------------ network


def pool_densely(pool: nn.Module, x: Tensor) -> Tensor:
    """CLIP's attention pool with all positions as queries, plus the shortcut `connect`."""
    _, channels, height, width = x.shape
    grid = pool.positional_embedding[1:].reshape(1, pool.grid, pool.grid, channels)
    grid = F.interpolate(
        grid.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=False
    )
    tokens = (x + grid).flatten(2).permute(2, 0, 1)  # (H·W, B, C)
    heads = [
        proj(tokens).unflatten(2, (pool.num_heads, -1)).permute(1, 2, 0, 3)
        for proj in (pool.q_proj, pool.k_proj, pool.v_proj)
    ]  # (B, heads, H·W, C / heads)
    attended = F.scaled_dot_product_attention(*heads).permute(2, 0, 1, 3).flatten(2)
    attended = pool.c_proj(attended).permute(1, 2, 0).reshape(len(x), -1, height, width)
    return F.relu(attended + pool.connect(x))


def fuse(neck: nn.Module, c3: Tensor, c4: Tensor, c5: Tensor, state: Tensor) -> Tensor:
    """The pyramid: three maps and the state -> one map at stride 16."""
    gate = neck.txt_proj(state)[:, :, None, None]
    f5 = neck.norm_layer(neck.f1_v_proj(c5) * gate)
    f4 = neck.f2_cat(torch.cat([neck.f2_v_proj(c4), twice(f5)], dim=1))
    f3 = F.avg_pool2d(neck.f3_v_proj(c3), 2)
    f3 = neck.f3_cat(torch.cat([f3, f4], dim=1))
    f5 = twice(neck.f4_proj5(f5))
    x = neck.aggr(torch.cat([neck.f4_proj3(f3), neck.f4_proj4(f4), f5], dim=1))
    batch, _, height, width = x.shape
    places = coordinates(height, width, x.dtype, x.device).expand(batch, -1, -1, -1)
    first, second = neck.coordconv
    return second(first.conv1(torch.cat([x, places], dim=1)))


def twice(x: Tensor) -> Tensor:
    """Bilinear, twice the size."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def decode(decoder: nn.Module, x: Tensor, words: Tensor, pad_mask: Tensor) -> Tensor:
    """Pixels attend to pixels and to the words; every attention hands out its weights."""
    batch, channels, height, width = x.shape
    word_pos = sequence_positions(words.shape[1], channels, words.dtype, x.device)[:, None]
    map_pos = map_positions(height, width, channels, x.dtype, x.device)[:, None]
    x, words = x.flatten(2).permute(2, 0, 1), words.transpose(0, 1)
    norm = nn.LayerNorm.forward  # torch's own, not that of model/layers.py
    for layer in decoder.layers:
        y = norm(layer.norm1, x)
        y, _weights = layer.self_attn(y + map_pos, y + map_pos, y)
        x = x + layer.dropout(norm(layer.self_attn_norm, y))
        y = norm(layer.norm2, x)
        y, _weights = layer.multihead_attn(
            y + map_pos, words + word_pos, words, key_padding_mask=pad_mask
        )
        x = x + layer.dropout(norm(layer.cross_attn_norm, y))
        first, relu, dropout, ffn_norm, second = layer.ffn
        hidden = dropout(relu(first(norm(layer.norm3, x))))
        x = x + layer.dropout(second(norm(ffn_norm, hidden)))
    return norm(decoder.norm, x).permute(1, 2, 0).reshape(batch, channels, height, width)


def project(proj: nn.Module, x: Tensor, state: Tensor) -> Tensor:
    """Upsample, convolve, twice; then a convolution with a group, and so a kernel, a sample."""
    for name in ("1", "3"):
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        for layer in proj.vis[name]:
            x = layer(x)
    x = proj.vis["4"](x)
    batch, channels, height, width = x.shape
    numbers = proj.txt(state)
    kernel = numbers[:, :-1].reshape(batch, channels, 3, 3)
    x = x.reshape(1, batch * channels, height, width)
    logits = F.conv2d(x, kernel, numbers[:, -1], padding=1, groups=batch)
    return logits.transpose(0, 1)


# ----------------------------------------------------------------------------------------- training


def train_step(
    model: nn.Module,
    optimizer: optim.Optimizer,
    image: Tensor,
    mask: Tensor,
    tokens: Tensor,
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype,
) -> float:
    """One step on (B, 3, S, S) normalised images and (B, 1, S, S) masks in [0, 1].

    Args:
        scaler, dtype: of autocast, as in the release's training on a GPU.
    Returns:
        The loss, fetched at once, as are IoU and Pr@0.5 of the small maps.
    """
    model.train()
    with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(image, tokens)
        loss = text_to_pixel_loss(logits, mask)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    training_scores(logits.detach(), resize_target(mask, logits.shape[-2:])).tolist()
    return loss.item()


# --------------------------------------------------------------------------------------- evaluation


def read_image(reader: RecordReader, ref: RefRecord, side: int) -> Tensor:
    """A ref's photo -> (3, S, S) float32, normalised."""
    pixels = torch.from_numpy(load_image(reader, ref, side).transpose(2, 0, 1)).float()
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return pixels.div_(255).sub_(mean).div_(std)


def read_mask(ref: RefRecord, side: int) -> Tensor:
    """A ref's mask -> (1, S, S) float32 in [0, 1]."""
    return torch.from_numpy(load_square_mask(ref, side) / 255.0).float()[None]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    reader: RecordReader,
    positions: Sequence[int],
    side: int,
    word_len: int,
    device: torch.device,
) -> dict[tuple[int, int], tuple[int, int]]:
    """Score every sentence of some refs, one after the other.

    Returns:
        Intersection and union in pixels by (position, sentence).
    """
    model.eval()
    counts, protocol = {}, PROTOCOLS["published"]
    for position in positions:
        ref = reader.ref(position)
        # Stacked, as its loader makes a batch of one: decoded pixels lie with channels last.
        image = torch.stack([read_image(reader, ref, side)]).to(device)
        for place, sentence in enumerate(ref.sentences):
            tokens = tokenize(sentence, word_len).to(device)
            mask, probability = load_mask(ref), torch.sigmoid(model(image, tokens))
            square = upsample_probability(probability, side, protocol)[0].cpu().numpy()
            pred_mask = restore_size(square, mask.shape) > protocol.threshold
            counts[position, place] = intersection_and_union(pred_mask, mask > 0)
    return counts
