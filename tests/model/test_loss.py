"""The objective against its formula, and both ways of shrinking a mask."""

import numpy as np
import pytest
import torch

from model.loss import resize_target, text_to_pixel_loss

MASKS = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
LOGITS = 3 * torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_target_is_the_first_pixel_or_the_mean_of_every_cell():
    assert torch.equal(resize_target(MASKS, (8, 8)), MASKS[:, :, ::4, ::4])
    assert torch.equal(resize_target(MASKS, (8, 8), "nearest"), resize_target(MASKS, (8, 8)))
    cells = MASKS.unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5))
    torch.testing.assert_close(resize_target(MASKS, (8, 8), "area"), cells)


@pytest.mark.parametrize("target", ["nearest", "area"])
def test_targets_stay_between_0_and_1_at_sizes_that_do_not_divide(target):
    small = resize_target(MASKS[..., :30, :30], (7, 7), target)
    assert small.shape == (3, 1, 7, 7)
    assert 0 <= small.min() <= small.max() <= 1


@pytest.mark.parity
@pytest.mark.parametrize("target", ["nearest", "area"])
def test_loss_is_the_mean_cross_entropy_over_all_pixels_of_all_samples(target):
    p = 1 / (1 + np.exp(-LOGITS.double().numpy()))
    t = resize_target(MASKS, (8, 8), target).double().numpy()
    expected = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    assert text_to_pixel_loss(LOGITS, MASKS, target).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parity
def test_gradient_is_the_difference_of_probability_and_target_over_the_number_of_pixels():
    logits = LOGITS.clone().requires_grad_()
    text_to_pixel_loss(logits, MASKS, "area").backward()
    expected = (LOGITS.sigmoid() - resize_target(MASKS, (8, 8), "area")) / LOGITS.numel()
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sign", [1, -1])
def test_loss_is_float32_and_finite_whatever_the_logits(dtype, sign):
    logits = torch.full((1, 1, 8, 8), sign * 6e4, dtype=dtype)
    loss = text_to_pixel_loss(logits, torch.full((1, 1, 32, 32), 0.5))
    assert loss.dtype == torch.float32
    assert loss.isfinite()
