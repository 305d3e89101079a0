"""Read refs from Parquet files of the Hugging Face Hub, and lay them out as a REFER folder.

So tools/data_process.py makes the same annotations and masks of them as of REFER's archives.
"""

import json
import os
import pickle
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engine.report.categories import NAMES
from utils.errors import UserError
from utils.files import atomic_path, is_plain_name, staging_folder

REF = ("ref_id", "ann_id", "image_id", "category_id", "split", "sentences")


# Each reader yields refs with annotation and image in REFER's words, and the photo if it is inside.
def _read_refs(row: dict) -> Iterator[tuple]:
    """Read a row that is a ref, with COCO's annotation and image as JSON text."""
    yield row, json.loads(row["raw_anns"]), json.loads(row["raw_image_info"]), None


def _read_benchmark(row: dict) -> Iterator[tuple]:
    """Read a row that is a photo of an evaluation split, with its refs."""
    for item in row["ref_list"]:
        yield item["ref_info"], item["ann_info"], row["image_info"], row["image"]["bytes"]


def _read_refcoco_m(row: dict) -> Iterator[tuple]:
    """Read a photo of RefCOCO-M with its masks; its sentences have no ids."""
    for sample in row["samples"]:
        number, (height, width) = sample["id"], sample["mask"]["size"]
        image = {"id": row["image_id"], "file_name": row["file_name"]}
        annotation = {"id": number, "bbox": sample["bbox"], "segmentation": sample["mask"]}
        category = NAMES["refcoco"].index(sample["category"])
        sentences = [{"sent": text} for text in sample["sentences"]]
        ref = dict(zip(REF, (number, number, image["id"], category, "val", sentences), strict=True))
        yield ref, annotation, image | {"height": height, "width": width}, row["image"]["bytes"]


LAYOUTS = {"refs": _read_refs, "benchmark": _read_benchmark, "refcoco_m": _read_refcoco_m}


def write_refer(
    files: Sequence[Path], layout: str, folder: Path, split_by: str, photos: Path
) -> None:
    """Write refs(<split_by>).p and instances.json; the folder appears when both are whole.

    Args:
        files: the Parquet files; they are read a group of rows at a time.
        layout: what lies in them, of `LAYOUTS`.
        photos: folder for photos that lie in the rows.
    Raises:
        UserError: a file is no Parquet, or has a row that is no ref.
    """
    refs, annotations, images, sent_ids = [], {}, {}, count()
    for where, row in _rows(files):
        try:
            for ref, annotation, image, photo in LAYOUTS[layout](row):
                ref = {name: ref[name] for name in REF}
                if split_by == "unc" and ref["split"] == "test":  # as the Parquet calls it
                    ref["split"] = "testA"
                for sentence in ref["sentences"]:
                    sentence.setdefault("sent_id", next(sent_ids))
                if photo is not None and image["id"] not in images:
                    if not is_plain_name(name := image["file_name"]):
                        raise ValueError(f"{name!r:.80} is no name of a photo")
                    with atomic_path(photos / name) as partial:
                        partial.write_bytes(photo)
                refs.append(ref)
                annotations[annotation["id"]], images[image["id"]] = annotation, image
        except (KeyError, TypeError, ValueError) as error:
            told = f"{where} is no ref ({type(error).__name__}: {error}), it has {', '.join(row)}"
            raise UserError(f"{told}: get the file from elsewhere") from None
    categories = [{"id": number} for number in sorted({ref["category_id"] for ref in refs})]
    instances = {"images": list(images.values()), "annotations": list(annotations.values())}
    with staging_folder(folder) as staging:
        (staging / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))
        (staging / "instances.json").write_text(json.dumps(instances | {"categories": categories}))
        os.replace(staging, folder)


def _rows(files: Sequence[Path]) -> Iterator[tuple[str, dict]]:
    """Yield each row with its place, a few rows in memory at a time."""
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=64))
                for number, row in enumerate(chain.from_iterable(batches)):
                    yield f"{path}: row {number}", row
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is no whole Parquet file ({error}): get it again") from None
