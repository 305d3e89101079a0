"""Read refs from Parquet files of the Hugging Face Hub, and lay them out as a REFER folder.

So tools/data_process.py makes the same annotations and masks of them as of REFER's archives.
"""

import json
import pickle
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engine.report.categories import NAMES
from utils.errors import UserError
from utils.files import atomic_path, is_plain_name, staging_folder

REF = ("ref_id", "ann_id", "image_id", "category_id", "split", "sentences")
# A ref, its annotation and its image in REFER's words, and the photo where it is inside.
Found = tuple[dict, dict, dict, bytes | None]


def _read_refs(row: dict) -> Iterator[Found]:
    """Read a row that is a ref, with COCO's annotation and image as JSON text."""
    ref = {name: row[name] for name in REF}
    yield ref, json.loads(row["raw_anns"]), json.loads(row["raw_image_info"]), None


def _read_benchmark(row: dict) -> Iterator[Found]:
    """Read a row that is a photo of an evaluation split, with its refs."""
    for item in row["ref_list"]:
        yield item["ref_info"], item["ann_info"], row["image_info"], row["image"]["bytes"]


def _read_refcoco_m(row: dict) -> Iterator[Found]:
    """Read a photo of RefCOCO-M with its masks; its sentences have no ids."""
    for sample in row["samples"]:
        number, (height, width) = sample["id"], sample["mask"]["size"]
        image = {"id": row["image_id"], "file_name": row["file_name"]}
        annotation = {"id": number, "bbox": sample["bbox"], "segmentation": sample["mask"]}
        category = NAMES["refcoco"].index(sample["category"])
        sentences = [{"sent": text} for text in sample["sentences"]]
        ref = dict(zip(REF, (number, number, image["id"], category, "val", sentences), strict=True))
        yield ref, annotation, image | {"height": height, "width": width}, row["image"]["bytes"]


# By kind of Parquet file: the columns that are needed, and what reads the refs of a row.
LAYOUTS = {
    "refs": ((*REF, "raw_anns", "raw_image_info"), _read_refs),
    "benchmark": (("image", "image_info", "ref_list"), _read_benchmark),
    "refcoco_m": (("image", "image_id", "file_name", "samples"), _read_refcoco_m),
}


def write_refer(
    files: Sequence[Path], layout: str, folder: Path, split_by: str, photos: Path
) -> None:
    """Write refs(<split_by>).p and instances.json; the folder appears when both are whole.

    Args:
        files: the Parquet files; they are read a group of rows at a time.
        layout: what lies in them, of `LAYOUTS`.
        photos: folder for photos that lie in the rows.
    Raises:
        UserError: a file is no Parquet, lacks a column, or has a row that is no ref.
    """
    columns, read = LAYOUTS[layout]
    refs, annotations, images, sent_ids = [], {}, {}, count()
    for where, row in _rows(files, columns):
        try:
            for ref, annotation, image, photo in read(row):
                if split_by == "unc" and ref["split"] == "test":  # as the Parquet calls it
                    ref["split"] = "testA"
                for sentence in ref["sentences"]:
                    sentence.setdefault("sent_id", next(sent_ids))
                if photo is not None and image["id"] not in images:
                    name = image["file_name"]
                    if not is_plain_name(name):
                        raise ValueError(f"{name!r:.80} is no name of a photo")
                    with atomic_path(photos / name) as partial:
                        partial.write_bytes(photo)
                refs.append(ref)
                annotations[annotation["id"]], images[image["id"]] = annotation, image
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{where} is no ref ({reason}): get the file from elsewhere") from None
    categories = [{"id": number} for number in sorted({ref["category_id"] for ref in refs})]
    instances = {"images": list(images.values()), "annotations": list(annotations.values())}
    with staging_folder(folder) as staging:
        made = staging / folder.name
        made.mkdir()
        (made / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))
        (made / "instances.json").write_text(json.dumps(instances | {"categories": categories}))
        made.replace(folder)


def _rows(files: Sequence[Path], columns: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """Yield each row with its place, a few rows in memory at a time."""
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if missing := [name for name in columns if name not in names]:
                    lacks = f"{path} has no column {', '.join(missing)}"
                    raise UserError(f"{lacks}: it has {', '.join(names)}")
                numbers = count()
                for batch in file.iter_batches(batch_size=64, columns=list(columns)):
                    yield from ((f"{path}: row {next(numbers)}", r) for r in batch.to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is no whole Parquet file ({error}): get it again") from None
