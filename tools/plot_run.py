"""Draw how trainings went: loss, scores of the validation, learning rates and speed, as one PNG.

    python tools/plot_run.py exp/refcoco/CRIS_R50
    python tools/plot_run.py exp/refcoco/CRIS_R50 exp/refcoco/CRIS_R101 -o both.png

It reads metrics.jsonl and config.yaml in each run's folder, and can be called while a run goes on.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.evaluator import validation_protocol
from utils.arguments import text_parser
from utils.config import load_config
from utils.errors import UserError, run_entry_point
from utils.files import atomic_path
from utils.logger import METRICS
from utils.metrics import main_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (  # title, unit, kind of records, first letters of their keys, factor, scale
    ("Training loss", "loss", "step", "loss", 1, "log"),
    ("Scores", "%", "epoch", ("mIoU", "gIoU", "train_mIoU"), 100, "linear"),
    ("Pr@X of the validation", "sentences with an IoU above X (%)", "epoch", "Pr@", 100, "linear"),
    ("Learning rates", "learning rate", "step", "lr_", 1, "log"),
    ("Speed", "training refs/s", "step", "refs_per_second", 1, "linear"),
    ("Waiting for data", "of the time (%)", "step", "data_wait_share", 100, "linear"),
)
NOISY = {"loss", "refs_per_second", "data_wait_share"}
FEW = 60  # points that are drawn as they are; more noisy ones get a running mean as well


class Series(NamedTuple):
    """Hold a run's records in the order of steps, and what the picture calls the run."""

    label: str
    records: list[dict]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, draw them, say where the picture is."""
    parser = text_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    text = "the PNG (curves.png in the first folder)"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=text)
    args = parser.parse_args(argv)
    output = args.output or args.runs[0] / "curves.png"
    if output.suffix.lower() != ".png":
        raise UserError(f"-o {output}: the picture is a PNG, so its name ends in .png")
    figure = plot(read_runs(args.runs))
    with atomic_path(output) as partial:
        figure.savefig(partial, format="png", dpi=110, facecolor="white")
    print(output)


def read_runs(folders: Sequence[Path]) -> list[Series]:
    """Read runs, named by their folders, or by the whole paths if two folders are called alike."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str) -> Series:
    """Read a run's records.

    Raises:
        UserError: there are none.
    """
    path, records = folder / METRICS, []
    if not path.is_file():
        raise UserError(
            f"{path} is not there: name the folder of a run, <output_folder>/<exp_name>"
        )
    lines = path.read_text(errors="replace").splitlines()
    for line in lines:
        # The last one is cut off while it is being written.
        with suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            if "kind" in record and isinstance(record["step"], int):
                records.append(record)
    if broken := len(lines) - len(records):
        print(f"{path}: {broken} line(s) cut off or damaged, left out", file=sys.stderr)
    if not records:
        raise UserError(
            f"{path}: nothing is logged yet; the first line comes after TRAIN.print_freq steps"
        )
    metric = main_metric({key for record in records for key in record})
    scored = [record for record in records if record.get(metric) is not None]
    if not scored:
        return Series(f"{name}: not validated yet", records)
    best = max(scored, key=lambda record: record[metric])
    score = f"best {metric} {100 * best[metric]:.2f} % after epoch {best['epoch']}"
    return Series(f"{name}: {score} ({scored_on(folder, best['sentences'])})", records)


def scored_on(folder: Path, sentences: int) -> str:
    """Say `refcoco val, 10,834 sentences, published`, as far as the run's config can be read."""
    parts = [f"{sentences:,} sentences"]
    with suppress(UserError):
        cfg = load_config(folder / "config.yaml")
        parts = [f"{cfg.DATA.dataset} {cfg.DATA.val_split}", *parts, *validation_protocol(cfg.TEST)]
    return ", ".join(parts)


def plot(runs: Sequence[Series]) -> "Figure":
    """Draw six panels over the optimiser steps, each run in a colour of its own."""
    import matplotlib

    matplotlib.use("Agg")  # writes files, asks for no display
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    pyplot.style.use("tableau-colorblind10")
    figure, panels = pyplot.subplots(2, 3, figsize=(15, 8.4), sharex=True, layout="constrained")
    for panel, (title, unit, kind, letters, factor, scale) in zip(panels.flat, PANELS, strict=True):
        panel.set(title=title, ylabel=unit, yscale=scale)
        panel.grid(alpha=0.4)
        for i, run in enumerate(runs):
            records = [record for record in run.records if record["kind"] == kind]
            keys = sorted({k for record in records for k in record if k.startswith(letters)})
            for key, style in zip(keys, cycle(("-", "--", ":", "-.")), strict=False):
                draw(panel, records, key, factor, color=f"C{i}", linestyle=style, label=key)
        handles, keys = panel.get_legend_handles_labels()
        by_key = dict(zip(keys, handles, strict=True))  # runs have the same keys
        if len(by_key) > 1:
            panel.legend(by_key.values(), by_key)
        if scale == "linear":
            panel.set_ylim(bottom=0)
    for panel in panels[-1]:
        panel.set_xlabel("optimiser step")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    colors = [Line2D([], [], color=f"C{i}") for i in range(len(runs))]
    figure.legend(colors, [run.label for run in runs], loc="outside upper left")
    return figure


def draw(panel: "Axes", records: Sequence[dict], key: str, factor: float, **style) -> None:
    """Draw a key over the steps; a value that is not finite leaves a gap."""
    records = [record for record in records if key in record]
    steps = [record["step"] for record in records]
    values = factor * np.array([record[key] for record in records], float)
    if len(steps) <= FEW:
        panel.plot(steps, values, marker=".", **style)
        return
    if key in NOISY:
        panel.plot(steps, values, linewidth=0.8, alpha=0.3, color=style["color"])
        width = max(5, len(steps) // 30) | 1  # odd
        steps = steps[width // 2 : -(width // 2)]
        values = np.convolve(values, np.ones(width) / width, "valid")
    panel.plot(steps, values, **style)


if __name__ == "__main__":
    run_entry_point(main)
