"""What can be said about speed without a clock: operations, and that both formulations agree."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import random_batch, run_command, small_segmenter, write_config
from test_golden import case_config

from model.loss import text_to_pixel_loss
from model.segmenter import Segmenter, build_segmenter
from tools import formulations, published
from tools.formulations import BY_IMAGES, OURS, PUBLISHED
from tools.latency import PARTS
from tools.measure import count_flops, flops_by_part
from tools.parts import OPTIMIZER, training_parts
from tools.published import Published
from utils.errors import UserError
from utils.records import RecordReader
from utils.transforms import normalize_images

SIDE = 416


# --------------------------------------------------------------------------------------- operations


@pytest.fixture(scope="module")
def rn50() -> Segmenter:
    """The published size, without memory: operations are counted and not carried out."""
    with torch.device("meta"):
        return build_segmenter(case_config("rn50"))


def meta_batch(images: int, sentences: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.empty(sentences, 17, dtype=torch.int64, device="meta")
    return torch.empty(images, 3, SIDE, SIDE, device="meta"), tokens


def test_published_formulation_executes_the_operations_that_are_known_of_it(rn50):
    image, tokens = meta_batch(1, 1)
    with torch.no_grad():
        total = count_flops(lambda: Published(rn50.eval())(image, tokens))
    assert total / 1e9 == pytest.approx(131.7, abs=0.5)


def test_an_image_costs_its_share_once_and_the_projector_a_third(rn50):
    image, tokens = meta_batch(1, 7)
    index = torch.zeros(7, dtype=torch.int64, device="meta")

    def call() -> None:
        with torch.no_grad():
            rn50.eval().segment(rn50.encode_image(image).repeat(index), tokens)

    parts = flops_by_part(rn50, call, ["backbone.visual", "neck", "decoder", "proj"])
    assert parts["backbone.visual"] / 1e9 == pytest.approx(42.7, abs=0.5)
    assert parts["decoder"] / 7e9 == pytest.approx(17.8, abs=0.3)
    assert parts["proj"] / 7e9 <= 39.8 / 3
    # RefCOCO's val has 7.2 sentences an image.
    assert sum(parts.values()) / 7e9 <= 131.7 / 2.3


def test_a_training_step_executes_at_most_four_fifths(rn50):
    image, tokens = meta_batch(4, 4)
    mask = torch.empty(4, 1, SIDE, SIDE, device="meta")
    counts = {}
    for name, model in {"published": Published(rn50), "ours": rn50}.items():
        model.train()
        counts[name] = count_flops(
            lambda model=model: text_to_pixel_loss(model(image, tokens), mask).backward()
        )
    assert counts["ours"] <= 0.8 * counts["published"]


# ----------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("count", [1, 3])
def test_both_give_the_same_logits_and_gradients(count):
    photos, tokens, masks = random_batch(count, 64)
    image = normalize_images(photos)
    ours, theirs = small_segmenter().eval().double(), Published(small_segmenter().eval().double())
    image, masks = image.double(), masks.double()
    found, expected = ours(image, tokens), theirs(image, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    for logits in (found, expected):
        (logits * masks[..., ::4, ::4]).sum().backward()
    pairs = dict(theirs.named_parameters())
    assert pairs.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                parameter.grad, pairs[name].grad, rtol=1e-5, atol=1e-6, msg=name
            )


@pytest.fixture
def args(data, tmp_path) -> Namespace:
    config = write_config(tmp_path, data)
    return Namespace(
        config=str(config),
        opts=[],
        threads=1,
        device="cpu",
        rounds=2,
        batch=4,
        sentences=9,
        by_images=True,
        parts=True,
        command="train",
        way=None,
    )


@pytest.fixture
def lmdb(data) -> Path:
    return data / "lmdb/shapes/val.lmdb"


def test_evaluation_compares_the_same_sentences_and_counts_the_same_pixels(args, lmdb):
    result = formulations.compare_evaluation(args, lmdb)
    assert list(result["ways"]) == [PUBLISHED, OURS]
    assert result["difference"]["intersection or union of a sentence, pixels"] <= 5
    # Random weights magnify rounding: float64 is as far from the published formulation.
    assert result["difference"]["logits, over the kernel's largest response"] <= 1e-4
    assert result["difference"]["mIoU"] <= 1e-4
    published, ours = result["ways"].values()
    assert ours["GFLOP"] < published["GFLOP"] / 2
    assert 0 < ours["sentences/s"]["low"] <= ours["sentences/s"]["median"]
    found = re.match(r"evaluation of (\d+) sentences on (\d+) photos", result["what"])
    assert int(found[1]) >= 9
    assert json.loads(json.dumps(result)) == result


def test_the_published_formulation_evaluates_photos_in_nchw(args, lmdb):
    setting, layouts = formulations.Setting(args, lmdb), []
    model = setting.published()
    model.register_forward_pre_hook(lambda _, given: layouts.append(given[0].is_contiguous()))
    published.evaluate(
        model, setting.reader, [0, 1], setting.side, setting.word_len, setting.device
    )
    assert layouts
    assert all(layouts)


def test_the_peak_is_that_of_the_device_that_is_measured(args, lmdb):
    ways = {PUBLISHED: lambda: 0.1, OURS: lambda: 0.1}
    flops = dict.fromkeys(ways, 10**9)
    # Nothing is computed on the meta device, at a rate that no processor has.
    result = formulations._measure(ways, flops, 1, 1, "images/s", torch.device("meta"))
    assert result["gemm_gflops"] > 1e5


def test_masks_of_the_random_weights_have_outlines(args, lmdb):
    setting = formulations.Setting(args, lmdb)
    images, tokens, _ = setting.published_batch([0, 1, 2])
    with torch.inference_mode():
        share = (setting.ours().eval()(images, tokens).sigmoid() > 0.35).float().mean()
    assert 0.2 < share < 0.8


def test_training_compares_the_first_step_and_measures_batches_by_image_apart(args, lmdb):
    result = formulations.compare_training(args, lmdb)
    assert list(result["ways"]) == [PUBLISHED, OURS, BY_IMAGES]
    assert result["difference"]["loss of the first step, relative"] <= 1e-3
    assert result["ways"][OURS]["GFLOP"] < result["ways"][PUBLISHED]["GFLOP"]
    assert result["ways"][BY_IMAGES]["GFLOP"] < result["ways"][OURS]["GFLOP"]
    parts = result["parts"]
    assert list(parts) == [*PARTS, OPTIMIZER]
    # Each part alone executes what it does within the step, and nothing is left over.
    whole = sum(row["GFLOP"] for row in parts.values())
    assert whole / 4 == pytest.approx(result["ways"][OURS]["GFLOP"], rel=1e-12)
    assert all(row["seconds"]["low"] > 0 for row in parts.values())
    assert json.loads(json.dumps(result)) == result


def test_a_part_alone_has_the_gradients_that_it_has_in_the_step():
    model = small_segmenter().train()
    photos, tokens, mask = random_batch(3, 64)
    image = normalize_images(photos)
    text_to_pixel_loss(model(image, tokens), mask).backward()
    # The projector is last, so that one is the gradient of what it makes in the step as well.
    expected = [parameter.grad for parameter in model.proj.parameters()]
    for way in training_parts(model, image, tokens, mask).values():
        way()
    for gradient, parameter in zip(expected, model.proj.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_another_precision_than_that_of_both_ways_is_refused(args, lmdb):
    args.opts = ["TRAIN.precision", "bf16"]
    with pytest.raises(UserError, match=r"TRAIN\.precision: both ways are measured in float32"):
        formulations.compare_training(args, lmdb)


def test_batches_hold_each_ref_once_and_by_image_those_of_an_image(lmdb):
    reader = RecordReader(lmdb)
    by_refs = formulations.make_batches(reader, 4, by_images=False)
    positions = [position for batch in by_refs for position in batch]
    assert len(set(positions)) == len(positions) == len(reader) // 4 * 4
    names = reader.image_names()
    images = [
        sum(len({names[position] for position in batch}) for batch in batches)
        for batches in (by_refs, formulations.make_batches(reader, 4, by_images=True))
    ]
    assert images[1] < images[0]
    with pytest.raises(UserError, match="fewer than --batch 999"):
        formulations.make_batches(reader, 999, by_images=False)


def test_memory_is_measured_in_processes_of_their_own(args, lmdb):
    args.rounds, args.command = 1, "memory"
    result = formulations.compare_memory(args, lmdb)
    assert all(100e6 < way["bytes"]["median"] < 8e9 for way in result["ways"].values())
    assert result["ratios"][OURS]["median"] > 0


COMPARISONS = (
    formulations.compare_evaluation,
    formulations.compare_training,
    formulations.compare_memory,
)


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_a_device_that_is_not_there_is_named(args, lmdb, comparison):
    args.device = "cuda:99"
    with pytest.raises(UserError, match=r"--device cuda:99: it cannot be used here"):
        comparison(args, lmdb)


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_process_that_dies_is_named_in_a_line(args, lmdb, is_asked):
    def use() -> None:
        with formulations.worker(args, lmdb, PUBLISHED) as process:
            if is_asked:
                formulations.ask(process)
            process.kill()
            process.wait()
            formulations.ask(process)

    with pytest.raises(UserError, match="that measured 'published' has ended"):
        use()


def test_the_command_packs_what_it_is_given_prints_a_table_and_writes_json(args, data, tmp_path):
    words = ["eval", data, "--config", args.config, "--rounds", "1", "--sentences", "4"]
    ending = run_command(
        sys.executable, "tools/benchmark.py", *words, "--json", tmp_path / "result.json"
    )
    assert ending.returncode == 0, ending.stderr
    for pattern in (
        r"published +[\d.]+ +\([\d.]+-[\d.]+\) +1 +[\d.]+ +\d+ %",
        r"this +[\d.]+ +\([\d.]+-[\d.]+\) +[\d.]+ +\([\d.]+-[\d.]+\) +[\d.]+ +\d+ %",
        r"largest difference, mIoU: ",
    ):
        assert re.search(pattern, ending.stdout), ending.stdout
    assert json.loads((tmp_path / "result.json").read_text())["command"] == "eval"


def test_a_folder_that_is_none_of_refers_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="neither of the folders refcoco, refshapes"):
        formulations.find_records(tmp_path, tmp_path)
