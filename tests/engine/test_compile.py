"""Training compiled by torch.compile: the same numbers, names and bits on resuming."""

import sys
from collections.abc import Iterator

import pytest
import torch
from helpers import (
    CPU,
    assert_same,
    assert_same_gradients,
    load,
    load_state,
    random_batch,
    run_command,
    run_program,
    small_segmenter,
    spawn,
    write_config,
)
from torch import nn

from engine.build import compile_model
from model.loss import text_to_pixel_loss
from model.segmenter import Segmenter
from utils.distributed import Ranks, unwrap, wrap
from utils.errors import UserError
from utils.transforms import normalize_images

pytestmark = pytest.mark.slow
compiles = pytest.mark.usefixtures("compiler")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> Iterator[None]:
    """Skips where nothing can be compiled; what was compiled is forgotten, here and on the disk.

    Code that another process compiles for other instructions at the same time crashes this one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        try:
            compile_model(torch.nn.Identity(), CPU)
        except UserError as error:
            pytest.skip(str(error))
        torch.compiler.reset()
        yield
        torch.compiler.reset()


def two_passes(model: Segmenter) -> tuple[list[float], Segmenter]:
    """Losses, and the model with the gradients of both; float64, so that rounding hides nothing."""
    photos, tokens, masks = random_batch(4, 64)
    losses = []
    for _ in range(2):
        loss = text_to_pixel_loss(model(normalize_images(photos).double(), tokens), masks)
        loss.backward()
        losses.append(loss.item())
    return losses, model


@compiles
def test_a_compiled_model_computes_what_the_plain_one_does():
    losses, plain = two_passes(small_segmenter().double().train())
    model = small_segmenter().double().train()
    compile_model(model, CPU)
    got_losses, got = two_passes(model)
    assert got_losses == pytest.approx(losses, rel=1e-6)
    assert got.state_dict().keys() == plain.state_dict().keys()
    assert_same_gradients(got, plain)
    for (name, expected), value in zip(plain.named_buffers(), got.buffers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, msg=name)


@compiles
def test_a_compiled_training_resumes_to_the_bit_and_its_checkpoint_is_an_ordinary_one(
    data, tmp_path
):
    opts = ("TRAIN.compile", True)
    straight, parts, plain = (
        write_config(tmp_path / name, data, dropout=0.2, epochs=2, print_freq=1)
        for name in ("straight", "parts", "plain")
    )
    last = parts.parent / "exp/tiny/last_model.pth"
    run_program("train.py", straight, *opts)
    torch.compiler.reset()  # as another process would find it
    run_program("train.py", parts, *opts, "TRAIN.epochs", 1)
    torch.compiler.reset()
    run_program("train.py", parts, *opts, "TRAIN.resume", last)
    assert_same(load_state(last), load_state(straight.parent / "exp/tiny/last_model.pth"))

    run_program("train.py", plain, "TRAIN.resume", last, "TRAIN.epochs", 3)
    assert load(plain.parent / "exp/tiny/last_model.pth")["epoch"] == 3
    run_program("test.py", plain, "TEST.weights", last)


def test_half_precision_compiles_without_a_graph_break_and_to_the_same_bits():
    photos, tokens, _ = random_batch(2, 64)
    plain, model = small_segmenter().train(), small_segmenter().train()
    model.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = (m(normalize_images(photos), tokens) for m in (plain, model))
    got.float().sum().backward()
    assert torch.equal(got, expected)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
    ).double()


def on_rank(ranks: Ranks) -> dict[str, dict]:
    """Three steps on this rank's half of each batch, compiled and not."""
    results = {}
    for name in ("plain", "compiled"):
        net = small_net()
        if name == "compiled":
            compile_model(net, CPU)
        model = wrap(net, ranks, sync_bn=True, static_graph=True)
        traced = torch._dynamo.explain(net)(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
        assert traced.graph_break_count == 0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            batch = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
            model(batch.chunk(2)[ranks.rank]).square().mean(dim=(0, 2, 3))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        results[name] = dict(unwrap(model).state_dict())
    return results


@compiles
def test_two_compiled_ranks_with_synchronised_statistics_train_like_two_plain_ones():
    first, second = spawn(2, on_rank)
    assert_same(first, second)
    assert first["compiled"].keys() == small_net().state_dict().keys()
    start = small_net().state_dict()
    assert not torch.equal(first["plain"]["0.weight"], start["0.weight"])
    for name, value in first["plain"].items():
        torch.testing.assert_close(first["compiled"][name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_without_a_compiler_one_line_says_so_and_nothing_is_written(config, tmp_path):
    command = (sys.executable, "train.py", "--config", config, "--opts", "TRAIN.compile", True)
    ending = run_command(*command, CXX="/nonexistent/g++")
    assert ending.returncode == 1
    *_, line = ending.stderr.splitlines()
    assert line.startswith("error: TRAIN.compile: torch.compile does not work here (")
    assert "install a C++ compiler" in line
    assert "Traceback" not in ending.stderr
    assert not (tmp_path / "exp").exists()
