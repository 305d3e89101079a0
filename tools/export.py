"""Write a trained model for other programs: safetensors with its config, or two ONNX graphs."""

import argparse
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.build import restore_trained
from engine.evaluator import validation_protocol
from engine.tester import print_aligned
from model.neck import ImageFeatures
from model.segmenter import Segmenter
from tools.refshapes import draw_example
from utils.arguments import model_parser, parse_with_opts
from utils.checkpoint import save_weights
from utils.config import Config, load_config, save_config
from utils.errors import UserError, run_entry_point
from utils.files import atomic_path
from utils.logger import setup_logging
from utils.tokenizer import END_ID, START_ID, tokenize
from utils.transforms import Protocol, letterbox_image, normalize_images, upsample_probability

EPILOG = """examples:
  python tools/export.py --config config/refcoco/cris_r50.yaml --format safetensors -o cris
  python test.py --config cris/config.yaml --opts TEST.weights cris/model.safetensors
  python tools/export.py --config ... --format onnx -o cris

safetensors writes model.safetensors and config.yaml; onnx writes image_encoder.onnx,
text_head.onnx and config.yaml, after it has run both graphs by ONNX Runtime beside PyTorch, on
random inputs and on a picture of RefShapes, and prints the differences. A larger one than the
tolerance ends with an error and without a file."""

# image_encoder.onnx: images (N, S, S, 3) uint8, letterboxed RGB -> v3, v4, v5, all that is needed
# of an image. text_head.onnx: those, image_index (B,) int64 and tokens (B, L) int64, a row a
# sentence -> logits (B, 1, S/4, S/4) and probability (B, S, S). N and B may be any number, so a
# server encodes an image once and asks as many sentences of it as come.
IMAGE_ENCODER, TEXT_HEAD = "image_encoder.onnx", "text_head.onnx"
OPSET = 20
Case = tuple[str, np.ndarray, np.ndarray, np.ndarray]  # name, images, image_index, tokens
Difference = tuple[str, str, float]  # case, output, how far it is from PyTorch's
NAMES = {  # inputs, outputs
    IMAGE_ENCODER: (("images",), ("v3", "v4", "v5")),
    TEXT_HEAD: (("v3", "v4", "v5", "image_index", "tokens"), ("logits", "probability")),
}


class ImageEncoder(nn.Module):
    """Compute what depends on the image alone."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, S, S, 3) uint8 -> v3, v4, v5."""
        return tuple(self.model.encode_image(normalize_images(images)))


