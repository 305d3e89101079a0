"""Which refs make up which step, on how many ranks and workers whatsoever."""

import os

import cv2
import pytest
import torch
from helpers import ALONE, CPU, assert_same, loader_config
from torch.utils.data import DataLoader

from engine.loaders import (
    VisitSampler,
    build_evaluation_loader,
    build_train_loader,
    to_device,
    usable_workers,
)
from utils.dataset import EvaluationDataset
from utils.distributed import Ranks
from utils.errors import UserError
from utils.records import RecordReader


def singles(num_refs: int) -> list[list[int]]:
    """Groups as published: each ref alone."""
    return [[position] for position in range(num_refs)]


def steps(
    groups: list[list[int]], batch: int, accumulation: int = 1, world_size: int = 1, epoch: int = 0
) -> list[list[int]]:
    """Positions that make up each optimiser step, over all ranks."""
    micro_batch = batch // accumulation // world_size
    joined: list[list[int]] = []
    for rank in range(world_size):
        sampler = VisitSampler(groups, micro_batch, accumulation, rank, world_size, seed=0)
        sampler.set_epoch(epoch)
        visits = list(sampler)
        assert len(visits) == len(sampler)
        assert {e for micro in visits for _, e in micro} == {epoch}
        for i, micro in enumerate(visits):
            assert len(micro) == micro_batch
            if i // accumulation == len(joined):
                joined.append([])
            joined[i // accumulation] += [position for position, _ in micro]
    return joined


# ------------------------------------------------------------------------------------------- visits


@pytest.mark.parametrize(("accumulation", "world_size"), [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)])
def test_same_refs_make_up_a_step_on_any_ranks_and_accumulation(accumulation, world_size):
    for groups in (singles(50), [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(17)]):
        expected = [set(step) for step in steps(groups, 8)]
        assert [set(step) for step in steps(groups, 8, accumulation, world_size)] == expected


def test_an_epoch_visits_each_ref_at_most_once_and_drops_the_incomplete_batch():
    visited = [position for step in steps(singles(50), 8, 2, 2) for position in step]
    assert len(visited) == len(set(visited)) == 48
    assert set(visited) <= set(range(50))
    assert len(steps(singles(48), 8)) == 6
    assert len(steps(singles(47), 8)) == 5
    # RefCOCO's train split at the published batch size.
    assert len(VisitSampler(singles(42404), 64, 1, 0, 1, 0)) == 662


def test_order_is_shuffled_differs_between_epochs_and_seeds_and_repeats_itself():
    (step,) = steps(singles(64), 64)
    assert step != sorted(step)
    assert sorted(step) == list(range(64))
    assert steps(singles(50), 8, epoch=0) == steps(singles(50), 8, epoch=0)
    assert steps(singles(50), 8, epoch=0) != steps(singles(50), 8, epoch=1)
    by_seed = [list(VisitSampler(singles(50), 8, 1, 0, 1, seed)) for seed in (0, 1)]
    assert by_seed[0] != by_seed[1]


def test_groups_stay_side_by_side_in_an_order_that_is_shuffled():
    groups = [[0, 5], [1], [2, 3, 4], [6, 7]]
    orders = set()
    for epoch in range(6):
        (order,) = steps(groups, 8, epoch=epoch)
        for group in groups:
            start = order.index(group[0])
            assert order[start : start + len(group)] == group
        orders.add(tuple(order))
    assert len(orders) > 1


def test_fewer_refs_than_a_batch_names_the_key():
    with pytest.raises(UserError, match=r"7 refs, fewer than one batch of 8; lower TRAIN\.batch_s"):
        VisitSampler(singles(7), 2, 2, 0, 2, seed=0)


# ------------------------------------------------------------------------------------------ loaders


by_refs_or_images = pytest.mark.parametrize("batch_by", ["refs", "images"])


