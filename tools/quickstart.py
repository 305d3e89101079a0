"""From nothing to a score: draw RefShapes, prepare it, train on it, evaluate, show the result.

Every step is a command that can be typed as well, and is shown before it runs. A step whose result
is there already, whole and newer than what it is made from, is not run again, but for evaluation:
the code may have changed. A training that was interrupted goes on after its last epoch.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from engine.pictures import draw_sentence
from engine.report.pages import INDEX
from engine.report.statistics import KIND_PATTERNS, object_share, sentence_kinds
from engine.tester import REPORT, print_table, result_stem
from tools.refshapes import DEFAULT_IMAGES, is_complete
from utils.arguments import text_parser
from utils.checkpoint import BEST, LAST, list_checkpoints, read_checkpoint
from utils.config import Config, load_config
from utils.errors import UserError, run_entry_point
from utils.records import RecordReader
from utils.transforms import PROTOCOLS
from utils.visualize import grid, save_picture

REFER, LMDB = Path("datasets/refshapes"), Path("datasets/lmdb/refshapes")
PICTURES = 40  # overlays a split
SUCCESS, FAILURE = 0.8, 0.1  # IoU above and below which a sentence is an example of it


def main(argv: Sequence[str] | None = None) -> None:
    """Take the steps that are not done yet, then report."""
    parser = text_parser(__doc__)
    default = "config/refshapes/cris_tiny.yaml"
    parser.add_argument("--config", default=default, help="cris_tiny or cris_small (%(default)s)")
    config = parser.parse_args(argv).config
    cfg = load_config(config)
    is_suitable = cfg.DATA.dataset == "refshapes" and cfg.TEST.protocol == "both"
    if not is_suitable or "val" not in cfg.TEST.splits:
        raise UserError(f"{config} is none of the quickstart: take {default}")
    for name, command in steps(config, cfg):
        take(name, command)
    report(cfg)


def steps(config: str, cfg: Config) -> Iterator[tuple[str, str | None]]:
    """Yield the name and the command of each step, None if its result is there already.

    Each looks at the files after those before it were taken.
    """
    is_drawn = is_complete(REFER, DEFAULT_IMAGES, seed=0)
    yield "draw the images", None if is_drawn else f"tools/refshapes.py -o {REFER}"

    lmdbs = {split: LMDB / f"{split}.lmdb" for split in DEFAULT_IMAGES}
    refs = REFER / "refshapes" / "generator.json"
    stale = [split for split, lmdb in lmdbs.items() if not is_fresh([lmdb], [refs])]
    command = f"tools/data_process.py --data_root {REFER} --output_dir datasets"
    command += " --dataset refshapes --split unc --generate_mask"
    yield "annotations and masks", command if stale else None
    for split in DEFAULT_IMAGES:
        command = f"tools/folder2lmdb.py -j datasets/anns/refshapes/{split}.json -o {LMDB}"
        command += f" -i {REFER}/images/train2014 -m datasets/masks/refshapes"
        yield f"pack {split}", command if split in stale else None

    yield "train", training_command(config, cfg)

    command = f"test.py --config {shlex.quote(config)} --opts TEST.report True"
    command += f" TEST.visualize True TEST.visualize_limit {PICTURES}"
    yield "evaluate", command
    swap = f"{command} TEST.test_split val TEST.swap_sentences True"
    yield "evaluate with swapped sentences", swap


def training_command(config: str, cfg: Config) -> str | None:
    """Go on from the last checkpoint if it is of this config and data, else clear the folder."""
    command, folder = f"train.py --config {shlex.quote(config)}", cfg.run_folder
    last, data = folder / LAST, [*map(Path, cfg.DATA.train_lmdb), Path(cfg.DATA.val_lmdb)]
    if is_fresh([last, folder / BEST], data):
        state = read_checkpoint(last, "quickstart")
        was, now, rest = state.get("config"), cfg.model_dump(), {"resume": None}
        if was and all(was[name] | rest == now[name] | rest for name in ("DATA", "TRAIN")):
            is_done = state["epoch"] == cfg.TRAIN.epochs
            return None if is_done else f"{command} --opts TRAIN.resume {last}"
    for path in (*list_checkpoints(folder), *folder.glob("test_*.json*")):
        path.unlink()
    return command


def take(name: str, command: str | None) -> None:
    """Run a step's command, if it has one, on one GPU at most; a failure ends the program."""
    if command is None:
        print(f"● {name}: complete, reused", flush=True)
        return
    print(f"● {name}\n  $ {os.path.relpath(sys.executable)} {command}", flush=True)
    first_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    # On a CPU, a thread that waits for another soon gives up its core: where anything else runs
    # beside, the default (30 times that long) makes a step take seconds.
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ, "CUDA_VISIBLE_DEVICES": first_gpu}
    words = [sys.executable, *shlex.split(command)]
    if code := subprocess.run(words, env=environment).returncode:
        sys.exit(code if code > 0 else 128 - code)


