"""Prepare a data set by one command: download, unpack, convert, pack, verify; CLIP's weights too.

    python tools/prepare.py refcoco clip-rn50
    python tools/prepare.py refcocog_u --from ~/Downloads     # files that are there, no network

What is there and whole is not made again, so an interrupted run is continued by the same command.
To make something anew, delete it. tools/prepare_datasets.md tells the size of each target.
"""

import argparse
import sys
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import yaml
from huggingface_hub import snapshot_download

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model.clip import DenseCLIP
from model.clip_archive import derive_sizes, read_clip
from model.segmenter import load_backbone
from tools import data_process, folder2lmdb
from tools.download import UnfitError, ask_hub, check_file, check_space, fetch, names_in, unpack
from tools.inspect_lmdb import PUBLISHED, differences, inspect
from tools.parquet import write_refer
from tools.refer import find_refs
from utils.arguments import text_parser
from utils.errors import UserError, run_entry_point
from utils.records import RecordReader

SOURCES = yaml.safe_load(Path(__file__).with_name("sources.yaml").read_text())
ARCHIVES, DATASETS, CLIP = SOURCES["archives"], SOURCES["datasets"], SOURCES["clip"]
COCO, PHOTOS = "coco-train2014", "train2014"
TARGETS = (*CLIP, COCO, *DATASETS)


def main(argv: Sequence[str] | None = None) -> None:
    """Make each target."""
    parser = text_parser(__doc__)
    add = parser.add_argument
    add("targets", nargs="+", choices=TARGETS, help="what to make")
    add("--root", type=Path, default=Path("datasets"), help="data root (%(default)s)")
    add("--pretrain", type=Path, default=Path("pretrain"), help="for CLIP (%(default)s)")
    add("--from", dest="given", type=Path, metavar="DIR", help="use files in DIR, offline")
    add("--source", choices=("zip", "parquet"), default="zip", help="of the refs (%(default)s)")
    add("--mirror", action="append", default=[], metavar="URL", help="get URL/<file>; repeatable")
    add("--skip-odd", action="store_true", help="leave out refs that cannot be used")
    add("--subset", action="store_true", help="a part of the data: compare no sizes and counts")
    args = parser.parse_args(argv)
    if args.given is not None and not args.given.is_dir():
        parser.error(f"--from {args.given} is no folder")
    for target in args.targets:
        if target in DATASETS:
            make_dataset(args, target, DATASETS[target])
        elif target in CLIP:
            clip = CLIP[target]
            get(args, clip, args.pretrain / clip["file"], partial(check_clip, clip))
        else:
            make_photos(args)
        print(f"{target} is ready")


