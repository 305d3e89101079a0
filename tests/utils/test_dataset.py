"""Which sentence a visit draws, and which sentences are scored."""

import gc
import multiprocessing
import re
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, all_refs, training_dataset, write_records
from torch.utils.data import DataLoader

from utils.dataset import EvaluationDataset, TrainingDataset, collate_images, collate_refs
from utils.errors import UserError
from utils.records import RecordReader, group_positions
from utils.tokenizer import tokenize
from utils.transforms import decode_mask, letterbox_mask

SIDE, WORD_LEN = 32, 9


def evaluation_dataset(path: Path, **options: object) -> EvaluationDataset:
    return EvaluationDataset(RecordReader(path), SIDE, WORD_LEN, **options)


def drawn_epoch(dataset: TrainingDataset, epoch: int) -> list[str]:
    return [dataset.describe((position, epoch))[1] for position in range(len(dataset))]


# ----------------------------------------------------------------------------------------- training


def test_sample_is_the_letterboxed_photo_mask_and_tokens_of_the_ref(shapes_lmdb):
    dataset, refs = training_dataset(shapes_lmdb), all_refs(shapes_lmdb)
    assert len(dataset) == len(refs) == 29
    sample = dataset[7, 0]
    assert sample["image"].shape == (SIDE, SIDE, 3)
    assert sample["image"].dtype == sample["mask"].dtype == torch.uint8
    assert sample["position"] == 7
    mask = letterbox_mask(decode_mask(refs[7].mask, ""), SIDE)
    assert np.array_equal(sample["mask"].numpy(), mask)
    ref_id, sentence = dataset.describe((7, 0))
    assert (ref_id, sentence in refs[7].sentences) == (refs[7].ref_id, True)
    assert torch.equal(sample["tokens"], tokenize(sentence, WORD_LEN)[0])


