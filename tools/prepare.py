"""Prepare a data set by one command: download, unpack, convert, pack, verify; CLIP's weights too.

    python tools/prepare.py refcoco clip-rn50
    python tools/prepare.py refcocog_u --from ~/Downloads     # files that are there, no network

What is there and whole is not made again, so an interrupted run is continued by the same command.
To make something anew, delete it. tools/prepare_datasets.md tells the size of each target; "all"
is everything but the evaluation splits.
"""

import argparse
import sys
import zipfile
from collections.abc import Sequence
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
from tools.download import (
    UnfitError,
    ask_hub,
    check_file,
    check_space,
    fetch,
    members,
    untar,
    unzip,
)
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
REFS_BYTES = 4 * 10**8  # of a data set's annotations and masks, about


def main(argv: Sequence[str] | None = None) -> None:
    """Make each target."""
    args = _parse_args(argv)
    everything = [t for t in TARGETS if t not in DATASETS or "archive" in DATASETS[t]]
    for target in everything if "all" in args.targets else args.targets:
        if target in DATASETS:
            make_dataset(args, target, DATASETS[target])
        elif target in CLIP:
            make_clip(args, CLIP[target])
        else:
            make_photos(args)
        print(f"{target} is ready")


def make_dataset(args: argparse.Namespace, target: str, data: dict) -> None:
    """Make the records of a data set's splits, and check each."""
    root, name, is_whole = args.root, data["name"], "archive" in data
    known = PUBLISHED.get(name) or data_process.SPLITS_OF[name, data["split_by"]]
    splits = [split for split in known if is_whole or split != "train"]
    lmdbs = {split: root / "lmdb" / target / f"{split}.lmdb" for split in splits}
    jsons = {split: root / "anns" / target / f"{split}.json" for split in splits}
    left = [split for split in splits if not lmdbs[split].is_file()]
    odd = ["--skip-odd"] if args.skip_odd else []
    # Annotations are written after their masks, so they tell that both are whole.
    expected = all if is_whole and not args.subset else any
    are_converted = expected(path.is_file() for path in jsons.values())
    if left and not are_converted:
        check_space(root, REFS_BYTES, f"the annotations of {target}")
        make_refs(args, data)
        where = ["--data_root", str(root / "refer"), "--output_dir", str(root), "--name", target]
        which = ["--dataset", data["folder"], "--split", data["split_by"], "--generate_mask"]
        data_process.main([*where, *which, *odd])
    left = [split for split in left if jsons[split].is_file()]
    if left and is_whole:
        make_photos(args)
    images = root / "images" / (PHOTOS if is_whole else data["folder"])
    for split in left:
        print(f"{target}: pack {split}", flush=True)
        check_space(root, data["lmdb"] // len(splits), f"packing {target} {split}")
        source = ["-j", str(jsons[split]), "-i", str(images), "-m", str(root / "masks" / target)]
        folder2lmdb.main([*source, "--dataset", name, "-o", str(lmdbs[split].parent), *odd])
    verify(args, [path for path in lmdbs.values() if path.is_file()], data["word_len"])


def verify(args: argparse.Namespace, lmdbs: Sequence[Path], word_len: int) -> None:
    """Check every record; the sheet beside a file tells that this was done."""
    for lmdb in lmdbs:
        sheet, faults = lmdb.with_suffix(".jpg"), []
        if not sheet.is_file():
            faults = inspect(lmdb, sheet, word_len=word_len, is_subset=args.subset)
        elif not args.subset:
            faults = differences(RecordReader(lmdb).meta)
        if faults:
            sheet.unlink()
            raise UserError(f"{lmdb}: {faults[0]}; delete what is wrong and run this again")


def make_refs(args: argparse.Namespace, data: dict) -> None:
    """Make a REFER folder: of a folder given, its archive, or Parquet with photos or without."""
    folder = args.root / "refer" / data["folder"]
    if find_refs(folder, data["split_by"]).is_file():
        return
    if args.given is not None and find_refs(args.given / folder.name, data["split_by"]).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder.symlink_to((args.given / folder.name).resolve())
    if "archive" in data and args.source == "zip":
        return unpack(args, data["archive"], folder)
    if "parquet" not in data:
        raise UserError("there are no Parquet files of this split: leave --source away")
    print(f"{folder}: from the Parquet files of {data['parquet']}", flush=True)
    files, where = data["files"], args.given
    if where is None:
        where = args.root / "downloads" / f"{data['folder']}-parquet"
        check_space(args.root, data["lmdb"], f"the Parquet files of {data['parquet']}")
        what = {"repo_type": "dataset", "local_dir": where, "allow_patterns": f"*{files}"}
        ask_hub(snapshot_download, data["parquet"], **what)
    elif (where / data["folder"]).is_dir():
        where = where / data["folder"]
    found = sorted(where.rglob(files))
    if not found:
        raise UserError(f"{where} has no {files}: put the Parquet files of {data['parquet']} there")
    photos = args.root / "images" / data["folder"]
    write_refer(found, data["layout"], folder, data["split_by"], photos)


def make_photos(args: argparse.Namespace) -> None:
    """Make the folder of COCO's photos; one with all of them counts, whoever made it."""
    folder, published = args.root / "images" / PHOTOS, ARCHIVES[f"{PHOTOS}.zip"]["photos"]
    found = sum(1 for _ in folder.glob("*.jpg"))
    if found == 0:
        unpack(args, f"{PHOTOS}.zip", folder)
    elif found != published and not args.subset:
        raise UserError(
            f"{folder} has {found:,} photos, where {published:,} are published: complete it, or "
            "delete it"
        )


def unpack(args: argparse.Namespace, name: str, folder: Path) -> None:
    """Get an archive, unless it is there, and unpack its folder."""
    archive, path = ARCHIVES[name], args.root / "downloads" / name
    check = partial(check_archive, archive, is_subset=args.subset)
    if path.is_file():
        check(path)
    else:
        fetch(sources(args, name, archive["sources"]), path, check)
    print(f"{folder}: unpack {path}", flush=True)
    if path.suffix == ".gz":
        return untar(path, archive["files"], folder)
    unzip(path, archive["folder"], folder)


def check_archive(archive: dict, path: Path, is_subset: bool) -> None:
    """Raise UnfitError if a file is not the archive; of a part of the data only look inside."""
    if path.suffix == ".gz":  # neither its size nor its digest is known
        return untar(path, archive["files"])
    if not is_subset:
        check_file(path, archive["size"], archive["sha256"], archive["witnesses"])
    names = {entry.filename for entry in members(path)}
    wanted = archive.get("files", [])[: 1 if is_subset else None]
    if lacking := {f"{archive['folder']}/{name}" for name in wanted} - names:
        raise UnfitError(f"{path} lacks {', '.join(sorted(lacking))}: get it again")


def make_clip(args: argparse.Namespace, clip: dict) -> None:
    """Get OpenAI's archive, or the same weights as safetensors."""
    path = args.pretrain / clip["file"]
    if not path.is_file():
        fetch(sources(args, path.name, clip["sources"]), path, partial(check_clip, clip))


def check_clip(clip: dict, path: Path) -> None:
    """Compare a file with OpenAI's archive, or with what its weights must be in another form.

    Raises:
        UnfitError: it is no CLIP of these sizes, or half precision, which the archive has, would
            change a weight.
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


def sources(args: argparse.Namespace, name: str, published: Sequence[str]) -> Sequence[str]:
    """Return where to get a file: from the folder given, the mirrors, or where it is published."""
    if args.given is not None:
        return [str(args.given / name)]
    return [f"{mirror.rstrip('/')}/{name}" for mirror in args.mirror] or published


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = text_parser(__doc__)
    add = parser.add_argument
    add("targets", nargs="+", choices=(*TARGETS, "all"), help="what to make")
    add("--root", type=Path, default=Path("datasets"), help="data root (%(default)s)")
    add("--pretrain", type=Path, default=Path("pretrain"), help="for CLIP (%(default)s)")
    add("--from", dest="given", type=Path, metavar="DIR", help="use files in DIR, offline")
    add("--source", choices=("zip", "parquet"), default="zip", help="of the refs (%(default)s)")
    mirror = "download from URL/<archive> instead; may be given several times"
    add("--mirror", action="append", default=[], metavar="URL", help=mirror)
    add("--skip-odd", action="store_true", help="leave out refs that cannot be used")
    add("--subset", action="store_true", help="a part of the data: compare no sizes and counts")
    args = parser.parse_args(argv)
    if args.given is not None and not args.given.is_dir():
        parser.error(f"--from {args.given} is no folder")
    return args


if __name__ == "__main__":
    run_entry_point(main)
