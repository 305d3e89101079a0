"""Random choices: reproducible, independent of each other, restorable."""

import io
import os
import random
from collections import Counter
from contextlib import suppress
from itertools import combinations

import numpy as np
import pytest
import torch

from utils.seed import deterministic, draw, rng_state, seed_everything, set_rng_state

EARLIER = [995, 703, 997, 988]  # drawn before purposes had names


def sample() -> tuple:
    return random.random(), np.random.rand(), torch.rand(3).tolist()


def test_draw_depends_on_its_names_alone_and_leaves_the_global_generators_alone():
    numbers = [draw("sentence", 1000, 0, epoch, 7) for epoch in range(20)]
    seed_everything(5)
    expected = sample()
    seed_everything(5)
    assert [draw("sentence", 1000, 0, epoch, 7) for epoch in range(20)] == numbers
    assert sample() == expected


def test_two_purposes_draw_independently_and_sentences_stay_what_they_were():
    drawn = {
        purpose: [draw(purpose, 2, 0, epoch, 7) for epoch in range(64)]
        for purpose in ("sentence", "flip", "crop")
    }
    for first, second in combinations(drawn.values(), 2):
        assert 16 < sum(a == b for a, b in zip(first, second, strict=True)) < 48
    assert [draw("sentence", 1000, 0, epoch, 7) for epoch in range(4)] == EARLIER


@pytest.mark.parametrize("varying", range(3))
def test_draw_is_uniform_over_each_of_its_names(varying):
    names = [5, 6, 7]
    counts = Counter()
    for value in range(2000):
        names[varying] = value
        counts[draw("flip", 4, *names)] += 1
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(abs(count - 500) < 100 for count in counts.values())
    assert draw("flip", 1, *names) == 0


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


@pytest.mark.parametrize(("given", "expected"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_deterministic_mode_is_on_within_and_off_afterwards(monkeypatch, given, expected):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given or "")
    if given is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with suppress(KeyError), deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected
        assert torch.empty(3).isnan().all()  # fills even what is about to be overwritten
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark
