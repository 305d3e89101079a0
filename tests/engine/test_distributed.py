"""Two ranks on the CPU compute what one process computes, and torchrun starts them."""

import itertools
import math
import random
import socket
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from golden.fill import filled
from helpers import ALONE, Batches, assert_same, build_run, error_of, spawn, torchrun, write_config
from torch import nn

from engine.build import build_model
from engine.trainer import forward_backward, train_one_epoch, validate
from utils import distributed
from utils.config import Config
from utils.distributed import Ranks, SyncBatchNorm, name_start, synchronize_batchnorm, unwrap, wrap
from utils.errors import UserError
from utils.transforms import normalize_images

STEPS = 5
EXACT = {"rtol": 1e-6, "atol": 2e-6}
# In float64 a difference is a fault. In float32 rounding decides at a ReLU's kink, and gradients
# differ by up to some per cent of their norm. At a larger learning rate the losses soon would too;
# this one moves them by some 5e-4 of them in STEPS.
SINGLE = {"is_double": False, "lr": 3e-7}
RECIPES = {  # what they change in `descend`
    "plain": {},
    "by image": {"opts": ("TRAIN.batch_by", "images")},
    "accumulated": {"opts": ("TRAIN.accumulation_steps", 2)},
    "Adam": {"optimizer": torch.optim.Adam, "lr": 1e-4},
    "float32": SINGLE,
    "float32 Adam": SINGLE | {"optimizer": torch.optim.Adam},
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
    opts: tuple = (),
    optimizer: type = torch.optim.SGD,
    lr: float = 0.01,
    is_double: bool = True,
) -> tuple[list[float], dict]:
    """The first steps of a training: the losses, and the model's state after them."""
    build = (lambda *args: build_model(*args).double()) if is_double else build_single
    with mock.patch("engine.resume.build_model", build):
        run = build_run(config, *opts, ranks=ranks)
    parameters = {"params": run.model.parameters(), "name": "all"}
    run.optimizer = optimizer([parameters], lr=lr, fused=True)
    run.tracker = Losses()
    batches = itertools.islice(run.train_loader, STEPS * run.cfg.TRAIN.accumulation_steps)
    run.train_loader = Batches(batches)
    kind = torch.float64 if is_double else torch.float32
    normalized = mock.patch(
        "engine.trainer.normalize_images", lambda images: normalize_images(images).to(kind)
    )
    with normalized, mock.patch("engine.trainer.set_rates"):
        train_one_epoch(run)
    return list(run.tracker), dict(unwrap(run.model).state_dict())


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
    for normalize in (normalize_images, spoil):
        with mock.patch("engine.trainer.normalize_images", normalize):
            forward_backward(run, batch, True)
        state = unwrap(run.model).state_dict()
        states.append({k: v.clone() for k, v in state.items() if ".running_" in k})
    return tuple(states)


def validate_with_own_statistics(ranks: Ranks, config: Path) -> tuple[dict, dict, dict]:
    """Validate without synchronised norms: the states before and after, and the scores."""
    run = build_run(config, "TRAIN.sync_bn", False, ranks=ranks)
    train_one_epoch(run)
    before = {k: v.clone() for k, v in unwrap(run.model).state_dict().items()}
    scores = validate(run)
    return before, dict(unwrap(run.model).state_dict()), scores


def on_rank(ranks: Ranks, config: Path) -> dict[str, object]:
    """Everything that is compared below, computed by one of two ranks."""
    assert distributed.gather_objects(ranks.rank) == [0, 1]
    assert distributed.any_rank(ranks.rank == 1, False) == (True, False)
    assert not distributed.wants_launch()
    small = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False))
    plain = wrap(small, ranks, sync_bn=False, static_graph=True)
    assert type(unwrap(plain)[1]) is nn.BatchNorm1d
    results = {"norms": normalise(ranks)}
    for name, changes in RECIPES.items():
        # It may warn of the layout of gradients: `build_single`.
        action = "default" if name.startswith("float32") else "error"
        with warnings.catch_warnings(action=action, category=UserWarning):
            results[name] = descend(ranks, config, **changes)
    results["spoilt"] = statistics_after_bad_images(ranks, config)
    results["agree"] = synchronised_only_when_complete(ranks, config)
    results["validated"] = validate_with_own_statistics(ranks, config)
    return results


