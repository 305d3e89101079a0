"""The numbers of the official release: see golden/README.md for what each file holds.

`pytest tests/model/test_golden.py -v` prints the largest difference of every comparison.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from golden.fill import filled
from helpers import ROOT, SIZES, small_segmenter
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.optim import build_optimizer, parameter_groups, set_rates
from model.clip import ClipSizes
from model.fold import fold_batch_norm
from model.loss import resize_target, text_to_pixel_loss
from model.segmenter import Segmenter, build_segmenter
from tools.latency import PUBLISHED_ARCH
from tools.published import Published
from utils.config import Config, load_config
from utils.metrics import intersection_and_union, iou, training_scores
from utils.transforms import (
    PROTOCOLS,
    letterbox_image,
    letterbox_mask,
    letterbox_matrices,
    restore_size,
    upsample_probability,
)

pytestmark = pytest.mark.parity

GOLDEN = ROOT / "tests/golden"


class Case(NamedTuple):
    """One golden model: a shipped config, its CLIP, other options, and the batch it was given."""

    config: str
    sizes: ClipSizes
    opts: str
    batch: int


TINY = (
    "TRAIN.input_size 128 TRAIN.fpn_in [64,128,96] TRAIN.fpn_out [32,64,96] TRAIN.vis_dim 64 "
    "TRAIN.word_dim 96 TRAIN.num_layers 2 TRAIN.num_head 4 TRAIN.dim_ffn 128"
)
RN50, RN101 = (ClipSizes(*PUBLISHED_ARCH[name]) for name in ("RN50", "RN101"))
CASES = {
    "tiny": Case("base.yaml", SIZES, TINY, batch=3),
    "rn50": Case("refcoco/cris_r50.yaml", RN50, "", batch=2),
    "rn101": Case("refcocog_u/cris_r101.yaml", RN101, "", batch=1),
}


class Form(NamedTuple):
    """How a model computes: in which type and layout, and in whose formulation.

    An activation of the tiny case lies so close to the kink of a ReLU that float64 finds it on
    the other side; the tolerances allow for it. Channels-last in float32 is what trains on a CPU.
    """

    device: str
    layout: torch.memory_format
    dtype: torch.dtype
    formulation: Callable[[Segmenter], nn.Module] = lambda model: model


FORMS = {
    "float32": Form("cpu", torch.contiguous_format, torch.float32),
    "channels_last-float64": Form("cpu", torch.channels_last, torch.float64),
    "channels_last-float32": Form("cpu", torch.channels_last, torch.float32),
    "published": Form("cpu", torch.contiguous_format, torch.float32, Published),
    "cuda-float32": Form("cuda", torch.channels_last, torch.float32),
}
FOLDED = Form("cpu", torch.channels_last, torch.float32, fold_batch_norm)


def case_config(name: str) -> Config:
    case = CASES[name]
    arch = ("TRAIN.clip_pretrain", "null", "TRAIN.clip_arch", json.dumps(asdict(case.sizes)))
    opts = [*arch, "TRAIN.dropout", "0", *case.opts.split()]
    return load_config(ROOT / "config" / case.config, opts)


def ellipse(height: int, width: int, centre: tuple, radii: tuple) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1


def case_inputs(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Image (B, 3, S, S), tokens (B, L), mask (B, 1, S, S) as the golden README makes them."""
    train, batch = case_config(name).TRAIN, CASES[name].batch
    side, vocab = train.input_size, train.clip_arch.vocab_size
    rng = np.random.Generator(np.random.PCG64([7, 0]))
    image = rng.standard_normal((batch, 3, side, side), np.float32)
    tokens = np.zeros((batch, train.word_len), np.int64)
    mask = np.zeros((batch, 1, side, side), np.float32)
    for b in range(batch):
        words = 3 + 4 * b
        tokens[b, : words + 2] = [vocab - 2, *rng.integers(1, vocab - 2, words), vocab - 1]
        radii = (0.2 * side + b, 0.3 * side)
        mask[b, 0] = ellipse(side, side, (0.4 * side, 0.6 * side), radii)
    return torch.from_numpy(image), torch.from_numpy(tokens), torch.from_numpy(mask)


