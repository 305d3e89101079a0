"""Random choices: reproducible, independent of each other, restorable."""

import io
import os
import random
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
import torch

from utils.seed import deterministic, draw, rng_state, seed_everything, set_rng_state


def sample() -> tuple:
    return random.random(), np.random.rand(), torch.rand(3).tolist()


def test_draw_depends_on_its_names_alone():
    numbers = [draw(1000, 0, epoch, 7) for epoch in range(20)]
    seed_everything(5)
    sample()
    assert [draw(1000, 0, epoch, 7) for epoch in range(20)] == numbers


def test_draw_leaves_the_global_generators_alone():
    seed_everything(3)
    expected = sample()
    seed_everything(3)
    draw(10, 1, 2, 3)
    assert sample() == expected


@pytest.mark.parametrize("varying", range(3))
def test_draw_is_uniform_over_each_of_its_names(varying):
    names = [5, 6, 7]
    counts = Counter()
    for value in range(2000):
        names[varying] = value
        counts[draw(4, *names)] += 1
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(abs(count - 500) < 100 for count in counts.values())


def test_draw_of_one_is_zero():
    assert draw(1, 0, 0, 0) == 0


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_seeding_makes_python_numpy_and_torch_repeat_themselves(seed):
    seed_everything(seed)
    first = sample()
    assert sample() != first
    seed_everything(seed)
    assert sample() == first
    seed_everything(seed + 1)
    assert all(a != b for a, b in zip(sample(), first, strict=True))


def test_state_survives_a_file_that_is_read_without_running_code():
    seed_everything(0)
    torch.rand(5)
    buffer = io.BytesIO()
    torch.save(rng_state(), buffer)
    expected = torch.rand(4)
    buffer.seek(0)
    set_rng_state(torch.load(buffer, weights_only=True))
    assert torch.equal(torch.rand(4), expected)


def determinism() -> tuple:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


ON = (True, False, True, False, ":4096:8")


@pytest.mark.parametrize("fails", [False, True])
def test_deterministic_mode_is_on_within_and_as_before_afterwards(monkeypatch, fails):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = determinism()
    assert before == (False, False, False, True, None)
    with suppress(KeyError), deterministic(True):
        assert determinism() == ON
        if fails:
            raise KeyError
    assert determinism() == before
    with deterministic(False):
        assert determinism() == before


def test_deterministic_mode_keeps_what_others_set(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = determinism()
        with deterministic(True):
            assert determinism() == (*ON[:4], ":16:8")
        assert determinism() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_mode_reaches_torch():
    with deterministic(True):
        assert torch.empty(3).isnan().all()  # fills even what is about to be overwritten
