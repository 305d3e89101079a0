"""Say what is going to run before it runs."""

import json
import shlex
import textwrap
from collections.abc import Iterator

import numpy as np
import torch
from loguru import logger

from engine.loaders import report_records
from engine.run import Run
from utils.config import Config
from utils.distributed import unwrap
from utils.records import RecordReader


def announce(run: Run, source: str | None) -> None:
    """Log what stands out, then what `fit` is about to do, a line a subject; rank 0 only.

    Args:
        source: the checkpoint that the run goes on from, if any.
    """
    if not run.ranks.is_main:
        return
    for notice in run.cfg.notices:
        logger.info(notice)
    report_records(run.cfg, run.train_loader.dataset.records)
    for label, text in banner(run, source):
        logger.info(f"{label:<12}{text}")


def banner(run: Run, source: str | None) -> Iterator[tuple[str, str]]:
    """Yield (subject, what there is to say) in the order of the log."""
    train, ranks, model = run.cfg.TRAIN, run.ranks, unwrap(run.model)
    clip = f"{'-'.join(map(str, model.sizes.vision_layers))} of width {model.sizes.vision_width}"
    head = f"{type(model.decoder).__name__} of width {model.sizes.transformer_width}"
    inputs = f"{train.input_size} pixels, {train.word_len} tokens"
    yield "model", f"CLIP ResNet {clip}, {head}; {inputs}"
    yield "weights", origin(run, source)
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield "parameters", f"{count:,}, of them {trained:,} trained"
    for reader, kept in run.train_loader.dataset.records.parts:
        yield "training", describe_records(reader, kept)
    dataset = run.val_loader.dataset
    line = describe_records(dataset.reader, slice(None))
    ((name, protocol),) = run.protocols.items()
    rule = f"{name} protocol, threshold {protocol.threshold:g}, {dataset.sentences} sentences"
    yield "validation", f"{line}; {rule}"
    device = f"{ranks.device} with {torch.get_num_threads()} thread(s)"
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
    yield "ranks", f"{ranks.world_size} on {device}, {str(run.dtype).removeprefix('torch.')}"
    micro_batch = train.batch_size // ranks.world_size // train.accumulation_steps
    shares = f"{ranks.world_size} rank(s) x {micro_batch} x {train.accumulation_steps}"
    yield "step", f"{shares} (accumulation) = batch {train.batch_size}"
    length = f"{train.epochs:,} epochs of {run.length:,} steps"
    left = max(0, (train.epochs - run.epoch) * run.length - run.position)
    done = f", {run.step:,} of them done" if run.step else ""
    refs = len(run.train_loader.dataset)
    rest = refs - run.length * train.batch_size
    idle = f"; {rest:,} of {refs:,} refs, others each time, fill no batch" if rest else ""
    yield "length", f"{length}: {run.step + left:,} in all{done}{idle}"
    yield "output", str(run.folder)
    options = ", ".join(options_on(run.cfg)) or "as published"
    for line in textwrap.wrap(options, 80, break_long_words=False, break_on_hyphens=False):
        yield "options", line


def origin(run: Run, source: str | None) -> str:
    """Tell where the weights come from that the run starts with."""
    train = run.cfg.TRAIN
    if source is not None:
        within = f" and {run.position:,} step(s)" if run.position else ""
        return f"resumed from {source}, after {run.epoch:,} epoch(s){within}"
    if train.weight is not None:
        return f"{train.weight} (TRAIN.weight), new optimiser"
    return "random" if train.clip_pretrain is None else f"{train.clip_pretrain}, head random"


def describe_records(reader: RecordReader, kept: slice | np.ndarray) -> str:
    """Tell the path, data set and split of a file, and how much of it is used."""
    sentences = np.array(reader.index.num_sentences)[kept]
    images = np.unique(np.array(reader.index.image_keys)[kept])
    counts = f"{len(sentences):,} refs, {sentences.sum():,} sentences, {len(images):,} images"
    return f"{reader.meta['dataset']} {reader.meta['split']}: {counts} in {reader.path}"


def options_on(cfg: Config) -> list[str]:
    """Return `KEY value` of all settings but the published ones, and the sizes of the model."""
    sizes = {"clip_arch", "word_dim", "vis_dim", "fpn_in", "fpn_out"}
    changed = cfg.model_dump(exclude_defaults=True, exclude={"TRAIN": sizes, "TEST": True})
    return [
        f"{section}.{name} {shlex.quote(value) if isinstance(value, str) else json.dumps(value)}"
        for section, values in changed.items()
        for name, value in values.items()
    ]