def case_model(name: str) -> Segmenter:
    with torch.device("meta"):  # what it would begin with is not needed
        model = build_segmenter(case_config(name))
    model.load_state_dict(filled(model.state_dict()), assign=True)
    return model


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"model_{name}.npz") as arrays:
        return dict(arrays)


def stages(model: nn.Module, image: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """What the golden files hold statistics of, and the logits."""
    if isinstance(model, Published):
        return model.stages(image, tokens)
    c3, c4, c5 = model.backbone.encode_image(image)
    words, state = model.backbone.encode_text(tokens)
    fused = model.neck(model.neck.project(c3, c4, c5), state)
    pixels = model.decoder(fused, words, tokens == 0)
    maps = {"c3": c3, "c4": c4, "c5": c5, "words": words, "state": state}
    return maps | {"neck": fused, "decoder": pixels, "logits": model(image, tokens)}


def relative(found: object, expected: object) -> float:
    """The largest difference over the largest expected magnitude."""
    found, expected = (np.asarray(torch.as_tensor(v).cpu(), np.float64) for v in (found, expected))
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


Measure = Callable[[str, float, float], None]


@pytest.fixture
def measure(request: pytest.FixtureRequest, record_property: Callable) -> Measure:
    """Note a difference for the table of `pytest -v`, and fail where it exceeds its limit."""
    node = request.node
    case = node.callspec.id if hasattr(node, "callspec") else node.name.split("_")[1]

    def note(what: str, found: float, limit: float) -> None:
        record_property("difference", (case, what, float(found), limit))
        assert found <= limit, f"{what} differs by {found:.3g}, more than {limit:.3g}"

    return note


BY_FORM = [
    pytest.param(form, id=name, marks=[pytest.mark.gpu] if form.device == "cuda" else [])
    for name, form in FORMS.items()
]


@pytest.fixture(params=BY_FORM)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Form:
    if request.param.device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    return request.param


def model_in(form: Form, name: str = "tiny") -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A golden model and its inputs, computing in that form."""
    image, tokens, mask = (t.to(form.device) for t in case_inputs(name))
    model = case_model(name).to(form.device, form.dtype).to(memory_format=form.layout)
    image = image.to(dtype=form.dtype, memory_format=form.layout)
    return form.formulation(model), image, tokens, mask


def check_stages(
    model: nn.Module, name: str, image: Tensor, tokens: Tensor, measure: Measure
) -> None:
    golden = golden_arrays(name)
    assert np.array_equal(tokens.cpu(), golden["tokens"])
    with torch.inference_mode():
        outputs = stages(model.eval(), image, tokens)
    for stage in ("c3", "c4", "c5", "words", "state", "neck", "decoder"):
        values = outputs[stage].double()
        found = torch.stack([values.mean(), values.std(), values.abs().max()])
        measure(f"{stage}: mean, std, max", relative(found, golden[f"stat_{stage}"]), 1e-4)
    measure("logits", relative(outputs["logits"], golden["logits"]), 1e-4)


def check_gradients(model: nn.Module, name: str, measure: Measure, limit: float) -> None:
    """Compare the norm of every gradient; `logit_scale`, and nothing else, has none."""
    norms = json.loads((GOLDEN / f"gradnorms_{name}.json").read_text())
    parameters = dict(model.named_parameters())
    assert parameters.keys() == norms.keys()
    without = {key for key, p in parameters.items() if p.grad is None}
    assert without == {key for key, norm in norms.items() if norm == -1}
    assert without == {"backbone.logit_scale"}
    # The softmax does not see what all keys share: the bias of the keys has no gradient but noise.
    skipped = without | {"backbone.visual.attnpool.k_proj.bias"}
    off = {
        key: abs(parameters[key].grad.norm().item() - norm) / norm
        for key, norm in norms.items()
        if key not in skipped
    }
    measure(f"{len(off)} gradient norms", max(off.values()), limit)


def check_pass(logits: Tensor, mask: Tensor, name: str, measure: Measure, limit: float) -> None:
    """Compare what a model gave in training mode; `limit` is that of its scores."""
    golden, target = golden_arrays(name), resize_target(mask, logits.shape[-2:])
    measure("train-mode logits", relative(logits.detach(), golden["train_logits"]), 1e-4)
    assert target.sum((1, 2, 3)).tolist() == golden["small_mask_sum"].tolist()
    scores = 100 * training_scores(logits, target)
    measure("training IoU and Pr@0.5", relative(scores, golden["train_iou_pr50"]), limit)


# ---------------------------------------------------------------------------- names, shapes, counts


@pytest.mark.parametrize("name", CASES)
def test_state_dict_has_the_official_keys_shapes_types_and_order(name):
    with torch.device("meta"):
        model = build_segmenter(case_config(name))
    found = [
        f"{key}\t{'x'.join(map(str, v.shape)) or 'scalar'}\t{str(v.dtype).removeprefix('torch.')}"
        for key, v in model.state_dict().items()
    ]
    assert found == (GOLDEN / f"manifest_{name}.txt").read_text().splitlines()
    published = {"rn50": 146_849_122, "rn101": 161_251_682}
    count = sum(p.numel() for p in model.parameters())
    assert count == published.get(name, count)


# ----------------------------------------------------------------------------- forward and training


def test_tiny_computes_the_official_stages_and_logits(form, measure):
    model, image, tokens, _ = model_in(form)
    check_stages(model, "tiny", image, tokens, measure)


def test_tiny_trains_three_steps_as_the_official_code_does(form, measure):
    golden, cfg = golden_arrays("tiny"), case_config("tiny")
    model, image, tokens, mask = model_in(form)
    optimizer = build_optimizer(parameter_groups(model, cfg), cfg)
    model.train()
    loss_limits = (1e-5, 2e-3, 2e-2)
    for step, (expected, limit) in enumerate(zip(golden["losses"], loss_limits, strict=True)):
        set_rates(optimizer, cfg, 0, step)
        logits = model(image, tokens)
        loss = text_to_pixel_loss(logits, mask)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            check_pass(logits, mask, "tiny", measure, 1e-6)
            check_gradients(model, "tiny", measure, 1e-2)
        measure(f"loss of step {step + 1}", abs(loss.item() - expected) / expected, limit)
        optimizer.step()
    with torch.inference_mode():
        after = relative(model.eval()(image, tokens), golden["logits_after_3_steps"])
    measure("logits after 3 steps", after, 1e-2)


RN50_FORMS = [FORMS["channels_last-float32"], FORMS["published"]]


@pytest.mark.slow
@pytest.mark.parametrize("form", RN50_FORMS, ids=["rn50", "rn50-published"])
def test_rn50_computes_the_official_numbers_and_gradients(form, measure):
    model, image, tokens, mask = model_in(form, "rn50")
    check_stages(model, "rn50", image, tokens, measure)
    model.train()
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        norm.eval()
    logits = model(image, tokens)
    loss = text_to_pixel_loss(logits, mask)
    loss.backward()
    check_pass(logits, mask, "rn50", measure, 1e-3)
    expected = golden_arrays("rn50")["losses"][0]
    measure("loss", abs(loss.item() - expected) / expected, 1e-4)
    check_gradients(model, "rn50", measure, 1e-3)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param("tiny", FOLDED, id="tiny-folded"),
        pytest.param("rn50", FOLDED, id="rn50-folded", marks=pytest.mark.slow),
        pytest.param("rn101", FOLDED, id="rn101-folded", marks=pytest.mark.slow),
        pytest.param("rn101", FORMS["float32"], id="rn101", marks=pytest.mark.slow),
        pytest.param("rn101", FORMS["published"], id="rn101-published", marks=pytest.mark.slow),
    ],
)
def test_other_forms_compute_the_official_stages_and_logits(name, form, measure):
    model, image, tokens, _ = model_in(form, name)
    left = sum(isinstance(module, _BatchNorm) for module in model.modules())
    assert (left == 1) == (form is FOLDED)
    check_stages(model, name, image, tokens, measure)


# ----------------------------------------------------------------------------------------- schedule


def test_rates_of_fifty_epochs_are_the_official_ones(measure):
    table = json.loads((GOLDEN / "lr_table.json").read_text())
    assert table["columns"] == ["epoch", "backbone_lr", "head_lr"]
    cfg = load_config(ROOT / "config/refcoco/cris_r50.yaml")
    optimizer = build_optimizer(parameter_groups(small_segmenter(), cfg), cfg)
    assert [group["name"] for group in optimizer.param_groups] == ["backbone", "head"]
    off = 0.0
    for epoch, *expected in table["rows"]:
        set_rates(optimizer, cfg, epoch - 1, step=1000 * epoch)
        for group, rate in zip(optimizer.param_groups, expected, strict=True):
            off = max(off, abs(group["lr"] - rate) / rate)
    assert len(table["rows"]) == cfg.TRAIN.epochs
    measure("100 rates", off, 1e-12)


# ----------------------------------------------------------------------------- geometry and scoring

LETTERBOX = json.loads((GOLDEN / "letterbox.json").read_text())


def as_size(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


def ellipse_mask(height: int, width: int) -> np.ndarray:
    radii = (0.25 * height, 0.3 * width)
    return np.uint8(255) * ellipse(height, width, (0.5 * height, 0.45 * width), radii)


def test_letterbox_matrices_are_the_official_ones(measure):
    off = 0.0
    for text, expected in LETTERBOX.items():
        forward, inverse = letterbox_matrices(as_size(text), 416)
        for matrix, name in ((forward, "forward"), (inverse, "inverse")):
            off = max(off, np.abs(matrix - expected[name]).max())
    measure("letterbox matrices", off, 1e-9)


@pytest.mark.parametrize("text", [text for text, case in LETTERBOX.items() if "mask_sum" in case])
def test_letterboxed_pixels_are_the_official_ones(text, measure):
    height, width = as_size(text)
    y, x = np.mgrid[:height, :width]
    photo = np.stack([x * 255 // width, y * 255 // height, (x // 16 + y // 16) % 2 * 255], axis=2)
    image = letterbox_image(photo.astype(np.uint8), 416)
    mask = letterbox_mask(ellipse_mask(height, width), 416)
    # One grey level between OpenCV versions.
    with np.load(GOLDEN / "letterbox_pixels.npz") as golden:
        expected_image, expected_mask = golden[f"image_{text}"], golden[f"mask_{text}"]
    for name, found, expected in (
        ("image", image[::8, ::8], expected_image),
        ("mask", mask[::4, ::4], expected_mask),
    ):
        assert found.shape == expected.shape
        off = int(np.abs(found.astype(int) - expected).max())
        measure(f"letterboxed {name}: grey levels", off, 1)
    for name, total in (("image", image.sum()), ("mask", mask.sum())):
        expected = LETTERBOX[text][f"{name}_sum"]
        measure(f"letterboxed {name}: sum", abs(int(total) - expected) / expected, 1e-4)


@pytest.mark.parametrize("number", range(3), ids="postprocess-{}".format)
def test_published_post_processing_counts_the_official_pixels(number, measure):
    expected = json.loads((GOLDEN / "postprocess.json").read_text())[number]
    with np.load(GOLDEN / "postprocess.npz") as arrays:
        logits = torch.from_numpy(arrays[f"logits_{number}"])[None, None]
    protocol, size = PROTOCOLS["published"], tuple(expected["size"])
    square = upsample_probability(logits.sigmoid(), 416, protocol)[0].numpy()
    pred_mask = restore_size(square, size) > protocol.threshold
    counts = intersection_and_union(pred_mask, ellipse_mask(*size) > 0)
    measure("positives, pixels", abs(np.count_nonzero(pred_mask) - expected["positives"]), 5)
    for name, count in zip(("intersection", "union"), counts, strict=True):
        measure(f"{name}, pixels", abs(count - expected[name]), 5)
    measure("IoU", abs(iou(*counts) - expected["iou"]), 5e-5)
