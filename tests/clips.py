"""A tiny CLIP, in the forms in which CLIP's weights are published."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from model.clip import ClipSizes, DenseCLIP

TINY = ClipSizes(96, 64, (1, 2, 1, 1), 8, 7, 32, 64, 1, 2)
SIZES_HELD = ("input_resolution", "context_length", "vocab_size")
# Convolutions, linear layers and attention, weights and biases.
KEPT_IN_HALF = re.compile(
    r"(^|\.)(conv\d|downsample\.0|[qkvc]_proj|out_proj|c_fc)\.(weight|bias)$"
    r"|(^|\.)in_proj_(weight|bias)$|^text_projection$"
)


class Archived(nn.Module):
    """What OpenAI's archives hold: CLIP and its sizes, with a forward that only touches them."""

    def __init__(self, clip: DenseCLIP) -> None:
        super().__init__()
        for name, child in (*clip.named_children(), *clip.named_parameters(recurse=False)):
            setattr(self, name, child)
        del self.visual.attnpool.connect  # CRIS's own
        for name in SIZES_HELD:
            self.register_buffer(name, torch.tensor(5))

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(parameter.float().sum() for parameter in self.parameters())


def tiny_clip(half: bool = False) -> Archived:
    torch.manual_seed(0)
    model = Archived(DenseCLIP(TINY)).eval()
    for name, parameter in model.named_parameters():
        if half and KEPT_IN_HALF.search(name):
            parameter.data = parameter.data.half()
    return model


def save_archive(model: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.trace(model, torch.zeros(1), check_trace=False), str(path))
    return path


def without_sizes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in SIZES_HELD}


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].device.type == "cpu"
        assert got[name].dtype == (torch.float32 if tensor.is_floating_point() else tensor.dtype)
        assert torch.equal(got[name], tensor.to(got[name].dtype)), name
