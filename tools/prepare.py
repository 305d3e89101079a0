"""Prepare a data set by one command: download, unpack, convert, pack, verify; CLIP's weights too.

Each finished step is recorded in ROOT/.prepare and not repeated while what it made is there, so
an interrupted run is continued by the same command. To make something again, delete it.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model.clip_archive import PUBLISHED_DIGESTS
from tools import data_process, folder2lmdb
from tools.download import UnfitError, check_file, check_space, fetch, members, show_bytes, unzip
from tools.inspect_lmdb import PUBLISHED, inspect
from utils.errors import UserError, run_entry_point
from utils.files import atomic_path

MB = 10**6


@dataclass(frozen=True)
class Archive:
    """Holds what is known of a file that others publish.

    Sizes are bytes; `about` stands in for `size` where nobody published one.
    `folder` is what is unpacked of it, where `files` and so many `photos` must be.
    """

    name: str
    urls: tuple[str, ...]
    about: int
    unpacked: int = 0
    size: int | None = None
    sha256: str | None = None
    folder: str = ""
    files: tuple[str, ...] = ()
    photos: int = 0


class Dataset(NamedTuple):
    """Holds a way of splitting a REFER folder; `lmdb` is about how large its records get."""

    annotations: str
    split_by: str
    word_len: int
    lmdb: int


def _annotations(folder: str, saved: str, about: int, *split_by: str) -> Archive:
    """Make a REFER folder's archive; its own host is gone, the Internet Archive keeps it."""
    host = "https://bvisionweb1.cs.unc.edu/licheng/referit/data"
    return Archive(
        name=f"{folder}.zip",
        urls=(f"https://web.archive.org/web/{saved}/{host}/{folder}.zip",),
        about=about,
        unpacked=6 * about,
        folder=folder,
        files=("instances.json", *(f"refs({name}).p" for name in split_by)),
    )


ANNOTATIONS = {
    "refcoco": _annotations("refcoco", "20220413011718", 45 * MB, "unc"),
    "refcoco+": _annotations("refcoco+", "20220413011656", 45 * MB, "unc"),
    "refcocog": _annotations("refcocog", "20220413012904", 65 * MB, "umd", "google"),
}
PHOTOS = Archive(
    name="train2014.zip",
    urls=("http://images.cocodataset.org/zips/train2014.zip",),
    about=13_510_573_713,
    unpacked=13_600 * MB,
    size=13_510_573_713,
    folder="train2014",
    photos=82_783,
)
DATASETS = {
    "refcoco": Dataset("refcoco", "unc", 17, 3_300 * MB),
    "refcoco+": Dataset("refcoco+", "unc", 17, 3_300 * MB),
    "refcocog_u": Dataset("refcocog", "umd", 22, 4_500 * MB),
    "refcocog_g": Dataset("refcocog", "google", 22, 4_500 * MB),
}
CLIP = {"clip-rn50": ("RN50.pt", 256 * MB), "clip-rn101": ("RN101.pt", 292 * MB)}
COCO = "coco-train2014"
TARGETS = (*DATASETS, *CLIP, COCO)
MASKS = 100 * MB  # and JSON of a data set, about


class Done(NamedTuple):
    """Holds what a step made, and the SHA-256 that was seen, for a download."""

    outputs: Sequence[Path]
    sha256: str | None = None


@dataclass(frozen=True)
class Step:
    """Holds one thing to do, which is done once.

    Attributes:
        owner: the target or archive whose state file it is recorded in.
        name: what is done, for people.
        run: does it.
        needs: steps whose results it reads.
        folder, writes: where it writes, and about how many bytes.
        found: what it would make, where a person has put that in place, or None.
    """

    owner: str
    name: str
    run: Callable[[], Done]
    needs: tuple["Step", ...] = ()
    folder: Path = Path()
    writes: int = 0
    found: Callable[[], Done | None] = lambda: None

    @property
    def key(self) -> str:
        return f"{self.owner}: {self.name}"


