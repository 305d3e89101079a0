"""From nothing to a score: draw RefShapes, prepare it, train on it, evaluate, show the result.

Every step is a command that can be typed as well, and is shown before it runs. A step whose result
is there already, whole and newer than what it is made from, is not run again; a training that was
interrupted goes on after its last epoch.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from engine.report.pages import INDEX
from engine.tester import REPORT, print_table, result_stem
from tools.refshapes import DEFAULT_IMAGES, KINDS, blind_baselines, is_complete, kind_of
from utils.checkpoint import BEST, LAST, list_checkpoints, read_checkpoint
from utils.config import Config, load_config, to_dict
from utils.errors import UserError, run_entry_point
from utils.logger import METRICS, duration
from utils.metrics import summarize
from utils.records import RecordReader
from utils.transforms import PROTOCOLS, decode_image, decode_mask
from utils.visualize import PRED_COLOR, TRUTH_COLOR, grid, save_picture

REFER, ANNS = Path("datasets/refshapes"), Path("datasets/anns/refshapes")
MASKS, LMDB = Path("datasets/masks/refshapes"), Path("datasets/lmdb/refshapes")
CODE = (".py", ".html", ".css", ".js")
PICTURES = 40  # overlays a split
SUCCESS, FAILURE = 0.8, 0.1  # IoU above and below which a sentence is an example of it
PANEL, GAP, COLUMNS = (230, 200), 22, 3  # of the picture of examples; (width, height) in pixels
CELL = (2 * PANEL[0] + 6, PANEL[1] + 58)


class Step(NamedTuple):
    """One command, whether its result is there already, and what of an older one must go."""

    name: str
    command: str
    is_done: bool
    outdated: tuple[Path, ...] = ()


def main(argv: Sequence[str] | None = None) -> None:
    """Take the steps that are not done yet, then report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "config/refshapes/cris_tiny.yaml"
    parser.add_argument("--config", default=default, help="one of config/refshapes (%(default)s)")
    config = parser.parse_args(argv).config
    cfg = load_config(config)
    is_suitable = cfg.DATA.dataset == "refshapes" and cfg.TEST.protocol == "both"
    if not is_suitable or "val" not in cfg.TEST.splits:
        raise UserError(f"{config} is no config of the quickstart: take one of config/refshapes")
    report(cfg, {step.name: take(step) for step in steps(config, cfg)})


def steps(config: str, cfg: Config) -> Iterator[Step]:
    """All steps in order; each looks at the files when its turn comes, after those before it."""
    drawn = is_complete(REFER, DEFAULT_IMAGES, seed=0)
    yield Step("draw the images", f"tools/refshapes.py -o {REFER}", drawn)

    command = f"tools/data_process.py --data_root {REFER} --output_dir datasets"
    command += " --dataset refshapes --split unc --generate_mask"
    anns = [ANNS / f"{split}.json" for split in DEFAULT_IMAGES]
    refs = REFER / "refshapes" / "generator.json"
    yield Step("annotations and masks", command, is_fresh(anns, [refs]))

    for ann in anns:
        command = f"tools/folder2lmdb.py -j {ann} -i {REFER}/images/train2014 -m {MASKS} -o {LMDB}"
        done = is_fresh([LMDB / f"{ann.stem}.lmdb"], [ann])
        yield Step(f"pack {ann.stem}", command, done)

    yield training_step(config, cfg)

    # Evaluation is quick: it is repeated after any change of the code.
    folders = (".", "engine", "engine/report", "model", "utils")
    code = [p for d in folders for p in (ROOT / d).glob("*.*") if p.suffix in CODE]
    inputs = [cfg.run_folder / BEST, Path(config), *LMDB.glob("*.lmdb"), *code]
    command = f"test.py --config {shlex.quote(config)} --opts TEST.report True"
    draw = f"{command} TEST.visualize True TEST.visualize_limit {PICTURES}"
    yield Step("evaluate", draw, is_fresh(results(cfg), inputs), (cfg.run_folder / "vis",))
    swap = f"{command} TEST.test_split val TEST.swap_sentences True"
    done = is_fresh([result(cfg, "val", swapped=True)], inputs)
    yield Step("evaluate with swapped sentences", swap, done)


