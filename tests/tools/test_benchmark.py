"""tools/benchmark.py: both formulations agree, and operations are those known. Needs no clock."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT, random_batch, small_segmenter, write_config

from model.loss import text_to_pixel_loss
from model.segmenter import Segmenter, build_segmenter
from tools import benchmark, published
from tools.benchmark import CACHED, OURS, PUBLISHED, Setting
from tools.latency import count_flops, operations_by_part, without_archive
from tools.published import Published
from utils.config import load_config
from utils.errors import UserError
from utils.transforms import normalize_images

pytestmark = pytest.mark.parity  # the published formulation, and how much faster this is


@pytest.fixture(scope="module")
def rn50() -> Segmenter:
    """The published size, without memory: operations are counted and not carried out."""
    with torch.device("meta"):
        return build_segmenter(without_archive(load_config(ROOT / "config/refcoco/cris_r50.yaml")))


def meta_batch(images: int, sentences: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.ones(sentences, 17, dtype=torch.int64, device="meta")
    return torch.empty(images, 3, 416, 416, device="meta"), tokens


def test_operations_are_those_that_are_known(rn50):
    image, tokens = meta_batch(1, 1)
    with torch.no_grad():
        _, total = count_flops(Published(rn50.eval()), image, tokens)
        parts = operations_by_part(rn50, image, tokens)
    assert total / 1e9 == pytest.approx(131.7, abs=0.5)
    assert parts["image backbone"] / 1e9 == pytest.approx(42.7, abs=0.5)  # the paper's figure
    assert parts["decoder"] / 1e9 == pytest.approx(17.8, abs=0.3)


def test_an_image_costs_its_share_once_and_the_projector_a_third(rn50):
    image, tokens = meta_batch(1, 7)
    index = torch.zeros(7, dtype=torch.int64, device="meta")
    with torch.no_grad():
        model = rn50.eval()
        features, once = count_flops(model.encode_image, image)
        _, sentences = count_flops(model.segment, features.repeat(index), tokens)
        pixels, state = torch.empty(7, 512, 26, 26), torch.empty(7, 1024)
        _, proj = count_flops(model.proj, pixels.to("meta"), state.to("meta"))
    assert proj / 7e9 <= 39.8 / 3
    # RefCOCO's val has 7.2 sentences an image.
    assert (once + sentences) / 7e9 <= 131.7 / 2.3


def test_a_training_step_executes_at_most_four_fifths(rn50):
    image, tokens = meta_batch(4, 4)

    def step(model: torch.nn.Module) -> None:
        text_to_pixel_loss(model.train()(image, tokens), image[:, :1]).backward()

    assert count_flops(step, rn50)[1] <= 0.8 * count_flops(step, Published(rn50))[1]


@pytest.mark.parametrize("count", [1, 3])
def test_both_give_the_same_logits_and_gradients(count):
    photos, tokens, masks = random_batch(count, 64)
    outputs, gradients = [], []
    for model in (small_segmenter().eval().double(), Published(small_segmenter().eval().double())):
        outputs.append(model(normalize_images(photos).double(), tokens))
        (outputs[-1] * masks[..., ::4, ::4]).sum().backward()
        named = model.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    torch.testing.assert_close(*outputs, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.fixture
def benchmark_of(data: Path, tmp_path: Path):
    """Run a command of the benchmark on a tiny config, and return its JSON."""
    config, path = write_config(tmp_path, data), tmp_path / "result.json"

    def run(command: str, *words: object, lmdb: Path = data / "lmdb/shapes/val.lmdb") -> dict:
        given = ["--config", config, "--rounds", 1, "--json", path, command, lmdb, *words]
        benchmark.main([str(word) for word in given if word is not None])
        return json.loads(path.read_text())

    return run


@pytest.mark.parametrize(("precision", "pixels", "miou"), [("fp32", 5, 1e-4), ("fp16", 5000, 0.05)])
def test_evaluation_scores_the_same_sentences_and_counts_the_same_pixels(
    benchmark_of, precision, pixels, miou
):
    result = benchmark_of("eval", "--photos", 3, "--opts", "TEST.precision", precision)
    assert list(result["ways"]) == [PUBLISHED, OURS]
    assert result["differences"]["pixels of a sentence"] <= pixels
    assert result["differences"]["mIoU"] <= miou
    theirs, ours = result["ways"].values()
    assert ours["GFLOP"] < theirs["GFLOP"] / 2
    assert 0 < ours["sentences/s"]["low"] <= ours["sentences/s"]["median"]
    assert re.match(r"evaluation of \d\d+ sentences on 3 photos at 64 px", result["what"])


@pytest.mark.parametrize(
    ("precision", "dtype", "limit"), [("fp32", "float32", 1e-3), ("bf16", "bfloat16", 0.5)]
)
def test_training_compares_the_first_step(benchmark_of, precision, dtype, limit):
    opts = ("--opts", "TRAIN.precision", precision, "TRAIN.dropout", 0.0)
    result = benchmark_of("train", *opts)
    assert result["differences"]["loss of the first step, relative"] <= limit
    assert f"64 px, torch.{dtype}, dropout 0" in result["what"]
    assert result["ways"][OURS]["GFLOP"] < result["ways"][PUBLISHED]["GFLOP"]


def test_memory_is_measured_in_processes_of_their_own(benchmark_of):
    result = benchmark_of("memory")
    assert all(0.1 < way["GiB"]["median"] < 8 for way in result["ways"].values())
    assert result["ratios"][OURS]["median"] > 0


def test_reading_is_compared_with_the_release_s_way_and_with_the_cache(benchmark_of):
    assert list(benchmark_of("data")["ways"]) == [PUBLISHED, OURS, CACHED]


def test_mistakes_are_told_in_a_line(benchmark_of):
    with pytest.raises(UserError, match="fewer than --batch 999"):
        benchmark_of("train", "--batch", 999)
    with pytest.raises(UserError, match=r"--device cuda:99: it cannot be used here"):
        benchmark_of("eval", "--device", "cuda:99")


@pytest.fixture
def setting(data: Path, tmp_path: Path) -> Setting:
    words = ["eval", data / "lmdb/shapes/val.lmdb", "--config", write_config(tmp_path, data)]
    return Setting(benchmark.parse_args([str(word) for word in words]))


def test_the_published_formulation_evaluates_photos_in_nchw(setting):
    layouts, model = [], Published(setting.ours())
    model.register_forward_pre_hook(lambda _, given: layouts.append(given[0].is_contiguous()))
    sizes = setting.side, setting.word_len
    published.evaluate(model, setting.reader, [0, 1], *sizes, setting.device)
    assert layouts
    assert all(layouts)


def test_masks_of_the_random_weights_have_outlines_and_batches_hold_each_ref_once(setting):
    images, tokens, _ = setting.batch([0, 1, 2])
    with torch.inference_mode():
        share = (setting.ours()(images, tokens).sigmoid() > 0.35).float().mean()
    assert 0.2 < share < 0.8
    positions = [position for batch in setting.position_batches(4) for position in batch]
    assert len(set(positions)) == len(positions) == len(setting.reader) // 4 * 4


def test_the_command_draws_its_own_data_and_prints_a_table(benchmark_of, capsys):
    benchmark_of("eval", "--photos", 1, lmdb=None)
    table = capsys.readouterr().out
    for pattern in (
        r"published +[\d.]+ +\([\d.]+-[\d.]+\) +[\d.]+\n",
        r"this +[\d.]+ +\([\d.]+-[\d.]+\) +[\d.]+ +[\d.]+ +\([\d.]+-[\d.]+\)\n",
        r"largest difference, mIoU: ",
    ):
        assert re.search(pattern, table), table