class State:
    """Keeps which steps are done: one JSON file an owner in ROOT/.prepare, written whole.

    A step counts as done while everything that it made is there, of the size recorded, and what
    it was made from has not been made anew with another result since.
    """

    def __init__(self, root: Path, is_subset: bool) -> None:
        self._root = root
        self._is_subset = is_subset

    def is_done(self, step: Step) -> bool:
        """Return whether a step need not be run."""
        record = self._read(step)
        if record is None or record["subset"] != self._is_subset:
            return False
        if any(_measure(self._root / path) != size for path, size in record["outputs"].items()):
            return False
        made_from = record["needs"]
        return all(made_from.get(key, now) == now for key, now in self._ids(step.needs).items())

    def outputs(self, step: Step) -> list[Path]:
        """Return what a step made when it was run."""
        return [self._root / path for path in self._read(step)["outputs"]]

    def record(self, step: Step, done: Done) -> None:
        """Write down that a step is done."""
        outputs = {os.path.relpath(path, self._root): _measure(path) for path in done.outputs}
        needs = self._ids(step.needs)
        result = json.dumps([outputs, done.sha256, needs])
        record = {
            "at": time.strftime("%Y-%m-%d %H:%M:%S"),
            "subset": self._is_subset,
            "outputs": outputs,
            "sha256": done.sha256,
            "id": hashlib.sha256(result.encode()).hexdigest()[:16],
            "needs": needs,
        }
        records = self._load(step.owner) | {step.key: record}
        with atomic_path(self._path(step.owner)) as partial:
            partial.write_text(json.dumps(records, indent=2) + "\n")

    def _ids(self, steps: Sequence[Step]) -> dict[str, str]:
        """Return what tells the recorded steps' results from other results."""
        records = {step.key: self._read(step) for step in steps}
        return {key: record["id"] for key, record in records.items() if record is not None}

    def _read(self, step: Step) -> dict | None:
        return self._load(step.owner).get(step.key)

    def _path(self, owner: str) -> Path:
        return self._root / ".prepare" / f"{owner}.json"

    def _load(self, owner: str) -> dict:
        try:
            records = json.loads(self._path(owner).read_bytes())
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            records = None
        if not _is_state(records):
            raise UserError(
                f"{self._path(owner)} is damaged: delete it, and what is there is found again"
            )
        return records


def _is_state(records: object) -> bool:
    """Return whether it has what `State` wrote."""
    kinds = {"subset": bool, "outputs": dict, "needs": dict, "id": str}
    return isinstance(records, dict) and all(
        isinstance(record, dict)
        and all(isinstance(record.get(name), kind) for name, kind in kinds.items())
        for record in records.values()
    )