class TextHead(nn.Module):
    """Compute what depends on the sentence: from an image's features to its probabilities."""

    def __init__(self, model: Segmenter, side: int, protocol: Protocol) -> None:
        super().__init__()
        self.model = model
        self.side = side
        self.protocol = protocol

    def forward(
        self, v3: Tensor, v4: Tensor, v5: Tensor, image_index: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features of N images, (B,), (B, L) -> logits (B, 1, S/4, S/4), probability (B, S, S)."""
        features = ImageFeatures(v3, v4, v5).repeat(image_index)
        logits = self.model.segment(features, tokens)
        return logits, upsample_probability(logits.sigmoid(), self.side, self.protocol)


def main(argv: Sequence[str] | None = None) -> None:
    """Restore the model and write it."""
    args = _parse_args(argv)
    for package in ("onnx", "onnxscript", "onnxruntime") if args.format == "onnx" else ():
        if find_spec(package) is None:
            remedy = "pip install -r requirements.txt"
            raise UserError(f"--format onnx needs the package {package}: {remedy}")
    setup_logging(None, is_main=True)
    cfg = load_config(args.config, args.opts)
    folder = args.output or cfg.run_folder / "export"
    model, weights, state = restore_trained(cfg, torch.device("cpu"), args.weights, "weights")
    model.eval()
    if args.format == "onnx":
        write_graphs(model, cfg, folder, args.tolerance)
    else:
        state["config"] = cfg.model_dump()
        save_weights(model.state_dict(), state, folder / "model.safetensors")
    save_config(cfg, folder / "config.yaml")
    print(f"{weights} is in {folder}, with its config")


def write_graphs(model: Segmenter, cfg: Config, folder: Path, tolerance: float) -> None:
    """Write both graphs, or neither if they do not compute what the model does."""
    with TemporaryDirectory() as scratch:
        paths = {kind: Path(scratch) / kind for kind in NAMES}
        export_graphs(model, cfg, paths)
        check(list(compare(model, cfg, paths, make_cases(cfg))), tolerance)
        for kind, path in paths.items():
            print(f"{kind}: {path.stat().st_size / 1e6:.1f} MB")
            with atomic_path(folder / kind) as partial:
                shutil.copyfile(path, partial)


def export_graphs(model: Segmenter, cfg: Config, paths: Mapping[str, Path]) -> None:
    """Trace and write both graphs; the first axis of each input may have any size.

    Args:
        model: on the CPU, in evaluation mode.
        paths: by `IMAGE_ENCODER` and `TEXT_HEAD`.
    """
    ((name, protocol),) = validation_protocol(cfg.TEST).items()
    side, length = cfg.TRAIN.input_size, cfg.TRAIN.word_len
    about = {"input_size": side, "word_len": length, "protocol": name}
    about["threshold"] = protocol.threshold
    encoder, head = ImageEncoder(model).eval(), TextHead(model, side, protocol).eval()
    # Two images and three sentences: a batch of one would be taken for a constant.
    images = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    tokens = torch.zeros(3, length, dtype=torch.int64)
    tokens[:, 0], tokens[:, 1] = START_ID, END_ID
    with torch.no_grad():
        features = encoder(images)
    traced = {
        IMAGE_ENCODER: (encoder, (images,)),
        TEXT_HEAD: (head, (*features, torch.tensor([0, 1, 1]), tokens)),
    }
    of_images, of_sentences = (
        {0: torch.export.Dim(name, min=1, max=1 << 16)} for name in ("images", "sentences")
    )
    # What is wrong with a graph is measured; the exporter's remarks on its own insides are not.
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    for kind, (module, inputs) in traced.items():
        names, outputs = NAMES[kind]
        per_sentence = ("image_index", "tokens")
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                module,
                inputs,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=[of_sentences if n in per_sentence else of_images for n in names],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        program.model.metadata_props.update({key: str(value) for key, value in about.items()})
        program.save(paths[kind], external_data=False)


def compare(
    model: Segmenter, cfg: Config, paths: Mapping[str, Path], cases: Sequence[Case]
) -> Iterator[Difference]:
    """Run the graphs by ONNX Runtime, one after the other as a server does, beside PyTorch.

    Returns:
        For each case and output the largest difference: of a probability as it is, of another over
        its largest value.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    encode, segment = (
        onnxruntime.InferenceSession(paths[kind], options, providers=["CPUExecutionProvider"])
        for kind in (IMAGE_ENCODER, TEXT_HEAD)
    )
    (protocol,) = validation_protocol(cfg.TEST).values()
    encoder, head = ImageEncoder(model), TextHead(model, cfg.TRAIN.input_size, protocol)
    outputs = (*NAMES[IMAGE_ENCODER][1], *NAMES[TEXT_HEAD][1])
    for case, images, image_index, tokens in cases:
        found = encode.run(None, {"images": images})
        asked = dict(zip(NAMES[TEXT_HEAD][0], (*found, image_index, tokens), strict=True))
        found += segment.run(None, asked)
        with torch.inference_mode():
            features = encoder(torch.from_numpy(images))
            rest = head(*features, *map(torch.from_numpy, (image_index, tokens)))
        for name, got, expected in zip(outputs, found, (*features, *rest), strict=True):
            assert got.shape == expected.shape, f"{name}: {got.shape}, {expected.shape}"
            # One that is small everywhere must not be more exact than its threshold needs.
            scale = 1.0 if name == "probability" else max(float(expected.abs().max()), 1e-12)
            yield case, name, float(np.abs(got - expected.numpy()).max()) / scale


def make_cases(cfg: Config, seed: int = 0) -> list[Case]:
    """Make noise with random words, in other sizes than were traced, and a picture of RefShapes."""
    rng = np.random.default_rng(seed)
    side, length = cfg.TRAIN.input_size, cfg.TRAIN.word_len
    cases = []
    for num_images, num_sentences in ((1, 1), (1, 4), (3, 5)):
        tokens = np.zeros((num_sentences, length), np.int64)
        for row in tokens:
            words = rng.integers(1, START_ID, rng.integers(0, length - 1))
            row[: len(words) + 2] = [START_ID, *words, END_ID]
        name = f"random, images {num_images}, sentences {num_sentences}"
        images = rng.integers(0, 256, (num_images, side, side, 3), np.uint8)
        cases.append((name, images, rng.integers(0, num_images, num_sentences), tokens))
    photo, texts = draw_example(seed)
    tokens, index = tokenize(texts, length).numpy(), np.zeros(len(texts), np.int64)
    name = f"a picture of RefShapes, sentences {len(texts)}"
    return [*cases, (name, letterbox_image(photo, side)[None], index, tokens)]


def check(differences: Sequence[Difference], tolerance: float) -> None:
    """Print how far the graphs are from PyTorch; raise UserError for more than the tolerance."""
    rows = [(case, output, f"{off:.1e}") for case, output, off in differences]
    print_aligned([("", "output", "difference"), *rows], left=2)
    for case, output, off in differences:
        if not off <= tolerance:  # so that what is no number fails too
            raise UserError(
                f"{output} differs from PyTorch's by {off:.1e} ({case}), more than "
                f"--tolerance {tolerance:g}: nothing was written"
            )


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = model_parser(__doc__, EPILOG)
    parser.add_argument("--format", required=True, choices=("safetensors", "onnx"))
    text = "default: export/ in the run's folder"
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help=text)
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference: of a probability as it "
        "is, of other outputs over their largest value (default: %(default)s)",
    )  # fmt: skip
    return parse_with_opts(parser, argv)


if __name__ == "__main__":
    run_entry_point(main)
