"""Gradients that are not finite: they never reach the weights, are told of, and may end a run.

Nor do BatchNorm's running statistics keep what is not finite.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_same, build_run, error_of, load, read_jsonl, run_program, write_config

from engine import guard, trainer
from engine.run import Run
from engine.trainer import forward_backward, optimizer_step


@pytest.fixture
def config(tmp_path, data) -> Path:
    return write_config(tmp_path, data, print_freq=1, epochs=2)


def learnt(run: Run) -> dict:
    """Copies of the weights, and of what the optimiser knows."""
    weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    states = [
        {key: value.clone() for key, value in state.items()}
        for state in run.optimizer.state.values()
    ]
    return {"weights": weights, "optimizer": states}


def statistics(run: Run) -> dict[str, torch.Tensor]:
    """Copies of BatchNorm's running means and variances."""
    buffers = run.model.named_buffers()
    return {name: b.clone() for name, b in buffers if name.rsplit(".")[-1].startswith("running_")}


def poison(monkeypatch, is_bad: Callable[[int, dict], bool], fault: float = math.nan) -> None:
    """The first pixel of some batches is not finite: of those for which `is_bad(call, batch)`."""
    forward_backward, normalize, calls = trainer.forward_backward, trainer.normalize_images, []

    def noted(run: Run, batch: dict, synchronize: bool) -> torch.Tensor:
        calls.append(is_bad(len(calls) + 1, batch))
        return forward_backward(run, batch, synchronize)

    def poisoned(images: torch.Tensor) -> torch.Tensor:
        images = normalize(images)
        if calls[-1]:
            images[0, 0, 0, 0] = fault
        return images

    monkeypatch.setattr(trainer, "forward_backward", noted)
    monkeypatch.setattr(trainer, "normalize_images", poisoned)


def step(run: Run, *batches: dict, fault: float | None = None) -> None:
    """A training step over so many micro-batches, at its end with a fault in a gradient."""
    for number, batch in enumerate(batches, start=1):
        trainer.forward_backward(run, batch, number == len(batches))
    if fault is not None:
        graded = (p for p in run.model.parameters() if p.grad is not None)
        next(graded).grad.flatten()[0] = fault
    optimizer_step(run)
    run.position += 1


def small_run(config: Path, precision: str, *opts: object) -> tuple[Run, dict]:
    """A run whose loss is scaled by 64 if at all, and its first batch."""
    run = build_run(config, "TRAIN.precision", precision, "TRAIN.batch_size", 2, *opts)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=precision == "fp16")
    return run, next(iter(run.train_loader))


@pytest.mark.parametrize(
    ("where", "precision", "max_norm", "fault", "optimizer"),
    [
        *[("gradient", "fp32", 0.0, math.inf, None), ("gradient", "fp32", 1.0, math.nan, None)],
        *[("gradient", "bf16", 0.0, math.nan, None), ("gradient", "bf16", 1.0, math.inf, None)],
        *[("gradient", "fp16", 0.0, math.nan, None), ("gradient", "fp16", 1.0, math.inf, None)],
        *[("gradient", "fp32", 0.0, math.nan, k) for k in (torch.optim.SGD, torch.optim.Adagrad)],
        *[("image", "fp32", 0.0, math.nan, None), ("image", "bf16", 0.0, math.inf, None)],
        ("image", "fp16", 0.0, math.nan, None),
    ],
)
def test_a_step_with_what_is_not_finite_changes_nothing(
    config, monkeypatch, where, precision, max_norm, fault, optimizer
):
    poison(monkeypatch, lambda call, _: where == "image" and call == 2, fault)
    run, batch = small_run(config, precision, "TRAIN.max_norm", max_norm)
    if optimizer is not None:
        run.optimizer = optimizer(run.model.parameters(), lr=0.1)
    step(run, batch)
    before, norms = learnt(run), statistics(run)
    assert run.faults.tolist() == [0, 0, 0]
    step(run, batch, fault=fault if where == "gradient" else None)
    assert_same(learnt(run), before)
    if where == "image":
        assert_same(statistics(run), norms)
    assert run.faults.tolist() == [1, 1, 2]
    if precision == "fp16":
        assert run.scaler.get_scale() == 32.0
    step(run, batch)
    after = learnt(run)["weights"] | statistics(run)
    assert all(value.isfinite().all() for value in after.values())
    assert norms
    assert all(not torch.equal(after[name], value) for name, value in norms.items())
    assert any(not torch.equal(after[name], value) for name, value in before["weights"].items())
    assert run.faults.tolist() == [1, 0, 2]