@dataclass(frozen=True)
class Workplace:
    """Knows where things come from and go to, and the steps that lead there.

    Args:
        root: the data root.
        pretrain: folder of CLIP's weights.
        source: folder whose archives are used, and no network; None to download.
        mirrors: addresses of folders to download from instead of the published ones.
        is_subset: a part of the data is enough; sizes and counts are not compared.
    """

    root: Path
    pretrain: Path
    source: Path | None
    mirrors: Sequence[str]
    is_subset: bool
    state: State

    def target(self, name: str) -> Step:
        """Return the last step of a target."""
        if name in CLIP:
            return self._get(self._clip(name), self.pretrain)
        return self._photos() if name == COCO else self._dataset(name)

    def _dataset(self, name: str) -> Step:
        dataset = DATASETS[name]
        archive = ANNOTATIONS[dataset.annotations]
        refer = self._unpack(archive, self._get(archive), self.root / "refer")
        convert = Step(
            name,
            "annotations and masks",
            partial(self._run_convert, name),
            (refer,),
            self.root,
            MASKS,
        )
        photos = self._photos()
        shares = {split: counts.refs for split, counts in PUBLISHED[name].items()}
        packs = tuple(
            Step(
                name,
                f"pack {split}",
                partial(self._run_pack, name, split),
                (convert, photos),
                self.root,
                dataset.lmdb * share // sum(shares.values()),
            )
            for split, share in shares.items()
        )
        return Step(name, "verify", partial(self._run_verify, name, packs), packs)

    def _photos(self) -> Step:
        return self._unpack(PHOTOS, self._get(PHOTOS), self.root / "images")

    def _get(self, archive: Archive, home: Path | None = None) -> Step:
        """Add the step that provides an archive: given, in its place, or downloaded to it."""
        path = (home or self.root / "downloads") / archive.name
        part = path.with_name(f"{path.name}.part")
        here = part.stat().st_size if part.is_file() else 0
        is_there = path.is_file() or (home is None and self._given(archive) is not None)
        writes = 0 if is_there else max(0, (archive.size or archive.about) - here)
        work = partial(self._run_get, archive, path, home is not None)
        return Step(_owner(archive), f"get {archive.name}", work, (), path.parent, writes)

    def _unpack(self, archive: Archive, get: Step, folder: Path) -> Step:
        return Step(
            _owner(archive),
            f"unpack {archive.name}",
            partial(self._run_unpack, archive, get, folder),
            (get,),
            folder,
            max(0, archive.unpacked - _bytes_in(folder / archive.folder)),
            partial(self._find_unpacked, archive, folder),
        )

    def _clip(self, name: str) -> Archive:
        file, about = CLIP[name]
        digest = PUBLISHED_DIGESTS[file]
        host = "https://openaipublic.azureedge.net/clip/models"
        return Archive(file, (f"{host}/{digest}/{file}",), about, sha256=digest)

    def _given(self, archive: Archive) -> Path | None:
        """Return the archive in the folder of --from, if it is there."""
        path = self.source / archive.name if self.source else None
        return path if path is not None and path.is_file() else None

    def _run_get(self, archive: Archive, path: Path, is_moved_in: bool) -> Done:
        found = path if path.is_file() else self._given(archive)
        if found is None and self.source is not None:
            raise UserError(
                f"{self.source} has no {archive.name}, nor has {path.parent}: put it there, or "
                "leave --from away to download it"
            )
        check = partial(self._check, archive)
        if found is None:
            urls = [f"{mirror.rstrip('/')}/{archive.name}" for mirror in self.mirrors]
            size = None if self.is_subset else archive.size
            digest = fetch(urls or archive.urls, path, size=size, check=check)
            return Done([path], digest)
        try:
            digest = check(found)
        except UnfitError as reason:
            raise UserError(f"{found} {reason}: delete it, and get it again") from None
        if found != path and is_moved_in:
            check_space(path.parent, found.stat().st_size, f"copying {archive.name}")
            with atomic_path(path) as copy:
                shutil.copyfile(found, copy)
            found = path
        return Done([found], digest)

    def _check(self, archive: Archive, path: Path) -> str:
        """Raise UnfitError if a file is not the archive; give its SHA-256."""
        digest = check_file(path, None if self.is_subset else archive.size, archive.sha256)
        entries = [entry.filename for entry in members(path)]
        # The pickles of other splits than the one asked for may be missing in a part of the data.
        files = archive.files[:1] if self.is_subset else archive.files
        lacking = {f"{archive.folder}/{name}" for name in files} - set(entries)
        if lacking:
            raise UnfitError(f"is an archive without {', '.join(sorted(lacking))}")
        self._check_photos(archive, entries)
        return digest

    def _check_photos(self, archive: Archive, names: Sequence[str]) -> None:
        pattern = re.compile(rf"{re.escape(archive.folder)}/[^/.][^/]*\.jpg")
        count = sum(1 for name in names if pattern.fullmatch(name))
        if archive.photos and (count == 0 or (count != archive.photos and not self.is_subset)):
            raise UnfitError(
                f"holds {count:,} photos in {archive.folder}/, where {archive.photos:,} are "
                "published"
            )

    def _run_unpack(self, archive: Archive, get: Step, folder: Path) -> Done:
        (path,) = self.state.outputs(get)
        wanted = [e for e in members(path) if e.filename.startswith(f"{archive.folder}/")]
        unzip(path, folder, wanted)
        return self._unpacked(archive, folder)

    def _unpacked(self, archive: Archive, folder: Path) -> Done:
        """Return the result of unpacking: the files that must be there, or the folder."""
        place = folder / archive.folder
        files = [place / name for name in archive.files if (place / name).is_file()]
        return Done(files or [place])

    def _find_unpacked(self, archive: Archive, folder: Path) -> Done | None:
        """Return what a person unpacked, if it is all there; a part cannot be told to be whole."""
        place = folder / archive.folder
        if self.is_subset or not place.is_dir():
            return None
        if archive.photos:
            names = [f"{archive.folder}/{entry.name}" for entry in os.scandir(place)]
            try:
                self._check_photos(archive, names)
            except UnfitError:
                return None
        elif not all((place / name).is_file() for name in archive.files):
            return None
        return self._unpacked(archive, folder)

    def _run_convert(self, name: str) -> Done:
        dataset = DATASETS[name]
        where = ["--data_root", str(self.root / "refer"), "--output_dir", str(self.root)]
        which = ["--dataset", dataset.annotations, "--split", dataset.split_by, "--name", name]
        data_process.main([*where, *which, "--generate_mask"])
        jsons = [self._json(name, split) for split in PUBLISHED[name]]
        made = [path for path in jsons if path.is_file()]
        return Done([*made, self.root / "masks" / name])

    def _run_pack(self, name: str, split: str) -> Done:
        path = self._json(name, split)
        if not path.is_file() and self.is_subset:
            print(f"no refs of {split}: nothing to pack")
            return Done([])
        images, masks = self.root / "images" / PHOTOS.folder, self.root / "masks" / name
        lmdb = self._lmdb(name, split)
        need = _bytes_to_pack(path, images, masks)
        check_space(lmdb.parent, need + need // 20, f"packing {split}")
        folder2lmdb.main(
            ["-j", str(path), "-i", str(images), "-m", str(masks), "-o", str(lmdb.parent)]
        )
        return Done([lmdb])

    def _run_verify(self, name: str, packs: Sequence[Step]) -> Done:
        outputs, bad = [], []
        for lmdb in (path for step in packs for path in self.state.outputs(step)):
            sheet = lmdb.with_suffix(".jpg")
            word_len = DATASETS[name].word_len
            if inspect(lmdb, sheet, word_len=word_len, is_subset=self.is_subset):
                bad.append(str(lmdb))
            outputs += [lmdb, sheet]
        if bad:
            raise UserError(
                f"{', '.join(bad)}: faults, listed above; delete what is wrong and run this again"
            )
        return Done(outputs)

    def _json(self, name: str, split: str) -> Path:
        return self.root / "anns" / name / f"{split}.json"

    def _lmdb(self, name: str, split: str) -> Path:
        return self.root / "lmdb" / name / f"{split}.lmdb"


def main(argv: Sequence[str] | None = None) -> None:
    """Take the steps that are not done yet."""
    args = _parse_args(argv)
    targets = list(TARGETS) if "all" in args.targets else list(dict.fromkeys(args.targets))
    state = State(args.root, args.subset)
    place = Workplace(args.root, args.pretrain, args.source, args.mirror, args.subset, state)
    steps: dict[str, Step] = {}
    for target in targets:
        add_undone(place.target(target), state, steps)
    if not args.subset:
        check_room(steps.values())
    for number, step in enumerate(steps.values(), 1):
        print(f"[{number}/{len(steps)}] {step.key}", flush=True)
        state.record(step, step.run())
    for target in targets:
        print(f"{target} is ready: {_where(place.target(target), state)}")


def add_undone(step: Step, state: State, steps: dict[str, Step]) -> None:
    """Add a step that is not done to `steps`, after those that it needs.

    What only steps that are done would need is not looked at: archives and photos may go.
    """
    if step.key in steps or state.is_done(step):
        return
    found = step.found()
    if found is not None:
        step = replace(step, run=lambda: found, writes=0)
    else:
        for need in step.needs:
            add_undone(need, state, steps)
    steps[step.key] = step


def check_room(steps: Sequence[Step]) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        UserError: names what is needed, where, and what is free.
    """
    needs: Counter[int] = Counter()
    folders: dict[int, Path] = {}
    for step in steps:
        there = next(p for p in (step.folder, *step.folder.absolute().parents) if p.is_dir())
        disk = there.stat().st_dev
        needs[disk] += step.writes
        folders.setdefault(disk, step.folder)
    for disk, need in needs.items():
        check_space(folders[disk], need, "everything that is still to do")


def sizes() -> str:
    """Return a line a target: what it is, and about how large."""
    lines = []
    for name, dataset in DATASETS.items():
        archive = ANNOTATIONS[dataset.annotations]
        lines.append(
            f"  {name:<16}{archive.name}, about {show_bytes(archive.about)}; needs {COCO}; "
            f"makes about {show_bytes(dataset.lmdb)} of LMDB"
        )
    lines += [
        f"  {name:<16}{file}, about {show_bytes(about)}" for name, (file, about) in CLIP.items()
    ]
    lines.append(
        f"  {COCO:<16}{PHOTOS.name}, {show_bytes(PHOTOS.about)}; {PHOTOS.photos:,} photos, "
        f"{show_bytes(PHOTOS.unpacked)} again"
    )
    return "\n".join(lines)


def _where(step: Step, state: State) -> str:
    sheets_aside = [path for path in state.outputs(step) if path.suffix != ".jpg"]
    return ", ".join(map(str, sheets_aside))


def _owner(archive: Archive) -> str:
    return Path(archive.name).stem


def _measure(path: Path) -> int | None:
    """Count a file's bytes, or a folder's files (hidden ones do not count); None for neither."""
    if path.is_dir():
        return sum(1 for entry in os.scandir(path) if not entry.name.startswith("."))
    return path.stat().st_size if path.is_file() else None


def _bytes_to_pack(path: Path, images: Path, masks: Path) -> int:
    """Count the bytes of all files that a split's JSON names; the packer says what is wrong."""
    try:
        entries = json.loads(path.read_bytes())
        files = {images / entry["img_name"] for entry in entries}
        files |= {masks / f"{entry['segment_id']}.png" for entry in entries}
    except (OSError, ValueError, TypeError, KeyError):
        return 0
    return sum(file.stat().st_size for file in files if file.is_file())


def _bytes_in(folder: Path) -> int:
    return sum(e.stat().st_size for e in os.scandir(folder)) if folder.is_dir() else 0


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    epilog = f"""targets:
{sizes()}
  {"all":<16}everything above

examples:
  python tools/prepare.py refcoco clip-rn50
  python tools/prepare.py refcocog_u --from ~/Downloads     # archives that are there, no network

reads and writes below ROOT: downloads/ refer/ images/ anns/ masks/ lmdb/. Photos and annotations
that are unpacked there already are used as they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = (*TARGETS, "all")
    add("targets", nargs="+", choices=names, metavar="TARGET", help=", ".join(names))
    add("--root", type=Path, default=Path("datasets"), help="data root (%(default)s)")
    add("--pretrain", type=Path, default=Path("pretrain"), help="for CLIP (%(default)s)")
    add("--from", dest="source", type=_folder, metavar="DIR", help="use archives in DIR, offline")
    add(
        "--mirror",
        type=_address,
        action="append",
        default=[],
        metavar="URL",
        help="download from URL/<archive> instead; may be given several times",
    )
    add("--subset", action="store_true", help="a part of the data: compare no sizes and counts")
    return parser.parse_args(argv)


def _folder(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def _address(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text} does not begin with http:// or https://")
    return text


if __name__ == "__main__":
    run_entry_point(main)
