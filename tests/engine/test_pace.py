"""Speed, waiting and memory: what a lap measures, against sleeps and allocations of known size."""

import time
from collections.abc import Iterator

import pytest
import torch
from helpers import CPU, spawn

from engine.pace import GIB, MEASURED, Pace, memory_in_use
from utils.distributed import Ranks
from utils.machine import peak_memory


def slow_loader(count: int, seconds: float) -> Iterator[int]:
    for number in range(count):
        time.sleep(seconds)
        yield number


def lap_of(load: float, compute: float, count: int = 5) -> dict[str, float]:
    pace = Pace(CPU)
    for _ in pace.watch(slow_loader(count, load)):
        time.sleep(compute)
    return pace.lap(batch_size=8)


def test_the_share_is_the_time_in_which_the_loop_waited_for_the_loader():
    values = lap_of(load=0.03, compute=0.01)
    assert tuple(values) == MEASURED
    assert 0.6 < values["data_wait_share"] < 0.9
    assert lap_of(load=0.0, compute=0.03)["data_wait_share"] < 0.1


def test_speed_counts_the_refs_of_all_batches_since_the_last_lap():
    pace = Pace(CPU)
    start = time.monotonic()
    batches = pace.watch(slow_loader(6, 0.01))
    for _ in range(4):
        next(batches)
    speed = pace.lap(batch_size=16)["refs_per_second"]
    assert speed == pytest.approx(4 * 16 / (time.monotonic() - start), rel=0.2)
    start = time.monotonic()
    assert len(list(batches)) == 2
    speed = pace.lap(batch_size=16)["refs_per_second"]
    assert speed == pytest.approx(2 * 16 / (time.monotonic() - start), rel=0.2)


def test_a_loader_is_gone_through_as_it_is():
    assert list(Pace(CPU).watch([3, None, 1])) == [3, None, 1]


def test_memory_on_the_cpu_is_the_most_that_the_process_held():
    assert memory_in_use(CPU) == pytest.approx(peak_memory() / GIB, rel=0.01)


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


def waits_on_one_rank(ranks: Ranks) -> None:
    values = lap_of(load=0.04 * ranks.rank, compute=0.01)
    assert values["data_wait_share"] > 0.6, values


@pytest.mark.slow
def test_of_several_ranks_the_one_that_waited_longest_counts():
    spawn(2, waits_on_one_rank)
