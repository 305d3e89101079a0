"""Draw how trainings went: loss, scores of the validation, learning rates and speed, as one PNG.

    python tools/plot_run.py exp/refcoco/CRIS_R50
    python tools/plot_run.py exp/refcoco/CRIS_R50 exp/refcoco/CRIS_R101 -o both.png

It reads metrics.jsonl and config.yaml in each run's folder, and can be called while a run goes on.
"""

import json
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.arguments import text_parser
from utils.config import load_config
from utils.errors import UserError, run_entry_point
from utils.files import atomic_path
from utils.logger import METRICS
from utils.metrics import main_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_STYLES = ("-", "--", ":", "-.")
FEW = 60  # points that are drawn as they are; more get a running mean as well
PANELS = (  # title and unit
    ("Training loss", "loss (log scale)"),
    ("mIoU", "mIoU (%)"),
    ("Pr@X of the validation", "sentences with an IoU above X (%)"),
    ("Learning rates", "learning rate (log scale)"),
    ("Speed", "training refs/s"),
    ("Waiting for data", "of the time (%)"),
)


@dataclass(frozen=True)
class Series:
    """Hold a run's records in the order of steps."""

    name: str
    scored_on: str
    steps: list[dict]
    epochs: list[dict]

    @property
    def metric(self) -> str:
        """Return what chooses the run's best checkpoint."""
        return main_metric({name for record in self.epochs for name in record})

    @property
    def validations(self) -> list[dict]:
        """Return the epochs after which the run was scored."""
        return [record for record in self.epochs if record.get(self.metric) is not None]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, draw them, say where the picture is."""
    parser = text_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the PNG (curves.png in the folder of the first run)"
    )
    args = parser.parse_args(argv)
    folders = [folder_of(text) for text in args.runs]
    output = Path(args.output or folders[0] / "curves.png")
    if output.suffix.lower() != ".png":
        raise UserError(f"-o {output}: the picture is a PNG, so its name ends in .png")
    names = short_names(folders)
    series = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    figure = plot(series)
    with atomic_path(output) as partial:
        figure.savefig(partial, format="png", dpi=110, facecolor="white")
    print(output)


def folder_of(text: str) -> Path:
    """Return the folder of a run, which may be named by its metrics.jsonl too.

    Raises:
        UserError: no run has written there.
    """
    path = Path(text)
    folder = path.parent if path.name == METRICS else path
    if not (folder / METRICS).is_file():
        why = "there is no such folder" if not folder.is_dir() else f"it has no {METRICS}"
        raise UserError(f"{text}: {why}; name the folder of a run, <output_folder>/<exp_name>")
    return folder


def short_names(folders: Sequence[Path]) -> list[str]:
    """Name each run by the last parts of its path, as many as it takes to tell the runs apart.

    Raises:
        UserError: one is named twice.
    """
    paths = [folder.resolve() for folder in folders]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice")
    longest = max(len(path.parts) for path in paths)
    for count in range(1, longest + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def read_run(folder: Path, name: str) -> Series:
    """Read a run's records; what cannot be read is left out and told.

    Raises:
        UserError: there are none yet.
    """
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = [record for line in lines if (record := parse(line)) is not None]
    if broken := len(lines) - len(records):
        print(f"{path}: {broken} line(s) cut off or damaged, left out", file=sys.stderr)
    if not records:
        raise UserError(
            f"{path}: nothing is logged yet; the first line comes after TRAIN.print_freq steps"
        )
    kinds = ([r for r in records if r["kind"] == kind] for kind in ("step", "epoch"))
    steps, epochs = map(in_order, kinds)
    return Series(name, scored_on(folder, epochs), steps, epochs)


def parse(line: str) -> dict | None:
    """Return a record of metrics.jsonl, or None if the line holds none."""
    with suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict) and "kind" in record and isinstance(record.get("step"), int):
            return record
    return None


def in_order(records: Sequence[dict]) -> list[dict]:
    """Keep the later of two records for one step: a run that went back goes on anew."""
    kept: list[dict] = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept


def scored_on(folder: Path, epochs: Sequence[dict]) -> str:
    """Name data set, split, sentences and protocol of the validation, as far as the run says."""
    parts = []
    with suppress(UserError):
        cfg = load_config(folder / "config.yaml")
        protocol = {"both": "aligned"}.get(cfg.TEST.protocol, cfg.TEST.protocol)
        parts = [f"{cfg.DATA.dataset} {cfg.DATA.val_split}", protocol]
    counts = [record["sentences"] for record in epochs if record.get("sentences")]
    return ", ".join(parts[:1] + [f"{count:,} sentences" for count in counts[-1:]] + parts[1:])


def points(records: Sequence[dict], key: str, scale: float = 1.0) -> tuple[list, np.ndarray]:
    """Return steps and scaled values of a key; a missing value is not-a-number and leaves a gap."""
    values = [math.nan if (value := r.get(key)) is None else scale * value for r in records]
    if all(map(math.isnan, values)):
        return [], np.empty(0)
    return [record["step"] for record in records], np.array(values)


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """Return the mean of each value and its neighbours, `width` (odd) in all, fewer at the ends."""
    values = np.asarray(values, float)
    window, is_there = np.ones(width), np.isfinite(values)
    sums = np.convolve(np.where(is_there, values, 0), window, "same")
    counts = np.convolve(is_there, window, "same")
    return np.divide(sums, counts, out=np.full(len(values), math.nan), where=counts > 0.5)


def plot(series: Sequence[Series]) -> "Figure":
    """Draw six panels over the optimiser steps, each run in a colour of its own."""
    import matplotlib

    matplotlib.use("Agg")  # writes files, asks for no display
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    pyplot.style.use("tableau-colorblind10")
    figure, panels = pyplot.subplots(2, 3, figsize=(15, 8.4), sharex=True, layout="constrained")
    for panel, (title, unit) in zip(panels.flat, PANELS, strict=True):
        panel.set(title=title, ylabel=unit)
        panel.grid(alpha=0.4)
    loss, miou, precision, rates, speed, waiting = panels.flat
    plot_steps(loss, series, "loss")
    loss.set_yscale("log")
    plot_miou(miou, series)
    plot_keys(precision, series, "Pr@", 100)
    plot_keys(rates, series, "lr_", 1)
    rates.set_yscale("log", nonpositive="mask")
    plot_steps(speed, series, "refs_per_second")
    plot_steps(waiting, series, "data_wait_share", 100)
    for panel in (miou, precision, speed, waiting):
        panel.set_ylim(bottom=0)
    for panel in panels[-1]:
        panel.set_xlabel("optimiser step")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(*loss.get_legend_handles_labels(), loc="outside upper left")
    return figure


def label(series: Series) -> str:
    """Say `CRIS_R50: best mIoU 61.20 % after epoch 41 (refcoco val, 10,834 sentences, …)`."""
    validations = series.validations
    if not validations:
        return f"{series.name}: not validated yet"
    name = series.metric
    best = max(validations, key=lambda record: record[name])
    on = f" ({series.scored_on})" if series.scored_on else ""
    score = f"best {name} {100 * best[name]:.2f} % after epoch {best.get('epoch', '?')}"
    return f"{series.name}: {score}{on}"


def plot_steps(panel: "Axes", runs: Sequence[Series], key: str, scale: float = 1) -> None:
    """Plot what each line of the log says; many points faintly, under their running mean."""
    for i, series in enumerate(runs):
        x, y = points(series.steps, key, scale)
        if len(x) > FEW:
            panel.plot(x, y, color=f"C{i}", linewidth=0.8, alpha=0.3)
            y = running_mean(y, max(5, len(y) // 30) | 1)
        panel.plot(x, y, color=f"C{i}", label=label(series))


def plot_miou(panel: "Axes", runs: Sequence[Series]) -> None:
    """Plot mIoU of the validation, its best, and dotted that of training on the small map.

    It is gIoU where some sentences of the validation have no target.
    """
    name = " or ".join(dict.fromkeys(series.metric for series in runs))
    panel.set(title=name, ylabel=f"{name} (%)")
    for i, series in enumerate(runs):
        names = ("validation", "best", "training, on the small map") if i == 0 else (None,) * 3
        x, y = points(series.validations, series.metric, 100)
        panel.plot(x, y, color=f"C{i}", marker=".", label=names[0])
        if len(y):
            best = int(np.nanargmax(y))
            panel.plot(x[best], y[best], "*", markersize=13, color=f"C{i}", label=names[1])
        trained = points(series.epochs, "train_mIoU", 100)
        panel.plot(*trained, ":", color=f"C{i}", label=names[2])
    panel.legend()


def plot_keys(panel: "Axes", runs: Sequence[Series], prefix: str, scale: float) -> None:
    """Plot every number whose name begins with `prefix`, in a line style of its own."""
    records = [series.validations if prefix == "Pr@" else series.steps for series in runs]
    keys = {key: None for rows in records for row in rows for key in row if key.startswith(prefix)}
    for i, rows in enumerate(records):
        for j, key in enumerate(keys):
            x, y = points(rows, key, scale)
            name = key.removeprefix("lr_") if i == 0 else None
            style = LINE_STYLES[j % len(LINE_STYLES)]
            marker = "." if len(x) <= FEW else None
            panel.plot(x, y, color=f"C{i}", linestyle=style, marker=marker, label=name)
    if keys:
        panel.legend()


if __name__ == "__main__":
    run_entry_point(main)
