"""Dropout drawn sixteen bits a value: its rate, its scale, its gradient, and who draws alike."""

import pytest
import torch
import torch.nn.functional as F

from model.dropout import LEVELS, Dropout, draw_kept


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9, 1e-9, 1 - 1e-9])
def test_the_share_that_stays_is_the_one_that_is_told(dropout):
    torch.manual_seed(0)
    kept, share = draw_kept((1001, 1003), dropout)
    assert kept.dtype == torch.uint8
    assert kept.shape == (1001, 1003)
    assert set(kept.unique().tolist()) <= {0, 1}
    assert share == pytest.approx(1 - dropout, abs=1 / LEVELS)
    assert 0 < share <= 1
    deviation = (share * (1 - share) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - share) <= 4 * deviation


def test_neighbours_are_drawn_apart_from_each_other():
    torch.manual_seed(0)
    kept = draw_kept((1_000_000,), 0.5)[0].double() - 0.5
    for distance in (1, 2, 3, 4, 8):  # four share a draw
        product = (kept[:-distance] * kept[distance:]).mean() / 0.25
        assert abs(product) <= 0.005


def test_a_seed_gives_one_mask_and_the_next_call_another():
    masks = []
    for _ in range(2):
        torch.manual_seed(5)
        masks.append([draw_kept((7, 9), 0.5)[0] for _ in range(2)])
    assert torch.equal(masks[0][0], masks[1][0])
    assert not torch.equal(masks[0][0], masks[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_stays_is_scaled_and_so_is_its_gradient(dtype):
    x = torch.randn(50, 60, dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    found = Dropout(0.3).train()(x)
    torch.manual_seed(1)
    kept, share = draw_kept(x.shape, 0.3)
    assert found.dtype == dtype
    torch.testing.assert_close(found, x * kept / share)
    found.backward(x.detach())
    torch.testing.assert_close(x.grad, x.detach() * kept / share)
    assert 0.6 < kept.double().mean() < 0.8


def test_evaluation_and_a_rate_of_0_change_nothing_and_draw_nothing():
    x, state = torch.randn(8), torch.get_rng_state()
    assert torch.equal(Dropout(0.3).eval()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5, 1, 3)])
def test_any_shape_is_drawn(shape):
    assert Dropout(0.5).train()(torch.ones(shape)).shape == shape


def test_the_expectation_is_torchs():
    x = torch.rand(200_000) + 1
    torch.manual_seed(0)
    means = [f(x).mean() for f in (Dropout(0.1).train(), lambda x: F.dropout(x, 0.1))]
    assert abs(means[0] / means[1] - 1) < 5e-3