def is_fresh(outputs: Sequence[Path], inputs: Sequence[Path]) -> bool:
    """Tell whether all of these files are there, and no output is older than an input."""
    if not all(path.exists() for path in (*outputs, *inputs)):
        return False
    first = min(path.stat().st_mtime for path in outputs)
    return first >= max(path.stat().st_mtime for path in inputs)


def result(cfg: Config, split: str, protocol: str = "aligned", swapped: bool = False) -> Path:
    """Name the scores of a split; the `.jsonl` beside them has a line a sentence."""
    names = {"dataset": cfg.DATA.dataset, "split": split, "protocol": protocol}
    names |= {"threshold": PROTOCOLS[protocol].threshold, "swapped_sentences": swapped}
    return cfg.run_folder / f"{result_stem(names)}.json"


def report(cfg: Config) -> None:
    """Print the scores and where everything lies; write the picture of examples."""
    text = result(cfg, "val").with_suffix(".jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    swapped = json.loads(result(cfg, "val", swapped=True).read_text())
    pictures = cfg.run_folder / "vis"
    save_picture(contact_sheet(choose_examples(lines)), pictures / "examples.png")

    print(f"\n{cfg.TRAIN.exp_name} on RefShapes, in per cent")
    scores = [result(cfg, split, p) for split in cfg.TEST.splits for p in ("aligned", "published")]
    print_table([json.loads(path.read_text()) for path in scores])
    print("\nmIoU on val (aligned): of each kind of sentence, and does it read?")
    rows = scores_by_kind(lines) | {"another object's sentences, swapped": swapped["mIoU"]}
    for name, score in rows.items():
        print(f"  {name:<64}{100 * score:>6.2f}")
    print(f"""
where to look
  report        {cfg.run_folder / REPORT / INDEX}, to open in a browser
  six examples  {pictures / "examples.png"}
  overlays      {pictures}/refshapes_<split>/, {PICTURES} sentences each
  scores        {result(cfg, "val")} and so on; a line a sentence in the .jsonl
  training      {cfg.run_folder / "train.log"}, numbers in metrics.jsonl""")


def scores_by_kind(lines: Sequence[dict]) -> dict[str, float]:
    """Return the mIoU of the sentences of each of the report's kinds that occurs."""
    scores = {}
    for kind in KIND_PATTERNS:
        if ious := [r["iou"] for r in lines if kind in sentence_kinds(r["sentence"])]:
            scores[f"{kind}, {len(ious):,} sentences"] = sum(ious) / len(ious)
    return scores


def choose_examples(lines: Sequence[dict]) -> list[dict]:
    """Choose up to six telling sentences: a success of each kind, another one on the image of the
    last, and a failure. Small referents come first, since they are hard and their images full.
    """
    lines = sorted(lines, key=object_share)
    good = [r for r in lines if r["iou"] >= SUCCESS]
    chosen: list[dict] = []
    for kind in KIND_PATTERNS:
        used = {r["image"] for r in chosen}
        of_kind = [r for r in good if kind in sentence_kinds(r["sentence"])]
        chosen += [r for r in of_kind if r["image"] not in used][:1]
    for last in chosen[-1:]:
        same_image = [r for r in good if r["image"] == last["image"]]
        chosen += [r for r in same_image if r["ref_id"] != last["ref_id"]][-1:]
    return chosen + [r for r in lines if r["iou"] < FAILURE][:1]


def contact_sheet(records: Sequence[dict]) -> Image.Image:
    """Set the photos of examples with truth and prediction in two columns."""
    reader = RecordReader(LMDB / "val.lmdb")
    positions = {ref_id: i for i, ref_id in enumerate(reader.index.ref_ids)}
    refs = [reader.ref(positions[record["ref_id"]]) for record in records]
    cells = [draw_sentence(reader, *pair) for pair in zip(refs, records, strict=True)]
    return grid(cells, columns=2, gap=20)


if __name__ == "__main__":
    run_entry_point(main)
