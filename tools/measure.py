"""Rulers for what measures speed: time in turns, floating-point operations.

A machine is faster in one minute than in another, so rates are compared within a round, in which
the ways take turns. Operations are counted as executed, a multiplication and an addition as two.
"""

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn

REST = "the rest"


class Spread(NamedTuple):
    """The median of some values, and the smallest and largest of them."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Summarise at least one value."""
    values = list(values)
    return Spread(median(values), min(values), max(values))


def ratios(values: Sequence[float], others: Sequence[float]) -> Spread:
    """`values` over `others`, round by round."""
    return spread(a / b for a, b in zip(values, others, strict=True))


def take_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each way in each round; the first `warmup` rounds are not kept.

    Args:
        ways: by name; called without arguments. On a GPU they must wait for it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warmup + rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def waiting_for(device: "torch.device") -> Callable[[], object]:
    """What to call until the device has done its work, which need not be the current GPU."""
    import torch

    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


# --------------------------------------------------------------------------------------- operations


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of one call: matrix products, convolutions, attention.

    Backward passes within it are counted too. Elementwise work is not.
    """
    with _counter() as counter:
        call()
    return counter.get_total_flops()


def flops_by_part(
    model: "nn.Module", call: Callable[[], object], parts: Sequence[str]
) -> dict[str, int]:
    """Operations of the forward passes of one call, by part of the model.

    Args:
        model: what `call` runs, or some of whose submodules it runs.
        parts: dotted names of submodules, such as "backbone.visual"; of two that fit a module,
            the longer one counts.
    Returns:
        A number for each of `parts` in their order, and one for `REST`.
    """
    totals = dict.fromkeys([*parts, REST], 0)
    open_parts, seen = [REST], 0
    fitting = sorted(parts, key=len, reverse=True)

    def note() -> None:
        nonlocal seen
        total = counter.get_total_flops()
        totals[open_parts[-1]] += total - seen
        seen = total

    def begin(name: str) -> None:
        note()
        own = (part for part in fitting if f"{name}.".startswith(f"{part}."))
        open_parts.append(next(own, open_parts[-1]))

    def end(*_: object) -> None:
        note()
        open_parts.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: begin(name)))
        hooks.append(module.register_forward_hook(end))
    try:
        with _counter() as counter:
            call()
            note()
    finally:
        for hook in hooks:
            hook.remove()
    return totals


def _counter():
    """torch's counter, with the CPU's kernels of attention, which it leaves out."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def attention(query, key, value, *_, out_shape=None, **__) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(grad, query, key, value, *_, out_shape=None, **__) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    def whole_attention(query, key, value, width, heads, *_, out_shape=None, **__) -> int:
        batch, queries, _ = query
        keys = key[1]
        projections = 2 * batch * width * width * (2 * queries + 2 * keys)
        return projections + 4 * batch * queries * keys * width

    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
            aten._native_multi_head_attention: whole_attention,
        },
    )


def gemm_peak(
    side: int = 2048, seconds: float = 1.0, device: "str | torch.device" = "cpu"
) -> float:
    """The best rate of a square float32 matrix product, in operations a second.

    With torch's present number of threads; the best of as many tries as fit into `seconds`.
    """
    import torch

    a, b = torch.rand(2, side, side, device=device)
    wait = waiting_for(torch.device(device))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


# ------------------------------------------------------------------------------------------ machine


def machine(device: "torch.device | None" = None) -> dict[str, str | int]:
    """What a figure depends on: processor, threads, versions.

    Args:
        device: where was measured; if it is none of the GPUs, the current one is named.
    """
    import torch

    gpu = device if device is not None and device.type == "cuda" else None
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(gpu) if torch.cuda.is_available() else "none",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opencv": version("opencv-python-headless"),
    }


def _processor() -> str:
    """Its name and the widest vectors that torch uses; clouds hide what is more exact."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
