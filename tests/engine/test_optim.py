"""Groups and rates of the published recipe; the official table itself is in test_golden.py."""

from types import SimpleNamespace

import pytest
import torch
from helpers import small_segmenter
from torch import nn

from engine.optim import build_optimizer, parameter_groups, set_rates
from utils.config import TrainConfig


def recipe(**changes: object) -> SimpleNamespace:
    """A config with the published values."""
    return SimpleNamespace(TRAIN=TrainConfig().model_copy(update=changes))


def small_optimizer(cfg: SimpleNamespace) -> torch.optim.Optimizer:
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "neck": nn.Linear(2, 2)})
    return build_optimizer(parameter_groups(model, cfg), cfg)


def rates(cfg: SimpleNamespace, progress: float, step: int = 0) -> list[float]:
    """The rates at a point of a run, after those of another point, which leave no trace."""
    optimizer = small_optimizer(cfg)
    set_rates(optimizer, cfg, 49, 1000)
    set_rates(optimizer, cfg, progress, step)
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parity
def test_groups_hold_every_trained_parameter_once_and_positional_embeddings_in_the_head():
    model = small_segmenter()
    groups = {g["name"]: g for g in parameter_groups(model, recipe())}
    assert list(groups) == ["backbone", "head"]
    names = {id(p): name for name, p in model.named_parameters()}
    found = {name: [names[id(p)] for p in group["params"]] for name, group in groups.items()}
    in_both = found["backbone"] + found["head"]
    assert len(in_both) == len(set(in_both))
    assert set(names.values()) - set(in_both) == {"backbone.logit_scale"}
    assert [n for n in found["head"] if n.startswith("backbone")] == [
        "backbone.positional_embedding",
        "backbone.visual.attnpool.positional_embedding",
    ]
    assert all(name.startswith("backbone") for name in found["backbone"])
    assert "backbone.token_embedding.weight" in found["backbone"]
    assert [group["initial_lr"] for group in groups.values()] == pytest.approx([1e-5, 1e-4])


def test_first_epoch_trains_both_groups_at_the_base_rate():
    assert rates(recipe(), 0) == rates(recipe(), 0.99) == [1e-4, 1e-4]
    assert rates(recipe(), 1) == pytest.approx([1e-5, 1e-4])
    assert rates(recipe(), 35) == pytest.approx([1e-6, 1e-5])


def test_backbone_may_have_its_own_rate_from_the_start():
    cfg = recipe(backbone_start="lr_multi")
    assert rates(cfg, 0) == pytest.approx([1e-5, 1e-4])
    assert [rates(cfg, epoch) for epoch in range(1, 50)] == [
        rates(recipe(), epoch) for epoch in range(1, 50)
    ]


def test_each_milestone_multiplies_both_rates_once_more():
    cfg = recipe(milestones=(3, 5), lr_decay=0.5, lr_multi=0.2)
    heads = [rates(cfg, epoch)[1] for epoch in range(8)]
    assert heads == pytest.approx([1e-4] * 3 + [0.5e-4] * 2 + [0.25e-4] * 3)
    assert rates(cfg, 7)[0] == pytest.approx(0.2 * heads[7])


def test_cosine_falls_from_the_groups_own_rates_to_nothing_and_stays_there():
    cfg = recipe(schedule="cosine", backbone_start="lr_multi", epochs=4, milestones=(1,))
    table = {progress: rates(cfg, progress) for progress in (0, 1, 2, 3, 3.99, 4, 4.5, 8)}
    heads = {progress: head for progress, (_, head) in table.items()}
    assert heads[0] == 1e-4
    assert heads[2] == pytest.approx(0.5e-4)
    assert heads[1] + heads[3] == pytest.approx(1e-4)
    assert 0 < heads[3.99] < 1e-8
    assert heads[4] == heads[4.5] == heads[8] == 0
    assert all(backbone == pytest.approx(0.1 * head) for backbone, head in table.values())
    warm = rates(recipe(schedule="cosine", epochs=4, warmup_steps=50), 0, 24)
    assert warm[1] == pytest.approx(0.5 * rates(recipe(schedule="cosine", epochs=4), 0, 24)[1])


def test_warm_up_rises_linearly_over_optimiser_steps_and_then_changes_nothing():
    cfg = recipe(warmup_steps=4)
    first = [rates(cfg, 0, step)[1] for step in range(6)]
    assert first == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4, 1e-4])
    assert rates(cfg, 40, 1000) == rates(recipe(), 40)
    assert rates(recipe(), 0, 0) == [1e-4, 1e-4]


@pytest.mark.parity
def test_optimizer_is_adam_with_the_configs_weight_decay():
    optimizer = small_optimizer(recipe(weight_decay=0.01))
    assert isinstance(optimizer, torch.optim.Adam)
    assert not isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01]
