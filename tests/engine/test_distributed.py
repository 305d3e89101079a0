"""Two ranks on the CPU compute what one process computes, and torchrun starts them."""

import itertools
import math
import random
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from golden.fill import filled
from helpers import (
    ALONE,
    Batches,
    assert_same,
    build_run,
    error_of,
    load,
    on_cpu,
    spawn,
    torchrun,
    write_config,
)
from torch import nn

from engine.build import build_model
from engine.trainer import Run, forward_backward, train_one_epoch, validate
from utils import distributed
from utils.config import Config
from utils.distributed import Ranks, SyncBatchNorm, name_start, synchronize_batchnorm, unwrap, wrap
from utils.errors import UserError
from utils.transforms import normalize_images

STEPS = 5
EXACT = {"rtol": 1e-6, "atol": 2e-6}
SMALL = 3e-7  # a learning rate that moves the losses by some 5e-4 of them in STEPS
RECIPES = {
    "plain": (),
    "by image": ("TRAIN.batch_by", "images"),
    "accumulated": ("TRAIN.accumulation_steps", 2),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    return write_config(folder, data, dropout=0.0, print_freq=1)


# ------------------------------------------------------- what each rank does, and one process too


def normalise(ranks: Ranks) -> dict[str, torch.Tensor]:
    """A training step and an evaluation of batch norms on this rank's 3 or 5 samples of 8."""
    torch.manual_seed(0)
    norms = nn.ModuleDict(
        {"maps": nn.BatchNorm2d(5), "vectors": nn.BatchNorm1d(3), "halves": nn.BatchNorm2d(5)}
    )
    for parameter in norms.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    inputs = {"maps": 3 + 2 * torch.randn(8, 5, 6, 7), "vectors": 1 + torch.randn(8, 3)}
    inputs["halves"] = inputs["maps"].bfloat16()
    sizes = [8] if ranks.world_size == 1 else [3, 5]
    targets = {name: torch.randn_like(x) for name, x in inputs.items()}
    keys = set(norms.state_dict())
    if ranks.world_size > 1:
        norms = synchronize_batchnorm(norms)
        assert all(isinstance(norm, SyncBatchNorm) for norm in norms.values())
        assert set(norms.state_dict()) == keys
    results = {}
    for name, norm in norms.items():
        share = inputs[name].split(sizes)[ranks.rank].requires_grad_()
        target = targets[name].split(sizes)[ranks.rank]
        output = norm(share)
        (output * target).sum().backward()
        norm.eval()
        results |= {
            f"{name}.output": output.detach(),
            f"{name}.input_gradient": share.grad,
            f"{name}.weight_gradient": norm.weight.grad,
            f"{name}.bias_gradient": norm.bias.grad,
            f"{name}.evaluated": norm(share).detach(),
        }
    return results | {f"state.{key}": value for key, value in norms.state_dict().items()}


# In float64 a difference is a fault. In float32 rounding decides at a ReLU's kink, so gradients
# differ by up to some per cent of their norm, and at this learning rate the losses soon do: see
# docs/distributed.md.
def build_double(cfg: Config, device: torch.device) -> nn.Module:
    return build_model(cfg, device).double()


def normalize_double(images: torch.Tensor) -> torch.Tensor:
    return normalize_images(images).double()


def build_single(cfg: Config, device: torch.device) -> nn.Module:
    """Biases that are not zero, whose norms say what is small; and torch's exact batch norm.

    That of maps with channels last sums in float32 one by one, to 1e-6 instead of 6e-8.
    """
    model = build_model(cfg, device).to(memory_format=torch.contiguous_format)
    spread = filled(model.state_dict())
    biases = {key: value for key, value in spread.items() if key.endswith("bias")}
    model.load_state_dict(biases, strict=False)
    return model


class Losses(list):
    """A tracker that keeps the losses of the steps."""

    def log(self, kind: str, record: dict) -> None:
        if kind == "step":
            self.append(record["loss"])


def descend(
    ranks: Ranks,
    config: Path,
    *opts: object,
    optimizer: type = torch.optim.SGD,
    lr: float = 0.01,
    build: Callable = build_double,
    normalize: Callable = normalize_double,
) -> tuple[list[float], Run]:
    """The first steps of a training, by plain gradient descent or another: losses, and the run."""
    with mock.patch("engine.resume.build_model", build):
        run = build_run(config, *opts, ranks=ranks)
    parameters = {"params": run.model.parameters(), "name": "all"}
    run.optimizer = optimizer([parameters], lr=lr, fused=True)
    run.tracker = Losses()
    batches = itertools.islice(run.train_loader, STEPS * run.cfg.TRAIN.accumulation_steps)
    run.train_loader = Batches(batches)
    normalized = mock.patch("engine.trainer.normalize_images", normalize)
    with on_cpu(), normalized, mock.patch("engine.trainer.set_rates"):
        train_one_epoch(run)
    return list(run.tracker), run


descend_single = partial(descend, build=build_single, normalize=normalize_images)
ADAM = {
    "float64": partial(descend, optimizer=torch.optim.Adam, lr=1e-4),
    "float32": partial(descend_single, optimizer=torch.optim.Adam, lr=SMALL),
}


def synchronised_only_when_complete(ranks: Ranks, config: Path) -> list[bool]:
    """After each of two micro-batches: whether the ranks hold the same gradients."""
    run = build_run(config, "TRAIN.accumulation_steps", 2, ranks=ranks)
    agree = []
    for batch, completes in zip(run.train_loader, (False, True), strict=False):
        forward_backward(run, batch, synchronize=completes)
        gradient = unwrap(run.model).proj.txt.weight.grad
        parts = distributed.gather_objects(gradient.clone())
        agree.append(all(torch.equal(part, gradient) for part in parts))
    return agree


def statistics_after_bad_images(ranks: Ranks, config: Path) -> tuple[dict, dict]:
    """BatchNorm's running statistics before and after a pass with images that one rank spoils."""

    def spoil(images: torch.Tensor) -> torch.Tensor:
        return normalize_images(images) * (math.nan if ranks.rank == 1 else 1.0)

    run = build_run(config, ranks=ranks)
    batch = next(iter(run.train_loader))
    states = []
    with on_cpu():
        for normalize in (normalize_images, spoil):
            with mock.patch("engine.trainer.normalize_images", normalize):
                forward_backward(run, batch, True)
            state = unwrap(run.model).state_dict()
            states.append({k: v.clone() for k, v in state.items() if ".running_" in k})
    return tuple(states)


def on_rank(ranks: Ranks, config: Path, out: Path) -> None:
    """Everything that is compared below, computed by one of two ranks."""
    assert distributed.gather_objects(ranks.rank) == [0, 1]
    assert distributed.mean_over_ranks(torch.tensor([2.0 * ranks.rank])).item() == 1.0
    assert not distributed.wants_launch()
    small = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    plain = wrap(small, ranks, sync_bn=False, static_graph=True)
    assert type(unwrap(plain)[1]) is nn.BatchNorm1d
    results = {"norms": normalise(ranks)}
    for name, opts in RECIPES.items():
        with warnings.catch_warnings(action="error", category=UserWarning):
            losses, run = descend(ranks, config, *opts)
        results[name] = (losses, unwrap(run.model).state_dict())
    losses, run = descend_single(ranks, config, lr=SMALL)
    results["single"] = (losses, unwrap(run.model).state_dict())
    for name, train_by_adam in ADAM.items():
        results[name], _ = train_by_adam(ranks, config)
    results["spoilt"] = statistics_after_bad_images(ranks, config)
    results["agree"] = synchronised_only_when_complete(ranks, config)
    torch.save(results, out / f"{ranks.rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, config) -> list[dict]:
    """The results of both ranks."""
    out = tmp_path_factory.mktemp("results")
    spawn(2, on_rank, config, out)
    return [load(out / f"{rank}.pt") for rank in range(2)]


# ---------------------------------------------------------------------------------- comparisons


def test_batch_norm_over_two_ranks_is_that_of_one_process(two_ranks):
    expected = normalise(ALONE)
    first, second = (results["norms"] for results in two_ranks)
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("state"):
            assert torch.equal(first[name], second[name]), name
            got = first[name]
        elif name.endswith(("weight_gradient", "bias_gradient")):
            got = first[name] + second[name]
        else:
            got = torch.cat([first[name], second[name]])
        limits = {"rtol": 2**-7, "atol": 0.02} if name.startswith("halves") else EXACT
        torch.testing.assert_close(got, value, **limits, msg=name)


def test_two_ranks_train_like_one_process_with_the_whole_batch(two_ranks, config):
    losses, run = descend(ALONE, config)
    assert len(losses) == STEPS
    assert losses[0] > losses[-1]
    state = run.model.state_dict()
    for results in two_ranks:
        got_losses, got_state = results["plain"]
        assert got_losses == pytest.approx(losses, rel=1e-6)
        assert got_state.keys() == state.keys()
        for key, value in state.items():
            scale = value.abs().max().item()
            torch.testing.assert_close(got_state[key], value, rtol=0, atol=1e-9 * scale, msg=key)


@pytest.mark.parametrize("name", ADAM)
def test_two_ranks_have_the_losses_of_one_process_with_adam_too(two_ranks, config, name):
    losses, _ = ADAM[name](ALONE, config)
    assert len(losses) == STEPS
    for results in two_ranks:
        assert results[name] == pytest.approx(losses, rel=1e-5)


def test_two_ranks_train_like_one_process_in_float32_too(two_ranks, config):
    losses, run = descend_single(ALONE, config, lr=SMALL)
    still, _ = descend_single(ALONE, config, lr=0.0)
    # What is compared has moved by more than twenty times the tolerance.
    assert max(abs(a / b - 1) for a, b in zip(losses, still, strict=True)) > 2e-4
    for results in two_ranks:
        got_losses, got_state = results["single"]
        assert got_losses == pytest.approx(losses, rel=1e-5)
        for key, value in run.model.state_dict().items():
            difference = (got_state[key] - value).double().norm()
            assert difference <= 1e-5 * value.double().norm(), key


@pytest.mark.parametrize("name", RECIPES)
def test_ranks_stay_alike(two_ranks, name):
    first, second = (results[name] for results in two_ranks)
    assert first[0] == second[0]
    assert_same(dict(first[1]), dict(second[1]))


def test_ranks_that_accumulate_exchange_gradients_once_a_step(two_ranks):
    for results in two_ranks:
        assert results["agree"] == [False, True]


def test_bad_images_on_one_rank_leave_the_running_statistics_of_all_as_they_were(two_ranks):
    for results in two_ranks:
        before, after = results["spoilt"]
        assert all(values.isfinite().all() for values in before.values())
        assert_same(after, before)
    assert_same(two_ranks[0]["spoilt"][1], two_ranks[1]["spoilt"][1])


def test_every_trained_parameter_is_used_and_its_gradient_lies_as_it_does(config):
    # The one is what DistributedDataParallel insists on; without the other it warns.
    run = build_run(config)
    with on_cpu():
        forward_backward(run, next(iter(run.train_loader)), True)
    trained = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None] == []
    assert [n for n, p in trained.items() if p.grad.stride() != p.stride()] == []


def test_alone_everything_works_without_a_process_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with on_cpu():
        ranks = distributed.start()
        assert ranks == ALONE
        assert not distributed.wants_launch()
    assert ranks.is_main
    assert not ranks._replace(rank=1).is_main
    model = nn.Linear(2, 2)
    assert wrap(model, ranks, sync_bn=True, static_graph=True) is model
    assert unwrap(model) is model
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.mean_over_ranks(torch.tensor([3.0])).item() == 3.0
    distributed.stop()


def announce(monkeypatch, **changes: str | None) -> None:
    """Set what torchrun tells the first of two ranks, but for the changes; None: not set."""
    told = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    told |= {"MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": None} | changes
    for name, value in told.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)


