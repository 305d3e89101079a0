"""Speed, waiting and memory: what a lap measures, against sleeps and allocations of known size."""

import time
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from helpers import CPU

from engine import pace
from engine.pace import MEASURED, Pace, memory_in_use
from utils.machine import GIB, peak_memory


def slow_loader(count: int, seconds: float) -> Iterator[int]:
    for number in range(count):
        time.sleep(seconds)
        yield number


def lap_of(load: float, compute: float, count: int = 5) -> dict[str, float]:
    taken = Pace(CPU)
    for _ in taken.watch(slow_loader(count, load)):
        time.sleep(compute)
    return taken.lap(batch_size=8)


def test_the_share_is_the_time_in_which_the_loop_waited_for_the_loader():
    values = lap_of(load=0.03, compute=0.01)
    assert tuple(values) == MEASURED
    assert 0.6 < values["data_wait_share"] < 0.9
    assert lap_of(load=0.0, compute=0.03)["data_wait_share"] < 0.1


def test_speed_counts_the_refs_of_all_batches_since_the_last_lap():
    taken = Pace(CPU)
    batches = taken.watch(slow_loader(6, 0.01))
    for numbers in ([0, 1, 2, 3], [4, 5]):
        start = time.monotonic()
        assert list(islice(batches, len(numbers))) == numbers
        speed = taken.lap(batch_size=16)["refs_per_second"]
        assert speed == pytest.approx(len(numbers) * 16 / (time.monotonic() - start), rel=0.2)


def test_memory_on_the_cpu_is_the_most_that_the_process_held():
    assert lap_of(0.0, 0.0)["memory_gib"] == pytest.approx(peak_memory() / GIB, rel=0.01)


def test_of_several_ranks_the_one_that_waited_longest_and_the_one_that_took_most_count(monkeypatch):
    monkeypatch.setattr(pace, "gather_objects", lambda own: [own, (0.9, 0.0), (0.0, 1e4)])
    values = lap_of(load=0.0, compute=0.01)
    assert (values["data_wait_share"], values["memory_gib"]) == (0.9, 1e4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_on_a_gpu_is_the_most_that_tensors_took():
    device = torch.device("cuda", 0)
    torch.cuda.init()  # a test that runs alone is the first to use the device
    torch.cuda.reset_peak_memory_stats(device)
    before = memory_in_use(device)
    block = torch.ones(2**26, dtype=torch.uint8, device=device)
    del block
    assert memory_in_use(device) - before == pytest.approx(2**26 / GIB, rel=0.1)