def training_step(config: str, cfg: Config) -> Step:
    """Train anew, or go on from the last checkpoint if it is of this config and this data."""

    def recipe(values: Mapping[str, Mapping]) -> list[Mapping]:
        # An older checkpoint has not heard of newer keys: it ran with their defaults.
        known = to_dict(Config())["TRAIN"]
        return [values["DATA"], {**known, **values["TRAIN"], "resume": None}]

    command, folder = f"train.py --config {shlex.quote(config)}", cfg.run_folder
    last, best = folder / LAST, folder / BEST
    if is_fresh([last, best], [*map(Path, cfg.DATA.train_lmdb), Path(cfg.DATA.val_lmdb)]):
        state = read_checkpoint(last, "quickstart")
        if "config" in state and recipe(state["config"]) == recipe(to_dict(cfg)):
            resume = f"{command} --opts TRAIN.resume {last}"
            return Step("train", resume, state["epoch"] == cfg.TRAIN.epochs)
    return Step("train", command, False, (*list_checkpoints(folder), folder / METRICS))


def take(step: Step) -> float | None:
    """Show and run a step's command, unless it is done already, and give the seconds it took.

    One that fails ends the program with its exit code.
    """
    if step.is_done:
        print(f"● {step.name}: complete, reused", flush=True)
        return None
    print(f"● {step.name}\n  $ {os.path.relpath(sys.executable)} {step.command}", flush=True)
    for path in step.outdated:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    start = time.monotonic()
    code = execute([sys.executable, *shlex.split(step.command)])
    if code:
        sys.exit(code if code > 0 else 128 - code)
    return time.monotonic() - start


def execute(command: Sequence[str]) -> int:
    """Run a command on this terminal and give its exit code.

    One GPU is enough for these models, and so the recipe is the same on every machine. On a CPU,
    a thread that waits for another soon gives up its core: where anything else runs beside, the
    default (30 times that long) makes a step take seconds. It costs 5 % where nothing does.
    """
    first_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ, "CUDA_VISIBLE_DEVICES": first_gpu}
    return subprocess.run(command, env=environment).returncode


def is_fresh(outputs: Sequence[Path], inputs: Sequence[Path]) -> bool:
    """Whether all of these files are there, and no output is older than an input."""
    if not all(path.exists() for path in (*outputs, *inputs)):
        return False
    first = min(path.stat().st_mtime for path in outputs)
    return first >= max(path.stat().st_mtime for path in inputs)


def result(cfg: Config, split: str, protocol: str = "aligned", swapped: bool = False) -> Path:
    """The scores of a split; the `.jsonl` beside it has a line a sentence."""
    stem = result_stem(cfg.DATA.dataset, split, protocol, PROTOCOLS[protocol].threshold, swapped)
    return cfg.run_folder / f"{stem}.json"


def results(cfg: Config) -> list[Path]:
    """The scores of every split, both protocols."""
    return [result(cfg, s, p) for s in cfg.TEST.splits for p in ("aligned", "published")]


def report(cfg: Config, seconds: Mapping[str, float | None]) -> None:
    """Print the scores, the time and where everything lies; write the picture of examples."""
    lines = read_lines(result(cfg, "val"))
    swapped = read_lines(result(cfg, "val", swapped=True))
    pictures = cfg.run_folder / "vis"
    save_picture(contact_sheet(choose_examples(lines)), pictures / "examples.png")

    print(f"\n{cfg.TRAIN.exp_name} on RefShapes, in per cent")
    print_table([json.loads(path.read_text()) for path in results(cfg)])
    print("\nmIoU on val (aligned) by kind of sentence")
    for kind, (score, count) in scores_by_kind(lines).items():
        print(f"  {f'{kind} ({count:,} sentences)':<64}{100 * score:>6.2f}")
    print("\nmIoU on val (aligned): does it read?")
    for name, score in reading_test(lines, swapped, REFER).items():
        print(f"  {name:<64}{100 * score:>6.2f}")
    print("\ntime")
    for name, value in seconds.items():
        print(f"  {name:<62}{'reused' if value is None else duration(value):>8}")
    print(f"""
where to look
  report        {cfg.run_folder / REPORT / INDEX}, to open in a browser
  six examples  {pictures / "examples.png"}
  overlays      {pictures}/<split>/, {PICTURES} sentences each
  scores        {result(cfg, "val")} and so on; a line a sentence in the .jsonl
  training      {cfg.run_folder / "train.log"}, numbers in metrics.jsonl""")