NOT_SET = dict.fromkeys(("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


@pytest.mark.parametrize(
    "changes",
    [
        *(NOT_SET | {name: "0"} for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")),
        *({name: None} for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")),
        *({"RANK": text} for text in ("two", "2", "-1")),
        *({"LOCAL_WORLD_SIZE": text} for text in ("-1", "0")),
        *({"WORLD_SIZE": ""}, {"MASTER_PORT": "99999"}, {"MASTER_ADDR": "a..b"}),
    ],
)
def test_training_where_the_environment_names_half_a_rank(data, tmp_path, monkeypatch, changes):
    config = write_config(tmp_path, data)
    announce(monkeypatch, **changes)
    line = error_of("train.py", config)
    assert line.startswith("the environment names no rank that can start (")
    assert all(f"{name}={value}" in line for name, value in changes.items())
    assert line.endswith("start ranks with torchrun")
    assert not (tmp_path / "exp").exists()


def test_apples_gpu_scores_and_predicts_and_does_not_train(monkeypatch):
    for name in NOT_SET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with on_cpu():
        assert distributed.start(alone=True).device.type == "mps"
        assert distributed.start().device.type == "cpu"


def test_a_plain_start_takes_all_visible_gpus(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.wants_launch()
    announce(monkeypatch)  # torchrun has done it already
    assert not distributed.wants_launch()


def test_more_ranks_than_gpus_are_told_in_a_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    announce(monkeypatch, WORLD_SIZE="3", LOCAL_RANK="2")
    message = r"rank 2 of this machine has no GPU, .* torchrun --nproc_per_node=2, or "
    with pytest.raises(UserError, match=message):
        distributed.start()


# ------------------------------------------------------------------------------------- torchrun


def test_torchrun_with_a_batch_that_does_not_divide_ends_with_one_line(data, tmp_path):
    config = write_config(tmp_path, data)
    opts = ("--opts", "TRAIN.batch_size", 7)
    ending = torchrun(2, "train.py", "--config", config, *opts)
    assert ending.returncode == 1
    message = "error: TRAIN.batch_size 7 must be a multiple of 2 x 1 (ranks x"
    lines = [line for line in ending.stderr.splitlines() if message in line]
    assert 1 <= len(lines) <= 2
    assert not (tmp_path / "exp").exists()


def test_a_refusal_of_rank_0_ends_all_ranks_with_one_line(data, tmp_path):
    config, last = write_config(tmp_path, data), tmp_path / "exp/tiny/last_model.pth"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"of another run")
    ending = torchrun(2, "train.py", "--config", config)
    assert ending.returncode == 1
    assert f"error: {last} is there, and a new training would write over it" in ending.stderr
    assert "[rank" not in ending.stderr  # so torch marks the traceback of one that was left waiting
    assert "terminate called" not in ending.stderr


class Mortal:
    """A store as a rank sees it that stops at random moments, and may die at one of them."""

    def __init__(self, store: torch.distributed.Store, rng: random.Random, lifetime: float) -> None:
        self.store, self.rng, self.lifetime = store, rng, lifetime

    def __getattr__(self, name: str):
        self.lifetime -= 1
        if self.lifetime < 0:
            raise InterruptedError
        time.sleep(self.rng.choice((0, 0, 0.0005, 0.002)))
        return getattr(self.store, name)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_start_has_one_new_name_whatever_dead_ranks_left_in_the_store(num_ranks):
    # Ranks that wait for one that died are ended by torchrun, here by the store's timeout.
    store, rng, names = torch.distributed.HashStore(), random.Random(num_ranks), set()
    with ThreadPoolExecutor(num_ranks) as pool:
        for start in range(40):
            is_last = start % 4 == 3  # nobody dies
            store.set_timeout(timedelta(seconds=30 if is_last else 0.05))
            futures = []
            for rank in rng.sample(range(num_ranks), num_ranks):
                seen = Mortal(
                    store, random.Random(rng.random()), math.inf if is_last else rng.randint(1, 9)
                )
                futures.append(pool.submit(name_start, seen, rank, num_ranks))
            wait(futures)
            if is_last:
                (name,) = {future.result() for future in futures}
                assert name not in names
            names |= {future.result() for future in futures if future.exception() is None}


@pytest.mark.slow
def test_one_process_resumes_what_two_ranks_saved_and_says_what_differs(data, tmp_path, capfd):
    config = write_config(tmp_path, data)
    assert torchrun(2, "train.py", "--config", config).returncode == 0
    last = tmp_path / "exp/tiny/last_model.pth"
    run = build_run(config, "TRAIN.epochs", 2, "TRAIN.resume", last)
    assert run.epoch == 1
    assert f"ranks was 2 when {last} was saved, now 1" in capfd.readouterr().err
    state = load(last)["state_dict"]
    assert_same(dict(run.model.state_dict()), dict(state))


def validate_on_rank(ranks: Ranks, config: Path, folder: Path) -> None:
    run = build_run(config, "TRAIN.sync_bn", False, ranks=ranks)
    train_one_epoch(run)
    before = {k: v.clone() for k, v in unwrap(run.model).state_dict().items()}
    scores = validate(run)
    content = {"before": before, "after": unwrap(run.model).state_dict(), "scores": scores}
    torch.save(content, folder / f"{ranks.rank}.pth")


def test_ranks_with_batch_norms_of_their_own_validate_one_model(config, tmp_path):
    spawn(2, validate_on_rank, config, tmp_path)
    first, second = (load(tmp_path / f"{rank}.pth") for rank in range(2))
    name = "backbone.visual.bn1.running_mean"
    assert not torch.equal(first["before"][name], second["before"][name])
    assert_same(dict(second["after"]), dict(first["after"]))
    assert second["scores"] == first["scores"]
