"""What runs on CUDA, tried without it: on tensors of a device, type and shape, and without values.

torch refuses what mixes devices then, and whatever reads a value, for which the host would wait.
Kernels and the backward pass need a device, and are not run.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ROOT, Batches, build_run, kept_bytes, write_config
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from engine import evaluator, predictor, resume, trainer
from engine.evaluator import evaluate, resolve_protocols
from engine.loaders import _copy_stream, to_device
from engine.optim import build_optimizer, parameter_groups
from engine.predictor import Predictor
from engine.run import Run
from engine.trainer import build_scaler, resolve_precision, train_one_epoch
from model.clip import causal_mask, resizing_matrix
from model.decoder import map_positions, sequence_positions
from model.neck import coordinates
from model.projector import resampling_matrix
from model.segmenter import build_segmenter
from tools.latency import without_archive
from tools.published import Published
from utils.config import TestConfig, load_config
from utils.distributed import Ranks, synchronize_batchnorm
from utils.transforms import _clip_statistics

GPU = torch.device("cuda", 0)
TABLES = (
    _clip_statistics,
    _copy_stream,
    causal_mask,
    coordinates,
    map_positions,
    resampling_matrix,
    resizing_matrix,
    sequence_positions,
)
FORWARD_LAUNCHES, BACKWARD_STEPS = 1002, 914  # 1069 and 923 before
MIB = 2**20
CUDA, META = 1, 14  # places in torch's table of devices


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors that are made meanwhile have no values, and may be on CUDA."""
    with ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(_lent_guard())
        # Where there is no GPU, autocast and loss scaling turn themselves off.
        for name, value in (("amp.common.amp_definitely_not_available", False),
                            ("is_bf16_supported", True)):  # fmt: skip
            stack.enter_context(mock.patch(f"torch.cuda.{name}", return_value=value))
        for name in ("Stream", "stream", "current_stream"):
            stack.enter_context(mock.patch(f"torch.cuda.{name}", mock.MagicMock()))
        stack.enter_context(mock.patch.object(Tensor, "record_stream"))
        for table in TABLES:
            stack.callback(table.cache_clear)
            table.cache_clear()
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@contextmanager
def _lent_guard() -> Iterator[None]:
    """Let what sets the current device do nothing for CUDA, as it does for `meta`."""
    if sys.platform != "linux":
        pytest.skip("torch's table of devices is known by its name on Linux")
    if torch.backends.cuda.is_built() and not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip(f"torch {torch.__version__} with CUDA wants a GPU even for such tensors")
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    symbol = "_ZN3c104impl26device_guard_impl_registryE"
    table = (ctypes.c_void_p * (META + 1)).in_dll(library, symbol)
    before, table[CUDA] = table[CUDA], table[META]
    try:
        yield
    finally:
        table[CUDA] = before


def put_on_cuda(run: Run) -> None:
    """What train.py builds of a run's parts where there is a GPU."""
    run.model.to_empty(device=GPU)
    run.ranks = Ranks(0, 1, 0, 1, GPU)
    run.dtype = resolve_precision(run.cfg.TRAIN.precision, GPU)
    run.optimizer = build_optimizer(parameter_groups(run.model, run.cfg), run.cfg)
    run.scaler = build_scaler(run.dtype, GPU)
    run.__post_init__()


@contextmanager
def two_ranks() -> Iterator[None]:
    """Be the first of two ranks, whose exchanges move nothing."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, dropout_p=0.0, *_) -> Tensor:
    """What a GPU runs; without one torch takes attention apart."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
    mask = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, dropout_p)[0]


FREE = "device empty empty_like empty_strided new_empty new_empty_strided is_same_size"
FREE += " lift_fresh"  # what makes no launch, beside views


