"""Where the time of a training step goes: each part of the model alone, forward and backward."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tools.latency import PARTS, part_of
from tools.measure import count_flops, spread, take_turns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model.segmenter import Segmenter

OPTIMIZER = "optimiser"


def training_parts(
    model: "Segmenter", image: "Tensor", tokens: "Tensor", mask: "Tensor"
) -> dict[str, Callable[[], object]]:
    """Calls that each make one part's share of the forward and the backward pass.

    A part is given what the parts before it make of the batch, and ones as the gradient of what it
    makes itself; the projector's share is the loss too.

    Args:
        model: in training mode.
        image, tokens, mask: (B, 3, S, S) normalised, (B, L), (B, 1, S, S).
    """
    from model.loss import text_to_pixel_loss

    backbone, neck, decoder, proj = model.backbone, model.neck, model.decoder, model.proj
    decoder = partial(decoder, pad_mask=tokens == 0)

    def fuse(*given: "Tensor") -> "Tensor":
        *maps, sent_feat = given
        return neck(neck.project(*maps), sent_feat)

    def project(pixels: "Tensor", sent_feat: "Tensor") -> "Tensor":
        return text_to_pixel_loss(proj(pixels, sent_feat), mask)

    maps = backbone.encode_image(image)
    word_feats, sent_feat = backbone.encode_text(tokens)
    fused = fuse(*maps, sent_feat)
    pixels = decoder(fused, word_feats)
    calls = {
        "image backbone": (backbone.encode_image, (image,)),
        "text backbone": (backbone.encode_text, (tokens,)),
        "neck": (fuse, (*maps, sent_feat)),
        "decoder": (decoder, (fused, word_feats)),
        "projector": (project, (pixels, sent_feat)),
    }
    assert calls.keys() == PARTS.keys()
    parameters = {name: [] for name in calls}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameters[part_of(name)].append(parameter)
    return {
        name: partial(_differentiate, call, [_cut(x) for x in given], parameters[name])
        for name, (call, given) in calls.items()
    }


def _cut(x: "Tensor") -> "Tensor":
    """The same values without what they were made of, which would stay in memory."""
    return x.detach().requires_grad_(x.requires_grad)


def _differentiate(
    call: Callable[..., object], given: Sequence["Tensor"], parameters: Sequence["Tensor"]
) -> None:
    """The call, and the gradients of what it was given and of the parameters, which keep theirs."""
    import torch

    for parameter in parameters:
        parameter.grad = None
    made = call(*map(_cut, given))
    made = [made] if isinstance(made, torch.Tensor) else list(made)
    torch.autograd.backward(made, [torch.ones_like(x) for x in made])


def measure_parts(
    model: "Segmenter",
    optimizer: "torch.optim.Optimizer",
    batch: Sequence["Tensor"],
    wait: Callable[[], object],
    rounds: int,
) -> dict[str, dict]:
    """Seconds and operations of each part's share of a training step, the update at last.

    Args:
        model: in training mode.
        optimizer: of its parameters, which it updates.
        batch: image, tokens and mask of a step.
        wait: until the device has done its work.
    Returns:
        By part: `seconds` (`Spread` as a mapping), `GFLOP` and `GFLOP/s` of the median.
    """
    import torch

    image, tokens, mask = batch
    image = image.contiguous(memory_format=torch.channels_last)
    # The optimiser is last, and finds the gradients of the parts.
    ways = training_parts(model, image, tokens, mask) | {OPTIMIZER: optimizer.step}

    def waited(way: Callable[[], object]) -> None:
        way()
        wait()

    flops = {name: count_flops(way) for name, way in ways.items()}
    wait()
    seconds = take_turns({name: partial(waited, way) for name, way in ways.items()}, rounds)
    return {
        name: {
            "seconds": spread(values)._asdict(),
            "GFLOP": flops[name] / 1e9,
            "GFLOP/s": flops[name] / 1e9 / spread(values).median,
        }
        for name, values in seconds.items()
    }


def show_parts(parts: dict[str, dict], peak: float) -> None:
    """Print them for people; `peak` in GFLOP/s."""
    whole = sum(row["seconds"]["median"] for row in parts.values())
    heads = ["ms", "of them all", "GFLOP", "GFLOP/s", "of peak"]
    print("\nthis, each part alone: forward and backward pass of a step")
    print(f"{'':<30}" + "".join(f"{head:>16}" for head in heads))
    for name, row in parts.items():
        median, rate = row["seconds"]["median"], row["GFLOP/s"]
        cells = [f"{1000 * median:,.1f}", f"{100 * median / whole:.0f} %", f"{row['GFLOP']:,.1f}"]
        cells += [f"{rate:,.0f}", f"{100 * rate / peak:.0f} %"] if rate else ["", ""]
        print(f"{name:<30}" + "".join(f"{cell:>16}" for cell in cells))
