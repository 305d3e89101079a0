"""The objective against its formula, and both ways of shrinking a mask."""

import numpy as np
import pytest
import torch

from model.loss import resize_target, text_to_pixel_loss


def soft_masks(count: int = 3, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(0))


def some_logits(count: int = 3, side: int = 8) -> torch.Tensor:
    return 3 * torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(1))


def test_nearest_target_takes_the_first_pixel_of_every_cell():
    mask = soft_masks()
    assert torch.equal(resize_target(mask, (8, 8)), mask[:, :, ::4, ::4])
    assert torch.equal(resize_target(mask, (8, 8), "nearest"), resize_target(mask, (8, 8)))


def test_area_target_is_the_mean_of_every_cell():
    mask = soft_masks()
    cells = mask.unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5))
    torch.testing.assert_close(resize_target(mask, (8, 8), "area"), cells)


def test_targets_stay_between_0_and_1_at_sizes_that_do_not_divide():
    for target in ("nearest", "area"):
        small = resize_target(soft_masks(side=30), (7, 7), target)
        assert small.shape == (3, 1, 7, 7)
        assert small.min() >= 0
        assert small.max() <= 1


@pytest.mark.parity
@pytest.mark.parametrize("target", ["nearest", "area"])
def test_loss_is_the_mean_cross_entropy_over_all_pixels_of_all_samples(target):
    logits, mask = some_logits(), soft_masks()
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    t = resize_target(mask, (8, 8), target).double().numpy()
    expected = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    assert text_to_pixel_loss(logits, mask, target).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parity
def test_gradient_is_the_difference_of_probability_and_target_over_the_number_of_pixels():
    logits, mask = some_logits().requires_grad_(), soft_masks()
    text_to_pixel_loss(logits, mask, "area").backward()
    expected = (logits.detach().sigmoid() - resize_target(mask, (8, 8), "area")) / logits.numel()
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_loss_is_float32_and_finite_whatever_the_logits(dtype):
    logits = torch.full((1, 1, 8, 8), 6e4, dtype=dtype)
    for sign in (1, -1):
        loss = text_to_pixel_loss(sign * logits, torch.full((1, 1, 32, 32), 0.5))
        assert loss.dtype == torch.float32
        assert loss.isfinite()