class Launches(TorchDispatchMode):
    """Counts what a GPU would be asked to do, and the largest copy of something repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.repeated = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        is_view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        self.count += not (is_view or name in FREE.split() or name in ("_unsafe_view", "detach"))
        first = args[0] if args else None
        if name in ("clone", "_to_copy", "copy_") and isinstance(first, Tensor):
            source = args[-1] if name == "copy_" else first
            if any(n > 1 and s == 0 for n, s in zip(source.shape, source.stride(), strict=True)):
                self.repeated = max(self.repeated, result.nbytes)
        return result


def full_size(formulation: Callable[[nn.Module], nn.Module]) -> tuple[int, "Launches", int]:
    """RN50's forward pass of 64 refs at 416 px in fp16.

    Returns:
        Bytes kept for the backward pass, what was launched, and the steps of the backward pass.
    """
    cfg = without_archive(load_config(ROOT / "config/refcoco/cris_r50.yaml", []))
    with torch.device("meta"):
        model = build_segmenter(cfg).to(memory_format=torch.channels_last)
    model = formulation(model).train()
    attention = mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention)
    with fake_cuda(), attention, Launches() as launches, kept_bytes() as kept:
        model.to_empty(device=GPU)
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        images = torch.empty(64, 3, 416, 416, device=GPU, memory_format=torch.channels_last)
        tokens = torch.ones(64, cfg.TRAIN.word_len, dtype=torch.int64, device=GPU)
        with torch.autocast("cuda", torch.float16):
            logits = model(images, tokens)
        steps = count_steps(logits.grad_fn)
    return sum(n for k, n in kept.items() if k not in own), launches, steps


VIEWS = (
    "View Permute Transpose TBackward Expand Squeeze Unsqueeze Slice Split Unbind Alias Accumulate"
)


def count_steps(last: torch.autograd.graph.Node) -> int:
    """What the backward pass does that is no view."""
    seen, waiting = set(), [last]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return sum(not any(view in node.name() for view in VIEWS.split()) for node in seen)


def test_a_step_at_full_size_keeps_three_quarters_and_launches_no_more_than_before(record_property):
    kept_published, _, _ = full_size(Published)
    kept, launches, steps = full_size(lambda model: model)
    for what, found, limit in (
        ("share of bytes kept", kept / kept_published, 0.75),
        ("launches, forward", launches.count, FORWARD_LAUNCHES),
        ("steps of the backward pass", steps, BACKWARD_STEPS),
        ("bytes of the largest repetition", launches.repeated, 64 * MIB),
    ):
        record_property("difference", ("RN50, 416 px", what, found, limit))
        assert found <= limit, what


class NoWaits(TorchDispatchMode):
    """Refuses copies between devices that the host waits for; fakes refuse to be read."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, kwargs = function(*args, **(kwargs or {})), kwargs or {}
        if function is torch.ops.aten._to_copy.default:
            assert result.device == args[0].device or kwargs.get("non_blocking")
        elif function is torch.ops.aten.copy_.default:
            assert result.device == args[1].device or args[2:] == (True,)
        return result


class Endless(Batches):
    """A loader whose epoch has not ended when its batches have, so that nothing is logged."""

    def __len__(self) -> int:
        return 99


RECOMPUTED = {"recompute_backbone": True, "recompute_decoder": True}


@pytest.mark.parametrize(
    ("precision", "expected", "options", "ranks"),
    [
        ("auto", torch.float16, {"max_norm": 1.0}, 1),
        ("auto", torch.float16, {}, 2),
        ("auto", torch.float16, RECOMPUTED | {"batch_by": "images"}, 1),
        ("bf16", torch.bfloat16, RECOMPUTED | {"target": "area"}, 2),
        ("fp32", torch.float32, {"max_norm": 1.0, "batch_by": "images"}, 1),
    ],
)
def test_training_steps_mix_no_devices_and_wait_for_nothing(
    tmp_path, data, monkeypatch, precision, expected, options, ranks
):
    keys = {"dropout": 0.1, "precision": precision, "print_freq": 99}
    run = build_run(write_config(tmp_path, data, **keys | options))
    run.train_loader = Endless([next(iter(run.train_loader))])
    types = []
    run.model.register_forward_hook(lambda *call: types.append(call[-1].dtype))

    def backward(loss: Tensor) -> None:
        assert (loss.shape, loss.dtype, loss.device) == ((), torch.float32, GPU)
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(trainer, "means", lambda sums: {"sums": sums})  # it reads them
    # Ranks ask each other for signals on the CPU.
    monkeypatch.setattr(resume, "gather_objects", lambda own: [own])
    monkeypatch.setattr(resume, "any_rank", lambda *flags: flags)
    with two_ranks() if ranks == 2 else nullcontext(), fake_cuda():
        if ranks == 2:
            synchronize_batchnorm(run.model)
        put_on_cuda(run)
        for watched in (nullcontext(), NoWaits()):  # the first step makes tables that stay
            with watched:
                train_one_epoch(run)
        states = [value for state in run.optimizer.state.values() for value in state.values()]
        held = (*states, run.sums, run.faults)
        assert {value.device for value in held} == {GPU}
        assert {value.dtype for value in states} == {torch.float32}
    assert run.step == 2
    assert types == [expected] * 2
    assert run.scaler.is_enabled() == (expected is torch.float16)


