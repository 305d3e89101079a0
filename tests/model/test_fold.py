"""BatchNorm folded for inference: the same numbers from a twin, and the model stays as it is."""

import pytest
import torch
from helpers import random_batch, small_segmenter
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.fold import check_folding, fold_batch_norm
from utils.transforms import normalize_images


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_twin_gives_the_same_logits_without_batch_norm_in_the_same_layout(layout):
    model = small_segmenter(dropout=0.1).to(memory_format=layout)
    photos, tokens, _ = random_batch(2, 64)
    image = normalize_images(photos)
    twin = fold_batch_norm(model.train())
    with torch.inference_mode():
        found, expected = twin(image, tokens), model.eval()(image, tokens)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.equal(found, expected)
    # The one after the product of image and sentence has no layer before it.
    assert norms(twin) == ["neck.norm_layer.0"]
    assert len(norms(model)) > 10
    assert twin.neck.f2_v_proj[0].weight.is_contiguous(memory_format=layout)  # 3×3


def test_the_twin_is_in_evaluation_mode_shares_what_is_not_folded_and_its_model_stays():
    model = small_segmenter().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    twin = fold_batch_norm(model)
    assert not any(module.training for module in twin.modules())
    assert all(module.training for module in model.modules())
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    shared = {name for name in theirs if theirs[name] is ours.get(name)}
    layers = {name.rpartition(".")[0] for name in theirs.keys() - shared}
    assert len(layers) == len(norms(model)) - 1
    assert all(isinstance(model.get_submodule(name), nn.Conv2d | nn.Linear) for name in layers)
    assert "backbone.transformer.resblocks.0.attn.in_proj_weight" in shared


class PreActivation(nn.Module):
    """Adds conv(relu(bn(x))) to x, and registers the two the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(self.bn(x).relu())


@pytest.mark.parametrize(
    ("layers", "shape", "left"),
    [
        pytest.param([nn.Linear(5, 7), nn.BatchNorm1d(7)], (16, 5), [], id="linear layer"),
        pytest.param(
            [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)],
            (2, 3, 5, 5), ["0", "3"], id="norms that follow no layer",
        ),
        pytest.param(
            [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)],
            (2, 3, 5, 5), ["1"], id="norm without statistics",
        ),
        pytest.param(
            [nn.Conv2d(3, 4, 1), PreActivation()], (8, 3, 5, 5), ["1.bn"], id="norm before layer"
        ),
    ],
)  # fmt: skip
def test_the_twin_computes_what_was_trained_and_folds_only_norms_after_a_layer(layers, shape, left):
    model, x = nn.Sequential(*layers), 3 * torch.randn(shape) + 1
    for _ in range(5):
        model(x)
    check_folding(model, lambda each: each(x))
    twin = fold_batch_norm(model)
    found, expected = twin(x), model.eval()(x)
    assert norms(twin) == left
    assert torch.equal(found, expected) or left != norms(model)
    torch.testing.assert_close(found, expected)


def test_a_block_that_claims_another_order_than_its_own_stops_the_evaluation_by_name():
    class Wrong(PreActivation):
        FOLDED = (("conv", "bn"),)

    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), Wrong()), 3 * torch.randn(8, 3, 5, 5) + 1
    for _ in range(5):
        model(x)
    with pytest.raises(RuntimeError, match=r"changes what the model computes, at 1: "):
        check_folding(model, lambda each: each(x))
    assert model.training
