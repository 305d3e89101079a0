"""How fast this is, in ratios: reading samples, evaluation, a training step, and its memory.

`eval`, `train` and `memory` compare with the published formulation (tools/published.py) on the same
weights, photos and sentences; `data` compares ways of reading, or times an epoch of a config.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.errors import run_entry_point
from utils.files import atomic_path

EPILOG = """examples:
  python tools/benchmark.py eval DATA_ROOT
  python tools/benchmark.py train datasets/lmdb/refcoco/val.lmdb --by-images
  python tools/benchmark.py memory
  python tools/benchmark.py data datasets/lmdb/*/val.lmdb --rounds 9 --cache /fast/disk
  python tools/benchmark.py data --config config/refcoco/cris_r50.yaml --opts TRAIN.workers 2"""

DEFAULT_CONFIG = "config/refcoco/cris_r50.yaml"
ROUNDS = {"data": 7, "eval": 3, "train": 5, "memory": 1}
LOWEST = {"rounds": 1, "input_size": 1, "word_len": 2, "sentences": 1, "batch": 2, "threads": 0}


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse_args(argv)
    with TemporaryDirectory() as folder:
        result = (
            measure_data(args, Path(folder))
            if args.command == "data"
            else compare(args, Path(folder))
        )
    if args.json:
        with atomic_path(args.json) as partial:
            partial.write_text(json.dumps(result, indent=2) + "\n")


def measure_data(args: argparse.Namespace, folder: Path) -> dict:
    """One epoch of a config's training loader, or ways of reading LMDB files."""
    from tools.measure import machine
    from tools.reading import compare_readers, time_epoch

    if args.config:
        found = time_epoch(args.config, args.opts)
    else:
        found = compare_readers(args, args.cache or folder)
    return {"command": args.command, "machine": machine(), **found}


def compare(args: argparse.Namespace, folder: Path) -> dict:
    """This repository against the published formulation."""
    from engine.build import find_device
    from tools import formulations

    find_device(args.device, "--device")  # before anything is packed
    ways = {
        "eval": formulations.compare_evaluation,
        "train": formulations.compare_training,
        "memory": formulations.compare_memory,
    }
    lmdb = formulations.find_records(args.records, folder)
    if getattr(args, "way", None):
        return formulations.serve(args, lmdb)
    result = {"command": args.command, **ways[args.command](args, lmdb)}
    formulations.show(result)
    return result


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="ways of reading, one core, compared and timed")
    data.add_argument("lmdb", type=Path, nargs="*", help="records with real photos")
    data.add_argument("--input-size", type=int, default=416, help="default 416")
    data.add_argument("--word-len", type=int, default=17, help="default 17")
    data.add_argument("--cache", type=Path, help="folder for the caches (a temporary one)")
    data.add_argument("--config", metavar="FILE", help="time one epoch of its loader instead")
    both = {
        "eval": commands.add_parser("eval", help="sentences a second, all included"),
        "train": commands.add_parser("train", help="images a second of a training step"),
        "memory": commands.add_parser("memory", help="peak memory of a training step"),
    }
    for command in both.values():
        command.add_argument(
            "records",
            type=Path,
            nargs="?",
            help="an LMDB, or a folder in REFER's layout; without it RefShapes are drawn",
        )
        command.add_argument("--config", default=DEFAULT_CONFIG, help=f"default {DEFAULT_CONFIG}")
        command.add_argument("--threads", type=int, default=0, help="of torch; default: its own")
        command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    both["eval"].add_argument(
        "--sentences", type=int, default=24, help="so many or a few more (default 24)"
    )
    for name in ("train", "memory"):
        both[name].add_argument("--batch", type=int, default=4, help="refs a step (default 4)")
        both[name].add_argument("--way", help=argparse.SUPPRESS)
    both["train"].add_argument(
        "--by-images", action="store_true", help="measure TRAIN.batch_by images as well"
    )
    both["train"].add_argument(
        "--parts", action="store_true", help="measure each part of the model alone as well"
    )
    for name, command in (both | {"data": data}).items():
        rounds = ROUNDS[name]
        command.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
        command.add_argument(
            "--opts",
            nargs=argparse.REMAINDER,
            default=[],
            metavar="KEY VALUE",
            help="of the config",
        )
    args = parser.parse_args(argv)
    for name, low in LOWEST.items():
        if getattr(args, name, low) < low:
            value, flag = getattr(args, name), name.replace("_", "-")
            commands.choices[args.command].error(f"--{flag} {value}: give a number from {low}")
    if args.command == "data" and bool(args.lmdb) == bool(args.config):
        data.error("give LMDB files, or --config with one")
    return args


if __name__ == "__main__":
    run_entry_point(main)