def as_zeros(value: Tensor) -> np.ndarray:
    """In place of `Tensor.numpy`, which needs values."""
    assert value.device.type == "cpu"
    assert value.dtype == torch.float32
    return np.zeros(value.shape, np.float32)


def submit(function: Callable, *args: object) -> SimpleNamespace:
    """Call it when its result is asked for: in threads such tensors would not know their device."""
    return SimpleNamespace(result=partial(function, *args))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_and_prediction_bring_maps_to_the_cpu_and_nothing_else(
    tmp_path, data, monkeypatch, precision
):
    run = build_run(write_config(tmp_path, data, batch_size_val=6))
    batch = next(iter(run.val_loader))
    monkeypatch.setattr(Tensor, "numpy", as_zeros)
    monkeypatch.setattr(
        evaluator,
        "_score",
        lambda task, row, squares, *_: {n: maps[row] for n, maps in squares().items()},
    )
    monkeypatch.setattr(evaluator, "_gather", lambda scores, _: scores)
    # It reads whether numbers differ, once an evaluation; these have none.
    monkeypatch.setattr(evaluator, "check_folding", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Event", mock.Mock())
    monkeypatch.setattr(evaluator, "ThreadPoolExecutor", lambda _: mock.Mock(submit=submit))
    monkeypatch.setattr(predictor, "find_device", lambda *_: GPU)
    monkeypatch.setattr(predictor, "restore_trained", lambda *_: (run.model, "none", {}))
    photo = np.zeros((50, 70, 3), np.uint8)
    with fake_cuda():
        run.model.to_empty(device=GPU)
        protocols = resolve_protocols(TestConfig(protocol="both"))
        batch |= {k: v.clone() for k, v in batch.items() if isinstance(v, Tensor)}  # fakes too
        part = {"progress": [batch], "batches": 1}
        scores = evaluate(
            run.model.train(), run.val_loader, GPU, protocols, 4, precision=precision, **part
        )
        predict = Predictor(run.cfg)
        found = predict(photo, ["red star", "blue"]), predict(predict.encode(photo), "a")
    assert {name: len(lines) for name, lines in scores.items()} == dict.fromkeys(
        protocols, len(batch["tasks"])
    )
    assert {line.shape for lines in scores.values() for line in lines} == {(64, 64)}
    assert [[p.mask.shape for p in each] for each in found] == [[(50, 70)] * 2, [(50, 70)]]


def test_a_batch_is_copied_on_a_stream_beside_which_computing_waits_for(monkeypatch):
    told = []

    @contextmanager
    def stream(_: object) -> Iterator[None]:
        told.append("beside")
        yield
        told.append("back")

    compute = SimpleNamespace(wait_stream=lambda _: told.append("wait"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: "beside")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: compute)
    monkeypatch.setattr(Tensor, "to", lambda value, *_, **__: told.append("copy") or value)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: told.append("keep"))
    batch = {"images": torch.ones(2), "tokens": torch.ones(3), "image_index": None, "tasks": ["a"]}
    assert to_device(batch, GPU) == batch
    assert told == ["beside", "copy", "copy", "back", "wait", "keep", "keep"]
    told.clear()
    assert to_device(batch, torch.device("cpu")) == batch
    assert told == ["copy", "copy"]
    _copy_stream.cache_clear()