def read_lines(result: Path) -> list[dict]:
    """The records of all sentences behind a result."""
    return [json.loads(line) for line in result.with_suffix(".jsonl").read_text().splitlines()]


def mean_iou(lines: Sequence[dict]) -> float:
    """mIoU of sentence records, in [0, 1]."""
    return summarize([r["intersection"] for r in lines], [r["union"] for r in lines])["mIoU"]


def scores_by_kind(lines: Sequence[dict]) -> dict[str, tuple[float, int]]:
    """mIoU and number of the sentences of each kind that occurs."""
    kinds = {kind: [r for r in lines if kind_of(r["sentence"]) == kind] for kind in KINDS}
    return {kind: (mean_iou(rows), len(rows)) for kind, rows in kinds.items() if rows}


def reading_test(lines: Sequence[dict], swapped: Sequence[dict], refer: Path) -> dict[str, float]:
    """mIoU of the model, of the model misled, and of guesses that have the masks but no sentence.

    Args:
        lines, swapped: sentences of val, their own and those of another object of the image.
        refer: the generated data.
    """
    blind = blind_baselines(refer, "val")
    model = {"the model": mean_iou(lines), "the model, sentences swapped": mean_iou(swapped)}
    return model | {f"no model, the true mask of one object: {k}": v for k, v in blind.items()}


def choose_examples(lines: Sequence[dict]) -> list[dict]:
    """Up to six telling sentences: a success of each kind, another one on the image of the last,
    and a failure. Small referents come first, since they are hard and their images full.
    """
    lines = sorted(lines, key=lambda r: r["target_area"] / (r["height"] * r["width"]))
    good = [r for r in lines if r["iou"] >= SUCCESS]
    chosen: list[dict] = []
    for kind in KINDS:
        used = {r["image_id"] for r in chosen}
        others = (r for r in good if r["image_id"] not in used)
        chosen += [r for r in others if kind_of(r["sentence"]) == kind][:1]
    for last in chosen[-1:]:
        same_image = [r for r in good if r["image_id"] == last["image_id"]]
        chosen += [r for r in same_image if r["ref_id"] != last["ref_id"]][-1:]
    return chosen + [r for r in lines if r["iou"] < FAILURE][:1]


def contact_sheet(records: Sequence[dict]) -> Image.Image:
    """A grid of examples above a legend."""
    reader = RecordReader(LMDB / "val.lmdb")
    positions = {ref_id: i for i, ref_id in enumerate(reader.index.ref_ids)}
    cells = [example(record, reader, positions[record["ref_id"]]) for record in records]
    sheet = grid(cells, CELL, COLUMNS, GAP, foot=30)
    legend = "pink: the prediction; green outline: the ground truth"
    font = ImageFont.load_default(18)
    ImageDraw.Draw(sheet).text((GAP, sheet.height - GAP - 16), legend, "dimgray", font)
    return sheet


def example(record: Mapping, reader: RecordReader, position: int) -> Image.Image:
    """A sentence, the photo, and what the model makes of it."""
    ref = reader.ref(position)
    photo = decode_image(reader.image(ref.image_key), ref.image_key)
    pixels = photo, decode_mask(ref.mask, "mask"), 255 * coco_mask.decode(record["pred_rle"])
    scale = min(PANEL[0] / ref.width, PANEL[1] / ref.height)
    size = round(ref.width * scale), round(ref.height * scale)
    photo, mask, pred = (cv2.resize(x, size, interpolation=cv2.INTER_CUBIC) for x in pixels)
    pale, alpha = 0.3 * photo + 178, pred[..., None] / 300
    answer = (pale + alpha * (np.array(PRED_COLOR) - pale)).astype(np.uint8)
    outlines, _ = cv2.findContours(mask // 128, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(answer, outlines, -1, TRUTH_COLOR, 2, cv2.LINE_AA)
    cell = Image.new("RGB", CELL, "white")
    draw = ImageDraw.Draw(cell)
    draw.text((0, 0), f"“{record['sentence']}”", "black", ImageFont.load_default(22))
    verdict = f"{kind_of(record['sentence'])}, IoU {record['iou']:.2f}"
    draw.text((0, 29), verdict, "dimgray", ImageFont.load_default(18))
    cell.paste(Image.fromarray(photo), (0, 58))
    cell.paste(Image.fromarray(answer), (size[0] + 6, 58))
    return cell


if __name__ == "__main__":
    run_entry_point(main)
