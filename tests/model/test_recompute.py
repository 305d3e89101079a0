"""Gradient checkpointing keeps less and changes nothing: gradients, statistics and dropout."""

from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import (
    assert_equal_runs,
    assert_same,
    build_run,
    kept_bytes,
    load,
    random_batch,
    run_program,
    small_segmenter,
    spawn,
    write_config,
)
from torch import nn

from engine.trainer import train_one_epoch
from model.loss import text_to_pixel_loss
from model.recompute import checkpointed
from utils.distributed import Ranks, SyncBatchNorm, unwrap
from utils.transforms import normalize_images

SIDE = 96
PARTS = {
    "backbone": {"recompute_backbone": True},
    "decoder": {"recompute_decoder": True},
    "both": {"recompute_backbone": True, "recompute_decoder": True},
}
BOTH = ("TRAIN.recompute_backbone", True, "TRAIN.recompute_decoder", True)


@cache
def step(dtype: torch.dtype, part: str | None = None) -> tuple[dict, int]:
    """Two passes of a model with dropout: what they leave behind, and the bytes kept for it."""
    photos, tokens, masks = random_batch(4, SIDE)
    model = small_segmenter(dropout=0.3, **PARTS.get(part, {})).train()
    torch.manual_seed(5)
    losses = []
    for _ in range(2):
        with kept_bytes() as kept:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = model(normalize_images(photos), tokens)
            loss = text_to_pixel_loss(logits, masks)
        loss.backward()
        losses.append(loss.detach())
    left = {
        "losses": losses,
        "gradients": [p.grad for p in model.parameters() if p.requires_grad],
        "buffers": dict(model.named_buffers()),
        "rng": torch.get_rng_state(),
    }
    return left, sum(kept.values())


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_nothing_changes_to_the_bit_and_less_is_kept(part, dtype):
    (plain, kept_plain), (got, kept) = step(dtype), step(dtype, part)
    assert_same(got, plain)
    assert kept / kept_plain < {"backbone": 0.7, "decoder": 0.9, "both": 0.6}[part]


def test_statistics_count_a_batch_once_and_survive_a_failure():
    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
    calls = []
    block[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(8, 3, requires_grad=True)
    checkpointed(block, x, recompute=True).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        checkpointed(block[0], x, recompute=True)
    assert len(calls) == 3
    assert block[1].num_batches_tracked == 1

    buffers = dict(block.named_buffers())
    output = checkpointed(block, x, recompute=True).sum()
    fault = RuntimeError("in the second pass")
    block[0].register_forward_hook(mock.Mock(side_effect=fault))
    with pytest.raises(RuntimeError, match="in the second pass"):
        output.backward()
    assert all(buffers[name] is value for name, value in block.named_buffers())
    assert block[1].num_batches_tracked == 2


def test_a_training_that_is_resumed_with_it_equals_one_without_to_the_bit(data, tmp_path):
    recipe = {"dropout": 0.2, "epochs": 2, "accumulation_steps": 2, "max_norm": 1.0}
    plain = write_config(tmp_path / "plain", data, **recipe)
    parts = write_config(tmp_path / "parts", data, **recipe)
    run_program("train.py", plain)
    got, expected = (tmp_path / name / "exp/tiny" for name in ("parts", "plain"))
    run_program("train.py", parts, *BOTH, "TRAIN.epochs", 1)
    run_program("train.py", parts, *BOTH, "TRAIN.resume", got / "last_model.pth")
    assert_equal_runs(got, expected)
    assert load(got / "last_model.pth")["config"]["TRAIN"]["recompute_backbone"]


def on_rank(ranks: Ranks, config: Path) -> dict[str, dict]:
    results = {}
    for name, opts in {"plain": (), "recomputed": BOTH}.items():
        for steps in (1, 2):  # one: the static graph
            run = build_run(config, *opts, "TRAIN.accumulation_steps", steps, ranks=ranks)
            norms = [m for m in run.model.modules() if isinstance(m, SyncBatchNorm)]
            assert norms
            assert run.model.static_graph == (steps == 1)
            train_one_epoch(run)
            results[f"{name} {steps}"] = dict(unwrap(run.model).state_dict())
    return results


@pytest.mark.slow
def test_two_ranks_with_synchronised_statistics_equal_two_without_to_the_bit(data, tmp_path):
    config = write_config(tmp_path, data, dropout=0.2, batch_size=16)
    first, second = spawn(2, on_rank, config)
    assert_same(first, second)
    for steps in (1, 2):
        assert_same(first[f"recomputed {steps}"], first[f"plain {steps}"])
