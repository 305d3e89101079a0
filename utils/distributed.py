"""The one place that touches `torch.distributed`; without a process group everything still works.

Ranks come from `torchrun`'s environment, which only this file reads. CUDA ranks speak nccl, CPU
ranks gloo, and what lies on the CPU always goes by gloo, so that no device waits for it.
"""

import os
import socket
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError
from utils.signals import obeyed

REMEDY = "unset WORLD_SIZE, RANK and LOCAL_RANK for a single process, or start ranks with torchrun"


class Ranks(NamedTuple):
    """Where this process stands."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the person."""
        return self.rank == 0


def start(alone: bool = False) -> Ranks:
    """Join the process group that `torchrun` announced, if it did, and choose the device.

    Args:
        alone: stay a single process whatever the environment says, on Apple's GPU as well.
    Raises:
        UserError: there are GPUs, and fewer than ranks on this machine; or the environment names
            ranks, but not as torchrun does; or they cannot meet.
    """
    announced = None if alone else _announced()
    rank, world_size, local_rank, local_size = announced or (0, 1, 0, 1)
    has_mps = alone and torch.backends.mps.is_available()
    device = torch.device("mps" if has_mps else "cpu")
    if torch.cuda.is_available():
        if local_rank >= (count := torch.cuda.device_count()):
            raise UserError(
                f"rank {local_rank} of this machine has no GPU, since {count} can be seen: give "
                f"torchrun --nproc_per_node={count}, or show more in CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    ranks = Ranks(rank, world_size, local_rank, local_size, device)
    if announced is None:
        return ranks
    backend, own = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    told = {"rank": rank, "world_size": world_size, "device_id": own}
    host, port, store = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps one store for all its starts, and torch (2.13) reads there, after a
            # restart, under which address a dead rank listened; ranks would wait for it until the
            # timeout. A count of restarts cannot tell starts apart: nodes may count differently.
            shared = dist.TCPStore(host, port, timeout=dist.default_pg_timeout)
            store = dist.PrefixStore(name_start(shared, rank, world_size), shared)
        dist.init_process_group(backend, store=store, **told)
    except dist.DistError as error:
        where = f"{host}:{port} ({str(error).splitlines()[0]})"
        line = f"ranks cannot meet at {where}: give another MASTER_PORT, or {REMEDY}"
        raise UserError(line) from None
    return ranks


def _announced() -> tuple[int, int, int, int] | None:
    """Return the first four fields of `Ranks` as torchrun gives them; None without any rank."""
    given = {"LOCAL_WORLD_SIZE": "1"} | os.environ
    if not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & given.keys():
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    try:
        rank, size, local_rank, local_size, port = (int(given[name]) for name in names)
        is_rank = 0 <= rank < size and 0 <= local_rank < size and local_size > 0
        if not (is_rank and 0 < port < 1 << 16):
            raise ValueError("no such rank or port")
        socket.getaddrinfo(given["MASTER_ADDR"], port)
    except (KeyError, ValueError, OSError) as error:
        told = ", ".join(f"{name}={given.get(name)}" for name in (*names, "MASTER_ADDR"))
        line = f"the environment names no rank that can start ({error}): {told}; {REMEDY}"
        raise UserError(line) from None
    return rank, size, local_rank, local_size


def name_start(store: dist.Store, rank: int, world_size: int) -> str:
    """Return a name of this start of the ranks: the same on all of them, and new.

    What dead ranks wrote is still in the store. So each other rank calls with a word of its own and
    believes only what answers that; rank 0 answers with the name until it is called by it, at most
    for the store's timeout.
    """
    word, deadline = uuid4().hex, time.monotonic() + store.timeout.total_seconds()
    if rank > 0:
        store.set(f"start/call/{rank}", word)
        name = store.get(f"start/answer/{word}").decode()
        store.set(f"start/{name}/{rank}", "")
        return name
    for other in range(1, world_size):
        while not store.check([f"start/{word}/{other}"]):
            if time.monotonic() > deadline:
                raise UserError(f"rank {other} has not started")
            call = store.get(f"start/call/{other}").decode()  # perhaps a dead rank's
            store.set(f"start/answer/{call}", word)
            time.sleep(0.01)
    return word


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wants_launch() -> bool:
    """Whether a plain `python train.py` sees several GPUs and nobody launched ranks for them."""
    return _announced() is None and torch.cuda.device_count() > 1


def launch() -> None:
    """Run this very command once per visible GPU, through torch's own launcher.

    A rank that fails has said why; its exit code ends this process too.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        count = torch.cuda.device_count()
        # torch's launcher would pass on a hang-up even where nohup has it ignored.
        passed = ",".join(number.name for number in obeyed())
        options = ("--standalone", f"--nproc_per_node={count}", f"--signals-to-handle={passed}")
        main([*options, *sys.argv])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)


def gather_objects(item: Any) -> list[Any]:
    """Every rank's `item`, on every rank, in the order of ranks."""
    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether it is set on any rank; no device waits for it."""
    return tuple(map(any, zip(*gather_objects(flags), strict=True)))


def is_restart() -> bool:
    """Tell whether torchrun has started this process in place of one that failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def wrap(model: nn.Module, ranks: Ranks, sync_bn: bool, static_graph: bool) -> nn.Module:
    """Make the model train on all ranks; a single process gets it back as it is.

    Args:
        model: on `ranks.device`.
        sync_bn: let BatchNorm see the batch of all ranks.
        static_graph: every pass uses the same parameters. Not together with `no_sync`: torch's
            reducer fails on an unsynchronised first pass then (2.13).
    """
    if ranks.world_size == 1:
        return model
    if sync_bn:
        model = synchronize_batchnorm(model)
    return DistributedDataParallel(
        model,
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        forward_sync_buffers=not sync_bn,
        static_graph=static_graph,
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `wrap`."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def share_buffers(model: nn.Module) -> None:
    """Give all ranks rank 0's buffers, as DistributedDataParallel does before each forward pass.

    After a step without synchronised BatchNorm each rank has statistics of its own, and a
    validation that is shared between ranks would score several models.
    """
    if not dist.is_initialized():
        return
    # Integers only count batches, of which each rank had the same number.
    buffers = [buffer for buffer in unwrap(model).buffers() if buffer.is_floating_point()]
    joined = torch.cat([buffer.flatten() for buffer in buffers])
    dist.broadcast(joined, 0)
    parts = joined.split([buffer.numel() for buffer in buffers])
    for buffer, values in zip(buffers, parts, strict=True):
        buffer.copy_(values.view_as(buffer))


def no_sync(model: nn.Module) -> AbstractContextManager:
    """A context in which backward passes exchange no gradients, for accumulation."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def synchronize_batchnorm(model: nn.Module) -> nn.Module:
    """Turn every BatchNorm into one over all ranks, in place; names and values stay.

    One without parameters or statistics of its own stays as it is.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine and module.track_running_stats:
            module.__class__ = SyncBatchNorm  # which keeps no state of its own
    return model


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the batches of all ranks, which may differ in size, on any device.

    Unlike torch's it also runs on CPUs, never waits for the device, and torch.compile takes it.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept every number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, …) -> the same shape and type, normalised over the B of all ranks."""
        if not self.training:
            return super().forward(input)
        with torch.no_grad():
            mean, variance, count = _joined_moments(input, self.weight, self.eps)
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return _Normalize.apply(input, self.weight, self.bias, mean, variance, count, self.eps)


def _joined_moments(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance of each channel over all ranks, and the count of values.

    Ranks may see different numbers of images (TRAIN.batch_by images), so each tells its own. Their
    moments are merged: sums of squares would cancel.

    Args:
        weight: whose type, float32 at least, the moments have.
    """
    if x.dtype == weight.dtype:
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    else:  # the one reduction of half inputs that sums in float32 without a copy of them
        reduce = torch.ops.aten._native_batch_norm_legit.no_stats
        _, mean, rate = reduce(x, weight, weight, True, 0.0, eps)
        variance = rate.square().reciprocal() - eps
    row = torch.cat([mean, variance, mean.new_full((1,), x.numel() // len(mean))])
    rows = row.new_empty(dist.get_world_size() * len(row))  # gloo knows no rows
    dist.all_gather_single(rows, row)
    sizes = [len(mean), len(mean), 1]
    means, variances, counts = rows.view(-1, len(row)).split(sizes, dim=1)
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    squares = (variances + (means - mean).square()) * counts
    return mean, squares.sum(0) / count, count


class _Normalize(torch.autograd.Function):
    """Normalisation by moments over all ranks, through which gradients flow to every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *moments: Any) -> Tensor:
        mean, variance, count, eps = moments
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        # As if the moments were constants; then what flows through them, which has the form of
        # a normalisation as well.
        direct, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True] * 3
        )
        sums = torch.stack([of_weight, of_bias])
        dist.all_reduce(sums)
        sums *= -weight * (variance + ctx.eps).rsqrt() / count
        through = F.batch_norm(x, mean, variance, *sums, False, 0.0, ctx.eps)
        return direct + through, of_weight, of_bias, None, None, None, None