@pytest.fixture(scope="module")
def two_ranks(config) -> list[dict]:
    """The results of both ranks."""
    return spawn(2, on_rank, config)


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


# By image, a photo whose refs two ranks share is normalised by both.
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "by image"])
def test_two_ranks_train_like_one_process_with_the_whole_batch(two_ranks, config, name):
    losses, state = descend(ALONE, config, **RECIPES[name])
    assert len(losses) == STEPS
    is_plain = name == "plain"
    assert losses[0] > losses[-1] or not is_plain
    if name == "float32":  # what is compared has moved by more than twenty times the tolerance
        still, _ = descend(ALONE, config, **SINGLE | {"lr": 0.0})
        assert max(abs(a / b - 1) for a, b in zip(losses, still, strict=True)) > 2e-4
    for got_losses, got_state in (results[name] for results in two_ranks):
        assert got_losses == pytest.approx(losses, rel=1e-6 if is_plain else 1e-5)
        assert got_state.keys() == state.keys()
        for key, value in state.items() if "Adam" not in name else ():
            difference, scale = (got_state[key] - value).double(), value.double()
            if is_plain:
                assert difference.abs().max() <= 1e-9 * scale.abs().max(), key
            else:
                assert difference.norm() <= 1e-5 * scale.norm(), key


@pytest.mark.parametrize("name", RECIPES)
def test_ranks_stay_alike(two_ranks, name):
    first, second = (results[name] for results in two_ranks)
    assert_same(first, second)


def test_ranks_that_accumulate_exchange_gradients_once_a_step(two_ranks):
    for results in two_ranks:
        assert results["agree"] == [False, True]


def test_bad_images_on_one_rank_leave_the_running_statistics_of_all_as_they_were(two_ranks):
    for results in two_ranks:
        before, after = results["spoilt"]
        assert all(values.isfinite().all() for values in before.values())
        assert_same(after, before)
    assert_same(two_ranks[0]["spoilt"][1], two_ranks[1]["spoilt"][1])


def test_ranks_with_batch_norms_of_their_own_validate_one_model(two_ranks):
    (before, after, scores), (other_before, other_after, other_scores) = (
        results["validated"] for results in two_ranks
    )
    name = "backbone.visual.bn1.running_mean"
    assert not torch.equal(before[name], other_before[name])
    assert_same(other_after, after)
    assert other_scores == scores


def test_every_trained_parameter_is_used_and_its_gradient_lies_as_it_does(config):
    # The one is what DistributedDataParallel insists on; without the other it warns.
    run = build_run(config)
    forward_backward(run, next(iter(run.train_loader)), True)
    trained = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None] == []
    assert [n for n, p in trained.items() if p.grad.stride() != p.stride()] == []


def test_alone_everything_works_without_a_process_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = distributed.start()
    assert ranks == ALONE
    assert not distributed.wants_launch()
    assert ranks.is_main
    assert not ranks._replace(rank=1).is_main
    model = nn.Linear(2, 2)
    assert wrap(model, ranks, sync_bn=True, static_graph=True) is model
    assert unwrap(model) is model
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.any_rank(True, False) == (True, False)
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


def test_training_where_another_program_has_the_port_of_the_environment(
    data, tmp_path, monkeypatch
):
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=both) as busy:
        announce(monkeypatch, WORLD_SIZE="1", MASTER_PORT=str(busy.getsockname()[1]))
        line = error_of("train.py", write_config(tmp_path, data))
    assert line.startswith("ranks cannot meet at 127.0.0.1:")
    assert "address already in use" in line
    assert line.endswith("start ranks with torchrun")


def test_apples_gpu_scores_and_predicts_and_does_not_train(monkeypatch):
    announce(monkeypatch, **NOT_SET)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
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
