"""The training loop, through train.py on a tiny set or on a `Run` that train.py built."""

import math
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch
from helpers import (
    Batches,
    all_refs,
    assert_equal_runs,
    assert_same,
    assert_same_gradients,
    build_run,
    load,
    load_state,
    read_metrics,
    repack,
    run_program,
    write_any_number,
    write_config,
)

from engine import trainer
from engine.trainer import Run, forward_backward, optimizer_step, train_one_epoch
from model.loss import text_to_pixel_loss
from utils.config import load_config
from utils.metrics import METRIC_NAMES
from utils.records import RecordReader
from utils.transforms import normalize_images, normalize_masks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def recipe(folder: Path, data: Path, **keys: object) -> Path:
    """Dropout on, and three rates that differ."""
    return write_config(folder, data, dropout=0.2, milestones=[2], lr_multi=0.1, **keys)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data) -> Path:
    """The folder of a run of three epochs without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    run_program("train.py", recipe(folder, data, epochs=3), "TRAIN.workers_val", 2)
    return folder


def num_steps(data: Path) -> int:
    """Of an epoch in batches of 8."""
    return len(RecordReader(data / "lmdb/shapes/train.lmdb")) // 8


# ------------------------------------------------------------------------------------- the run


def test_resumed_training_equals_uninterrupted_training_to_the_bit(straight, tmp_path, data):
    # Other numbers of workers before and after must change nothing.
    config = recipe(tmp_path, data)
    last = tmp_path / "exp/tiny/last_model.pth"
    run_program("train.py", config, "TRAIN.epochs", 1, "TRAIN.workers", 2)
    run_program("train.py", config, "TRAIN.epochs", 2, "TRAIN.resume", last)
    run_program("train.py", config, "TRAIN.epochs", 3, "TRAIN.resume", last, "TRAIN.workers", 2)
    assert_equal_runs(tmp_path / "exp/tiny", straight / "exp/tiny")


def test_where_sentences_may_be_about_nothing_giou_under_the_rule_is_the_best(tmp_path, data):
    opts, config = ["TEST.threshold", 0.2], write_config(tmp_path, data)
    for split in ("train", "val"):
        path = write_any_number(data / f"lmdb/shapes/{split}.lmdb", tmp_path / f"{split}.lmdb")
        opts += [f"DATA.{split}_lmdb", path]
    run_program("train.py", config, *opts, "TRAIN.epochs", 2)
    folder = tmp_path / "exp/tiny"
    state, records = load(folder / "last_model.pth"), read_metrics(folder)
    scores = [record["gIoU"] for record in records if record["kind"] == "epoch"]
    assert state["best_iou"] == max(scores)
    assert all("mIoU" not in record for record in records)
    assert state["best_on"]["no_target_pixels"] == 50
    assert state["no_target"] is True
    resumed = (*opts, "TRAIN.epochs", 3, "TRAIN.resume", "auto")
    assert build_run(config, *resumed).best == max(scores)
    assert build_run(config, *resumed, "TEST.no_target_pixels", 1).best == -1
    log = (folder / "train.log").read_text()
    assert "N-acc" in log
    assert "(none: under 50 pixels)" in log


def test_deterministic_algorithms_are_on_in_every_step(config, data, monkeypatch):
    seen, step = [], trainer.optimizer_step

    def watched(run: Run) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        step(run)

    monkeypatch.setattr(trainer, "optimizer_step", watched)
    run_program("train.py", config, "TRAIN.deterministic", True)
    assert seen == [True] * num_steps(data)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_number_of_objects_of_a_mask_changes_no_bit_of_a_training(straight, tmp_path, data):
    """A mask is a mask: `straight` has records of one object a ref, as all data sets had."""
    source = data / "lmdb/shapes/train.lmdb"
    refs = [replace(ref, num_targets=2) for ref in all_refs(source)]
    path, config = repack(source, tmp_path / "train.lmdb", refs), recipe(tmp_path, data, epochs=3)
    run_program("train.py", config, "TRAIN.workers_val", 2, "DATA.train_lmdb", path)
    folders = tmp_path / "exp/tiny", straight / "exp/tiny"
    got, expected = (load_state(folder / "last_model.pth") for folder in folders)
    assert got.pop("records") != expected.pop("records")
    assert_same(got, expected)
    assert read_metrics(folders[0]) == read_metrics(folders[1])


@pytest.mark.parity
def test_a_sentence_about_nothing_has_a_target_of_zeros(config, tmp_path):
    run = build_run(config)
    batch = next(iter(run.train_loader))
    batch["masks"][:] = 0
    images = normalize_images(batch["images"])
    logits = run.model(images, batch["tokens"], batch["image_index"])
    loss = text_to_pixel_loss(logits, normalize_masks(batch["masks"]))
    expected = -torch.nn.functional.logsigmoid(-logits.double()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_another_seed_gives_another_run(straight, tmp_path, data):
    run_program("train.py", recipe(tmp_path, data, manual_seed=1))
    first_loss = read_metrics(tmp_path / "exp/tiny")[0]["loss"]
    assert first_loss != read_metrics(straight / "exp/tiny")[0]["loss"]


def test_records_hold_steps_and_epochs_with_the_rates_that_were_used(straight, data):
    records = read_metrics(straight / "exp/tiny")
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    n = num_steps(data)
    logged = [*range(2, n, 2), n]  # print_freq 2, and the last
    assert [record["kind"] for record in records] == (["step"] * len(logged) + ["epoch"]) * 3
    assert [r["step"] for r in steps] == [epoch * n + step for epoch in range(3) for step in logged]
    assert [(r["epoch"], r["step"]) for r in epochs] == [(1, n), (2, 2 * n), (3, 3 * n)]
    common = {"kind", "epoch", "step", *trainer.TRAINING_METRICS}
    assert set(steps[0]) == common | {"lr_backbone", "lr_head", "skipped_steps"}
    assert set(epochs[0]) == common | {*METRIC_NAMES, "sentences"}
    # As released: the first epoch at the head's rate for all; a milestone multiplies by lr_decay.
    rates = {1: (1e-3, 1e-3), 2: (1e-4, 1e-3), 3: (1e-5, 1e-4)}
    for record in steps:
        assert (record["lr_backbone"], record["lr_head"]) == pytest.approx(rates[record["epoch"]])


def test_an_epoch_reports_the_mean_over_its_steps(tmp_path, data):
    for print_freq in (1, 3):
        folder = tmp_path / str(print_freq)
        run_program("train.py", write_config(folder, data, print_freq=print_freq))
    *steps, epoch = read_metrics(tmp_path / "1" / "exp/tiny")
    *windows, same_epoch = read_metrics(tmp_path / "3" / "exp/tiny")
    assert len(steps) == num_steps(data)
    assert epoch == pytest.approx(same_epoch, abs=1e-6)
    for name in ("loss", "train_mIoU", "train_Pr@0.5"):
        values = [record[name] for record in steps]
        assert epoch[name] == pytest.approx(mean(values), abs=1e-6)
        expected = [mean(values[i : i + 3]) for i in range(0, len(values), 3)]
        assert [record[name] for record in windows] == pytest.approx(expected, abs=1e-6)


def test_log_and_saved_config_tell_the_run(straight, data):
    text = (straight / "exp/tiny/train.log").read_text()
    sentences = RecordReader(data / "lmdb/shapes/val.lmdb").meta["sentences"]
    for expected in (
        "step        1 rank(s) x 8 x 1 (accumulation) = batch 8",
        f"epoch 1 step 2/{num_steps(data)}",
        "epoch 3/3: loss",
        " % waiting for data, ",
        " GiB, ",
        f"shapes val, {sentences} sentences, published: mIoU ",
        "(best)",
    ):
        assert expected in text
    assert "\x1b" not in text
    saved = load_config(straight / "exp/tiny/config.yaml")
    assert saved == load_config(straight / "tiny.yaml", ["TRAIN.workers_val", "2"])


def test_short_epochs_do_not_fill_the_log(tmp_path, data):
    train = {"batch_size": 8 * num_steps(data), "epochs": 12, "val_freq": 6, "print_freq": 5}
    train["input_size"] = 32
    run_program("train.py", write_config(tmp_path, data, **train))
    text = (tmp_path / "exp/tiny/train.log").read_text()
    assert re.findall(r"epoch (\d+) step 1/1: loss .* refs/s", text) == ["1", "6", "11"]
    assert re.findall(r"epoch (\d+)/12: loss", text) == ["1", "6", "11", "12"]
    assert len(read_metrics(tmp_path / "exp/tiny")) == 24


def test_start_epoch_counts_from_there_and_the_warm_up_from_the_first_step(tmp_path, data):
    keys = {"epochs": 4, "start_epoch": 3, "milestones": [1], "print_freq": 1, "warmup_steps": 4}
    run_program("train.py", write_config(tmp_path, data, **keys))
    *steps, epoch = read_metrics(tmp_path / "exp/tiny")
    assert epoch["epoch"] == 4
    rates = [0.25e-4, 0.5e-4, 0.75e-4, *[1e-4] * (num_steps(data) - 3)]
    assert [step["lr_head"] for step in steps] == pytest.approx(rates)


def test_validating_now_and_then_saves_then_and_at_the_end(config, tmp_path):
    folder = tmp_path / "exp/tiny"
    run_program("train.py", config, "epochs", 5, "val_freq", 2)
    epochs = [record for record in read_metrics(tmp_path / "exp/tiny") if record["kind"] == "epoch"]
    assert [record["epoch"] for record in epochs] == [1, 2, 3, 4, 5]
    assert [record["epoch"] for record in epochs if "mIoU" in record] == [2, 4, 5]
    assert all("loss" in record for record in epochs)
    assert load(folder / "last_model.pth")["epoch"] == 5


def test_the_best_model_survives_worse_epochs_and_a_resume(config, tmp_path, monkeypatch):
    scores = iter([0.3, 0.5, 0.2, 0.4, 0.6])
    zeros = dict.fromkeys(METRIC_NAMES, 0.0) | {"sentences": 35}
    monkeypatch.setattr(trainer, "validate", lambda run: zeros | {"mIoU": next(scores)})
    folder = tmp_path / "exp/tiny"

    def epochs_kept() -> dict[str, tuple[int, float]]:
        states = {name: load(folder / f"{name}_model.pth") for name in ("last", "best")}
        return {name: (state["epoch"], state["best_iou"]) for name, state in states.items()}

    run_program("train.py", config, "epochs", 3)
    assert epochs_kept() == {"last": (3, 0.5), "best": (2, 0.5)}
    run_program("train.py", config, "epochs", 4, "resume", folder / "last_model.pth")
    assert epochs_kept() == {"last": (4, 0.5), "best": (2, 0.5)}
    run_program("train.py", config, "epochs", 5, "resume", folder / "last_model.pth")
    assert epochs_kept() == {"last": (5, 0.6), "best": (5, 0.6)}
    before = (folder / "last_model.pth").read_bytes()  # of a run that is finished
    run_program("train.py", config, "epochs", 5, "resume", folder / "last_model.pth")
    assert (folder / "last_model.pth").read_bytes() == before


# --------------------------------------------------------------------------------- single steps


def batch_of(run: Run) -> dict:
    return next(iter(run.train_loader))


def accumulate(run: Run, *batches: dict) -> float:
    """Add up gradients in evaluation mode, since batch norm sees a pass alone: the mean loss."""
    run.model.eval()
    return mean(forward_backward(run, batch, True)[0].item() for batch in batches)


def test_one_batch_is_learnt(config):
    run = build_run(config, "TRAIN.target", "area", "TRAIN.print_freq", 60)
    run.train_loader = Batches([batch_of(run)] * 60)
    before = forward_backward(run, run.train_loader[0], True)[0].item()
    run.optimizer.zero_grad()
    train_one_epoch(run)
    loss, iou, *_ = forward_backward(run, run.train_loader[0], True).tolist()
    assert loss < 0.2 * before  # of any loss that falls to 0
    assert before > 0.5
    assert iou > 0.3


def test_two_half_batches_accumulate_to_the_gradient_of_the_whole(config):
    whole, parts = build_run(config), build_run(config, "TRAIN.accumulation_steps", 2)
    batch = batch_of(whole)
    tensors = {key: value for key, value in batch.items() if value is not None}
    halves = [batch | {key: value[i::2] for key, value in tensors.items()} for i in (0, 1)]
    assert accumulate(parts, *halves) == pytest.approx(accumulate(whole, batch), rel=1e-6)
    assert_same_gradients(parts.model, whole.model)


def test_an_image_is_encoded_once_for_its_refs_and_they_learn_the_same(config):
    by_image, by_ref = build_run(config, "TRAIN.batch_by", "images"), build_run(config)
    batch = batch_of(by_image)
    assert len(batch["images"]) < len(batch["tokens"]) == 8
    repeated = batch | {"images": batch["images"][batch["image_index"]], "image_index": None}
    assert accumulate(by_image, batch) == pytest.approx(accumulate(by_ref, repeated), rel=1e-6)
    assert_same_gradients(by_image.model, by_ref.model)


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_acts_on_gradients_whose_scaling_is_undone(config, max_norm):
    run = build_run(config, "TRAIN.max_norm", max_norm)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in run.model.parameters()]
    forward_backward(run, batch_of(run), True)
    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
    norm = torch.cat([g.flatten() for g in grads]).norm().item() / 4096
    optimizer_step(run)
    moves = [(a - b).flatten() for a, b in zip(before, run.model.parameters(), strict=True)]
    assert torch.cat(moves).norm().item() == pytest.approx(min(norm, max_norm), rel=1e-3)


# ------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", CPU, torch.float32),
        ("auto", CUDA, torch.float16),
        ("fp32", CUDA, torch.float32),
        ("bf16", CPU, torch.bfloat16),
        ("fp16", CPU, torch.float16),
    ],
)
def test_automatic_precision_is_fp16_on_cuda_and_only_that_scales_the_loss(name, device, expected):
    assert trainer.resolve_precision(name, device) is expected
    assert trainer.build_scaler(expected, CPU).is_enabled() is (expected is torch.float16)


def test_lower_precision_runs_on_the_cpu_keeps_float32_weights_and_may_change(config, tmp_path):
    folder = tmp_path / "exp/tiny"
    for epochs, precision in enumerate(("fp16", "bf16", "fp16"), start=1):
        opts = ("epochs", epochs, "resume", "auto", "input_size", 32, "TRAIN.precision", precision)
        run_program("train.py", config, *opts)
        state = load(folder / "last_model.pth")
        assert state["epoch"] == epochs
        assert {w.dtype for w in state["state_dict"].values()} == {torch.float32, torch.int64}
        assert bool(state["scaler"]) == (precision == "fp16")
    assert all(math.isfinite(record["loss"]) for record in read_metrics(folder))


# ------------------------------------------------------------------------------ Weights & Biases


def test_wandb_offline_gets_pictures_each_epoch_and_goes_on_as_the_same_run(
    config, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "exp/tiny"
    for epochs in (1, 2):
        opts = ("TRAIN.resume", "auto", "TRAIN.epochs", epochs, "TRAIN.val_pictures", 2)
        run_program("train.py", config, "TRAIN.wandb", "offline", *opts)
    starts = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(starts) == 2
    run_id = (folder / "wandb_run").read_text().strip()
    for start in starts:
        assert (start / f"run-{run_id}.wandb").stat().st_size > 0
        assert len(list(start.rglob("files/media/**/*.png"))) == 2
    assert [r["epoch"] for r in read_metrics(folder) if r["kind"] == "epoch"] == [1, 2]