def refs_of_step(config: Path, step: int) -> set[int]:
    """Return the ref_ids of a step of the run."""
    run = build_run(config, "TRAIN.exp_name", "other")
    sampler = run.train_loader.batch_sampler
    epoch, position = divmod(step - 1, sampler.steps)
    sampler.set_epoch(epoch, position)
    visits = next(iter(sampler))
    reader = run.train_loader.dataset.records
    return {reader.ref(position).ref_id for position, _ in visits}


def test_one_bad_step_is_told_with_its_refs(config, tmp_path, monkeypatch, capfd):
    poison(monkeypatch, lambda call, _: call == 2)
    run_program("train.py", config, "TRAIN.print_freq", 3)
    folder = tmp_path / "exp/tiny"
    steps = [r for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] == "step"]
    skipped = [record["skipped_steps"] for record in steps]
    assert steps[0]["loss"] is None  # JSON has no NaN
    assert skipped == [1] + [0] * (len(skipped) - 1)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert "1 steps left out since the last line" in line
    assert "the first is step 2: ref " in line
    assert all(f"ref {ref_id} “" in line for ref_id in refs_of_step(config, 2))
    weights = load(folder / "last_model.pth")["state_dict"].values()
    assert all(torch.isfinite(w).all() for w in weights)


@pytest.mark.parametrize(("start", "steps"), [(2, 3), (3, 4)], ids=["at once", "over epochs"])
def test_a_fault_that_stays_ends_the_run_with_its_refs(config, monkeypatch, start, steps):
    monkeypatch.setattr(guard, "PERSISTENT", steps)  # an epoch has 5
    poison(monkeypatch, lambda call, _: call >= start)
    line = error_of("train.py", config)
    last = start + steps - 1
    assert (
        f"not finite in {steps} steps in a row, and nothing was learnt since step {start}" in line
    )
    assert f"the last is step {last}: ref " in line
    assert all(f"ref {ref_id} “" in line for ref_id in refs_of_step(config, last))


def test_overflows_of_fp16_are_counted(config, tmp_path, capfd):
    run = build_run(config, "TRAIN.precision", "fp16", "TRAIN.batch_size", 2)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    for batch in list(run.train_loader)[:2]:
        before = statistics(run)
        step(run, batch)
        # The pass itself was sound: it counts, as published.
        assert all(not torch.equal(v, before[name]) for name, v in statistics(run).items())
    assert guard.log_skipped_steps(run) == 2
    assert guard.log_skipped_steps(run) == 0
    assert run.scaler.get_scale() == 2.0**58


# ------------------------------------------------------------------- BatchNorm's running statistics


@pytest.mark.parametrize("bad", [1, 2])
def test_a_bad_micro_batch_leaves_the_statistics_to_the_others(config, monkeypatch, bad):
    poison(monkeypatch, lambda call, _: call == bad)
    opts = ("TRAIN.accumulation_steps", 2, "TRAIN.dropout", 0.0)
    run, expected = build_run(config, *opts), build_run(config, *opts)
    before = learnt(run)["weights"]
    first, second = list(run.train_loader)[:2]
    step(run, first, second)
    monkeypatch.undo()
    forward_backward(expected, second if bad == 1 else first, True)
    assert_same(statistics(run), statistics(expected))
    assert_same(learnt(run)["weights"], before)


def test_a_run_with_a_bad_batch_is_finite_and_resumes_exactly(config, tmp_path, monkeypatch):
    keys = ("TRAIN.save_every", 1, "TRAIN.keep_checkpoints", 99, "TRAIN.dropout", 0.2)
    batch = list(build_run(config).train_loader)[1]
    bad = batch["masks"][0]
    poison(monkeypatch, lambda _, batch: any(torch.equal(mask, bad) for mask in batch["masks"]))
    run_program("train.py", config, *keys)
    folder = tmp_path / "exp/tiny"
    straight, records = load(folder / "last_model.pth"), read_jsonl(folder / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    assert [bool(record["skipped_steps"]) for record in steps[:2]] == [False, True]
    assert not all(record["skipped_steps"] for record in steps)
    assert all(values.isfinite().all() for values in straight["state_dict"].values())
    assert all(math.isfinite(r["mIoU"]) for r in records if r["kind"] == "epoch")
    run_program("train.py", config, *keys, "TRAIN.resume", folder / "step_00000002.pth")
    resumed = load(folder / "last_model.pth")
    for state in (straight, resumed):
        del state["config"]
        state["sums"] = [sums.nan_to_num(-1.0) for sums in state["sums"]]  # NaN equals no NaN
    assert_same(resumed, straight)
