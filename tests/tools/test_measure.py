"""tools/measure.py: rulers are checked against what is known."""

import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, small_segmenter
from torch import nn

from tools.measure import (
    REST,
    Spread,
    count_flops,
    flops_by_part,
    gemm_peak,
    machine,
    ratios,
    spread,
    take_turns,
    waiting_for,
)


def test_spread_and_ratios_are_of_the_values_round_by_round():
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert ratios([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == Spread(3.0, 2.0, 4.0)
    with pytest.raises(ValueError):
        ratios([1.0, 2.0], [1.0])


def test_ways_take_turns_and_the_first_rounds_are_not_kept():
    calls = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.02)

    seconds = take_turns({"slow": slow, "quick": lambda: calls.append("quick")}, 2, warmup=1)
    assert calls == ["slow", "quick"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert min(seconds["slow"]) >= 0.02 > max(seconds["quick"])


def test_what_is_waited_for_and_named_is_the_gpu_that_is_measured(monkeypatch):
    waited, second = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"name of {device}")
    waiting_for(torch.device("cpu"))()
    assert waited == []
    waiting_for(second)()
    assert waited == [second]
    assert machine(second)["gpu"] == "name of cuda:1"
    assert machine(torch.device("cpu"))["gpu"] == machine()["gpu"] == "name of None"


def test_operations_of_known_layers_are_counted_forward_and_backward():
    linear, x = nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    assert count_flops(lambda: linear(x)) == 2 * 3 * 5 * 7
    assert count_flops(lambda: linear(x).sum().backward()) == 3 * 2 * 3 * 5 * 7
    conv = nn.Conv2d(4, 6, 3, padding=1)
    assert count_flops(lambda: conv(torch.randn(2, 4, 8, 8))) == 2 * 2 * 64 * 4 * 6 * 9


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("is_self", [True, False])
def test_operations_of_attention_are_counted_whatever_kernel_computes_it(mode, is_self):
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    query = torch.randn(3, 10, 16)
    key = query if is_self else torch.randn(3, 6, 16)
    with mode():
        found = count_flops(lambda: attention(query, key, key, need_weights=False))
    length = key.shape[1]
    assert found == 2 * 3 * (16 * 16 * (10 + 10 + 2 * length) + 2 * 10 * length * 16)


def test_the_backward_pass_of_attention_is_counted_too():
    q, k, v = (torch.randn(1, 2, 32, 8, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 32 * 32 * 8

    def step() -> None:
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()

    assert count_flops(step) in (6 * product, 7 * product)  # with the scores computed again, or not


def test_parts_add_up_and_the_longer_name_counts():
    model = small_segmenter().eval()
    image, tokens = torch.randn(1, 3, 64, 64), torch.tensor([[510, 7, 511, 0]])

    def call() -> None:
        with torch.inference_mode():
            model.segment(model.encode_image(image), tokens)

    names = ["backbone", "backbone.visual", "neck", "decoder", "proj"]
    parts = flops_by_part(model, call, names)
    assert list(parts) == [*names, REST]
    assert sum(parts.values()) == count_flops(call)
    assert all(parts[name] > 0 for name in names)
    with torch.inference_mode():
        image_alone = count_flops(lambda: model.backbone.visual(image))
    assert parts["backbone.visual"] == image_alone
    assert not any(module._forward_hooks for module in model.modules())


def test_the_peak_of_matrix_products_is_a_rate():
    assert 1e8 < gemm_peak(side=256, seconds=0.1) < 1e15


def test_the_peak_of_memory_is_in_bytes_and_keeps_what_was_given_back():
    code = (
        "from utils.machine import peak_memory\n"
        "before = peak_memory()\n"
        "block = b'x' * 200_000_000\n"
        "del block\n"
        "print(peak_memory() - before)"
    )
    heavy = b"x" * 400_000_000  # of the parent: not the child's
    ending = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 190e6 < int(ending.stdout) < 260e6
    assert len(heavy)


def test_the_machine_is_described():
    found = machine()
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert all(found.values())