def test_sentences_differ_between_epochs_and_depend_on_seed_epoch_and_position_alone(shapes_lmdb):
    epochs = [drawn_epoch(training_dataset(shapes_lmdb), epoch) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert drawn_epoch(training_dataset(shapes_lmdb, seed=1), 0) != epochs[0]
    torch.manual_seed(1)
    np.random.seed(2)
    dataset = training_dataset(shapes_lmdb)
    again = [dataset.describe((position, 2))[1] for position in reversed(range(29))]
    assert again[::-1] == epochs[2]


def test_every_sentence_of_a_ref_is_drawn_about_equally_often(shapes_lmdb):
    dataset = training_dataset(shapes_lmdb)
    drawn = Counter(dataset.describe((3, epoch))[1] for epoch in range(600))
    assert sorted(drawn) == sorted(dataset.records.ref(3).sentences)
    assert len(drawn) == 4
    deviation = (600 / 4 * (1 - 1 / 4)) ** 0.5
    assert all(abs(count - 600 / 4) < 4 * deviation for count in drawn.values())


def test_refs_batched_by_image_are_the_same_refs_with_each_image_once(shapes_lmdb):
    dataset = training_dataset(shapes_lmdb)
    visits = [(position, 3) for position in (4, 0, 1, 3, 5, 28)]
    samples = dataset.__getitems__(visits)
    plain, joined = collate_refs(samples), collate_refs(samples, by_image=True)
    assert plain["image_index"] is None
    assert len(plain["images"]) == 6
    assert joined["image_index"].tolist() == [0, 1, 1, 0, 2, 3]
    assert len(joined["images"]) == 4
    assert torch.equal(joined["images"][joined["image_index"]], plain["images"])
    for key in ("masks", "tokens", "positions"):
        assert torch.equal(joined[key], plain[key])
    for sample, visit in zip(samples, visits, strict=True):
        assert torch.equal(sample["image"], dataset[visit]["image"])
        assert torch.equal(sample["tokens"], dataset[visit]["tokens"])


def test_positions_are_grouped_by_image_in_the_order_of_first_refs():
    assert group_positions(["b", "a", "b", "c", "a"]) == [[0, 2], [1, 4], [3]]
    assert group_positions(range(3)) == [[0], [1], [2]]


# --------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("sentences", ["all", "first"])
@pytest.mark.parametrize("swap", [False, True])
def test_every_sentence_is_there_once_and_its_mask_is_that_of_mask_source(
    shapes_lmdb, sentences, swap
):
    dataset = evaluation_dataset(shapes_lmdb, sentences=sentences, swap=swap)
    tasks = [task for i in range(len(dataset)) for task in dataset[i]["tasks"]]
    keys = [task.key for task in tasks]
    assert len(keys) == len(set(keys))
    assert set(keys) == dataset.keys()
    refs = all_refs(shapes_lmdb)
    for task in tasks:
        position, place = task.key
        assert task.sentence == refs[position].sentences[place]
        assert task.sent_id == refs[position].sent_ids[place]
        assert task.ref == dataset.mask_source(task.key)
        assert task.ref.image_key == refs[position].image_key
        assert (task.ref != refs[position]) == swap
    asked = {p: 1 if sentences == "first" else len(ref.sentences) for p, ref in enumerate(refs)}
    if swap:  # two images have a single ref
        asked = {p: n for p, n in asked.items() if refs[p].image_id not in (2, 7)}
    assert dataset.keys() == {(p, place) for p, n in asked.items() for place in range(n)}
    assert {task.ref.ref_id for task in tasks} == {refs[p].ref_id for p in asked}


def test_images_are_read_once_with_all_their_sentences(shapes_lmdb):
    dataset = evaluation_dataset(shapes_lmdb)
    assert len(dataset) == 12
    names = [{task.ref.image_key for task in dataset[i]["tasks"]} for i in range(12)]
    assert all(len(name) == 1 for name in names)
    assert len(set.union(*names)) == 12
    for task, tokens in zip(dataset[1]["tasks"], dataset[1]["tokens"], strict=True):
        assert torch.equal(tokenize(task.sentence, WORD_LEN)[0], tokens)


def test_collated_sentences_point_to_their_images(shapes_lmdb):
    dataset = evaluation_dataset(shapes_lmdb)
    batch = collate_images([dataset[0], dataset[3]])
    assert batch["images"].shape == (2, SIDE, SIDE, 3)
    counts = [len(dataset[i]["tasks"]) for i in (0, 3)]
    assert batch["image_index"].tolist() == [0] * counts[0] + [1] * counts[1]
    assert len(batch["tokens"]) == sum(counts)
    shown = ["image_0.jpg"] * counts[0] + ["image_3.jpg"] * counts[1]
    assert [task.ref.image_key for task in batch["tasks"]] == shown


# --------------------------------------------------------------------------------------- long lives


def test_memory_does_not_grow_over_epochs(shapes_lmdb):
    training, evaluation = training_dataset(shapes_lmdb), evaluation_dataset(shapes_lmdb)

    def visit_all(epoch: int) -> None:
        for position in range(len(training)):
            training[position, epoch]
        for i in range(len(evaluation)):
            evaluation[i]

    def held() -> int:
        """Bytes that code of the repository has asked for; other threads may hold some too."""
        gc.collect()
        ours = tracemalloc.Filter(True, f"{ROOT}/*"), tracemalloc.Filter(False, "*/.venv/*")
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(ours).traces)

    for epoch in range(4):  # caches of words fill
        visit_all(epoch)
    tracemalloc.start()
    try:
        visit_all(4)
        before = held()
        for epoch in range(5, 12):
            visit_all(epoch)
        grown = held() - before
    finally:
        tracemalloc.stop()
    # Bytes. Keeping the photos or the records of seven epochs takes 200,000 or more.
    assert grown < 60_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("collate", [collate_refs, partial(collate_refs, by_image=True)])
def test_a_workers_memory_does_not_grow_with_the_batches_it_has_made(shapes_lmdb, collate):
    """Batches of full size: stacked on a worker's heap they left it in pieces, a gigabyte."""
    dataset = training_dataset(shapes_lmdb, side=416)
    batches = [[(i % 29, epoch) for i in range(64)] for epoch in range(16)]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=1, collate_fn=collate)
    sizes = []
    for _ in loader:
        (worker,) = multiprocessing.active_children()
        status = Path(f"/proc/{worker.pid}/status").read_text()
        sizes.append(int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1000)
    assert len(sizes) == 16
    assert max(sizes[1:]) - sizes[1] < 40  # MB; it was 108 by refs


def test_a_photo_of_another_size_than_its_ref_is_named(shapes_lmdb, monkeypatch):
    read = RecordReader.ref
    monkeypatch.setattr(RecordReader, "ref", lambda *args: replace(read(*args), height=41))
    for dataset, index in (
        (training_dataset(shapes_lmdb), (0, 0)),
        (evaluation_dataset(shapes_lmdb), 0),
    ):
        with pytest.raises(UserError, match=r"image_0\.jpg is 110×72 pixels, ref 100 says 110×41"):
            dataset[index]


def test_swap_without_any_image_of_two_refs_is_refused(tmp_path):
    path = write_records(tmp_path / "val.lmdb", [1, 1])
    with pytest.raises(UserError, match=r"val\.lmdb: no image has two refs"):
        evaluation_dataset(path, swap=True)