def make_dataset(args: argparse.Namespace, target: str, data: dict) -> None:
    """Make the records of a data set's splits, and check each."""
    root, name, is_whole = args.root, data["name"], "archive" in data
    known = PUBLISHED.get(name) or data_process.SPLITS_OF[name, data["split_by"]]
    splits = [split for split in known if is_whole or split != "train"]
    anns, lmdb = root / "anns" / target, root / "lmdb" / target
    left = [split for split in splits if not (lmdb / f"{split}.lmdb").is_file()]
    odd = ["--skip-odd"] if args.skip_odd else []
    if left:
        check_space(root, data["lmdb"] * len(left) // len(splits), target)
    # Annotations are written after their masks, so they tell that both are whole.
    expected = all if is_whole and not args.subset else any
    if left and not expected((anns / f"{split}.json").is_file() for split in splits):
        make_refs(args, data)
        where = ["--data_root", str(root / "refer"), "--output_dir", str(root), "--name", target]
        which = ["--dataset", data["folder"], "--split", data["split_by"], "--generate_mask"]
        data_process.main([*where, *which, *odd])
    left = [split for split in left if (anns / f"{split}.json").is_file()]
    images = make_photos(args) if left and is_whole else root / "images" / data["folder"]
    for split in left:
        print(f"{target}: pack {split}", flush=True)
        words = ["-j", anns / f"{split}.json", "-i", images, "-m", root / "masks" / target]
        folder2lmdb.main([*map(str, [*words, "-o", lmdb, "--dataset", name]), *odd])
    for split in splits:
        verify(lmdb / f"{split}.lmdb", args.subset)


def verify(lmdb: Path, is_subset: bool) -> None:
    """Check every record of a file, if it is there; the sheet beside it tells that it was done."""
    sheet, faults = lmdb.with_suffix(".jpg"), []
    if lmdb.is_file() and not sheet.is_file():
        faults = inspect(lmdb, sheet, is_subset)
    elif lmdb.is_file() and not is_subset:
        faults = differences(RecordReader(lmdb).meta)
    if faults:
        sheet.unlink()
        raise UserError(f"{lmdb}: {faults[0]}; delete what is wrong and run this again")


def make_refs(args: argparse.Namespace, data: dict) -> None:
    """Make a REFER folder of its archive, or of Parquet with photos or without."""
    name, split_by, where = data["folder"], data["split_by"], args.given
    folder = args.root / "refer" / name
    if find_refs(folder, split_by).is_file():
        return
    if "archive" in data and args.source == "zip":
        return get_archive(args, data["archive"], folder)
    if "parquet" not in data:
        raise UserError("there are no Parquet files of this split: leave --source away")
    repository, files = data["parquet"], data["files"]
    print(f"{folder}: from the Parquet files of {repository}", flush=True)
    if where is None:
        where = args.root / "downloads" / f"{name}-parquet"
        what = {"repo_type": "dataset", "local_dir": where, "allow_patterns": f"*{files}"}
        ask_hub(snapshot_download, repository, **what)
    elif (where / name).is_dir():
        where = where / name
    found = sorted(where.rglob(files))
    if not found:
        raise UserError(f"{where} has no {files}: put the Parquet files of {repository} there")
    write_refer(found, data["layout"], folder, split_by, args.root / "images" / name)


def make_photos(args: argparse.Namespace) -> Path:
    """Make the folder of COCO's photos and return it; one with all of them counts, as train2017."""
    needed = 1 if args.subset else ARCHIVES[f"{PHOTOS}.zip"]["photos"]
    folder, of_2017 = (args.root / "images" / name for name in (PHOTOS, "train2017"))
    found, renamed = (sum(1 for _ in path.glob("*.jpg")) for path in (folder, of_2017))
    if found == 0 and renamed >= needed:
        return of_2017
    if found == 0:
        get_archive(args, f"{PHOTOS}.zip", folder)
    elif found < needed:
        raise UserError(f"{folder} has {found:,} of {needed:,} photos: complete or delete it")
    return folder


def get_archive(args: argparse.Namespace, name: str, folder: Path) -> None:
    """Get an archive and unpack it."""
    archive, path = ARCHIVES[name], args.root / "downloads" / name
    get(args, archive, path, partial(check_archive, archive, args.subset, folder))
    print(f"{folder}: unpack {path}", flush=True)
    unpack(path, folder)


def get(args: argparse.Namespace, what: dict, path: Path, check: Callable[[Path], None]) -> None:
    """Get a file from the folder given, the mirrors, or where it is published."""
    mirrors = [f"{mirror.rstrip('/')}/{path.name}" for mirror in args.mirror]
    given = [str(args.given / path.name)] if args.given else []
    fetch(given or mirrors or what["sources"], path, check)


def check_archive(archive: dict, is_subset: bool, folder: Path, path: Path) -> None:
    """Raise UnfitError if a file is not the archive; of a part of the data only look inside."""
    if "sha256" in archive and not is_subset:
        check_file(path, archive["size"], archive["sha256"], archive["witnesses"])
    if lacking := set(archive["files"]) - names_in(path):
        told = f"{path} lacks {' and '.join(sorted(lacking))}: get it again"
        raise UnfitError(f"{told}, or put its files into {folder}")


def check_clip(clip: dict, path: Path) -> None:
    """Raise UnfitError if a file is neither OpenAI's archive nor its weights in another form.

    Half precision, which the archive has, must change none of them.
    """
    if zipfile.is_zipfile(path):
        return check_file(path, None, clip["sha256"])
    try:
        weights = read_clip(path)
        sizes = derive_sizes(weights)
        backbone = DenseCLIP(sizes)
        load_backbone(backbone, weights)
    except ValueError as error:
        raise UnfitError(str(error)) from None
    if list(sizes.vision_layers) != clip["layers"]:
        raise UnfitError(f"{path} is another CLIP: its stages have {sizes.vision_layers} blocks")
    loaded = backbone.state_dict()
    if changed := [name for name in weights if not torch.equal(weights[name], loaded[name])]:
        raise UnfitError(f"{path} is not OpenAI's CLIP: half precision changes {changed[0]}")


if __name__ == "__main__":
    run_entry_point(main)