@by_refs_or_images
def test_training_batches_are_the_same_with_and_without_workers(shapes_lmdb, batch_by):
    loaders = [
        build_train_loader(loader_config(shapes_lmdb, workers=n, batch_by=batch_by), 4, ALONE)
        for n in (0, 2)
    ]
    for epoch in range(2):
        for loader in loaders:
            loader.batch_sampler.set_epoch(epoch)
        plain, found = map(list, loaders)
        assert len(found) == len(loaders[1]) == 29 // 4
        assert_same(found, plain)


@by_refs_or_images
def test_both_ways_of_batching_visit_the_same_number_of_refs(shapes_lmdb, batch_by):
    loader = build_train_loader(loader_config(shapes_lmdb, batch_by=batch_by), 4, ALONE)
    batches = list(loader)
    assert len(batches) == len(loader) == 7
    visited = [position for batch in batches for position in batch["positions"].tolist()]
    assert len(visited) == len(set(visited)) == 28
    num_images = sum(len(batch["images"]) for batch in batches)
    if batch_by == "refs":
        assert all(batch["image_index"] is None for batch in batches)
        assert num_images == 28
    else:  # of 12 images, one here and there is cut in two by the end of a batch
        assert num_images <= 12 + 6


@pytest.mark.parametrize("world_size", [1, 2, 3, 13])  # of 12 images
@pytest.mark.parametrize("swap", [False, True])
def test_evaluation_loaders_of_all_ranks_bring_every_sentence_once(shapes_lmdb, world_size, swap):
    cfg = loader_config(shapes_lmdb, batch_size_val=52)
    loaders = [
        build_evaluation_loader(
            cfg, str(shapes_lmdb), Ranks(rank, world_size, rank, world_size, CPU), swap=swap
        )
        for rank in range(world_size)
    ]
    shares = [len(loader.sampler) for loader in loaders]
    assert max(shares) - min(shares) <= 1
    keys = [task.key for loader in loaders for batch in loader for task in batch["tasks"]]
    assert len(keys) == len(set(keys))
    assert set(keys) == EvaluationDataset(RecordReader(shapes_lmdb), 32, 9, swap=swap).keys()


@pytest.mark.parametrize("workers", [0, 1])
def test_iterating_leaves_torchs_random_numbers_alone(shapes_lmdb, workers):
    cfg = loader_config(shapes_lmdb, workers=workers, workers_val=workers)
    before = torch.get_rng_state()
    for loader in (
        build_train_loader(cfg, 4, ALONE),
        build_evaluation_loader(cfg, str(shapes_lmdb), ALONE),
    ):
        assert sum(1 for _ in loader) == len(loader)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------ workers


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)


@pytest.mark.parametrize(
    ("wanted", "local_size", "expected"),
    [(0, 1, 0), (3, 1, 3), (4, 1, 4), (32, 1, 4), (32, 2, 2), (4, 3, 2), (1, 2, 1)],
)
def test_workers_are_at_most_the_cores_shared_by_the_ranks_of_the_machine(
    four_cores, wanted, local_size, expected
):
    assert usable_workers(wanted, Ranks(0, 4, 0, local_size, CPU), "TRAIN.workers") == expected


def test_fewer_workers_than_asked_for_is_said_once_by_rank_0(four_cores, log_lines):
    usable_workers(4, ALONE, "TRAIN.workers")
    assert log_lines == []
    usable_workers(32, ALONE, "TRAIN.workers")
    usable_workers(32, Ranks(1, 2, 1, 2, CPU), "TRAIN.workers")
    assert log_lines == ["TRAIN.workers 32 → 4: this machine has 4 cores"]


def test_opencv_is_single_threaded_in_workers(shapes_lmdb):
    built = build_train_loader(loader_config(shapes_lmdb, workers=1), 4, ALONE)
    options = {"num_workers": 1, "worker_init_fn": built.worker_init_fn}
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        loader = DataLoader(range(2), collate_fn=lambda _: cv2.getNumThreads(), **options)
        assert list(loader) == [1, 1]
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_a_batch_for_apples_gpu_is_copied_before_its_memory_may_be_freed(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.Tensor, "to", lambda *_, non_blocking: waits.append(not non_blocking))
    to_device({"images": torch.ones(1)}, torch.device("mps"))
    assert waits == [True]
