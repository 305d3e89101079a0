"""Draw how trainings went: loss, scores of the validation, learning rates and speed, as one PNG.

    python tools/plot_run.py exp/refcoco/CRIS_R50
    python tools/plot_run.py exp/refcoco/CRIS_R50 exp/refcoco/CRIS_R101 -o both.png

It reads metrics.jsonl and config.yaml in each run's folder, and can be called while a run goes on.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.config import load_config
from utils.errors import UserError, run_entry_point
from utils.files import atomic_path
from utils.logger import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by people who see colours differently as well (Okabe and Ito), darkest first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
FEW = 60  # points that are drawn as they are; more get a running mean as well
GRAY = "#666666"


@dataclass(frozen=True)
class Series:
    """A run's records, in the order of steps."""

    name: str
    scored_on: str
    steps: list[dict]
    epochs: list[dict]

    @property
    def validations(self) -> list[dict]:
        """The epochs after which the run was scored."""
        return [record for record in self.epochs if record.get("mIoU") is not None]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, draw them, say where the picture is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    save(draw(series), output)
    print(output)


def folder_of(text: str) -> Path:
    """The folder of a run, which may be named by its metrics.jsonl too.

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
    """The last parts of the paths, as many as it takes to tell the runs apart.

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
    """A run's records; what cannot be read is left out and told.

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
    """A record of metrics.jsonl, or None if the line is none."""
    with suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict) and "kind" in record and isinstance(record.get("step"), int):
            return record
    return None


def in_order(records: Sequence[dict]) -> list[dict]:
    """Records by their step, of two for one step the later: a run that went back goes on anew."""
    kept: list[dict] = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept


def scored_on(folder: Path, epochs: Sequence[dict]) -> str:
    """Data set, split, sentences and protocol of the validation, as far as the run says."""
    parts = []
    with suppress(UserError):
        cfg = load_config(folder / "config.yaml")
        protocol = {"both": "aligned"}.get(cfg.TEST.protocol, cfg.TEST.protocol)
        parts = [f"{cfg.DATA.dataset} {cfg.DATA.val_split}", protocol]
    counts = [record["sentences"] for record in epochs if record.get("sentences")]
    return ", ".join(parts[:1] + [f"{count:,} sentences" for count in counts[-1:]] + parts[1:])


def points(records: Sequence[dict], key: str, scale: float = 1.0) -> tuple[list, list]:
    """Steps, and the values of a key; not-a-number where a record has none, which leaves a gap."""
    values = [record.get(key) for record in records]
    if all(value is None for value in values):
        return [], []
    numbers = [math.nan if value is None else scale * value for value in values]
    return [record["step"] for record in records], numbers


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and its neighbours, `width` in all, fewer at the ends."""
    means = []
    for i in range(len(values)):
        near = values[max(0, i - width // 2) : i + width // 2 + 1]
        there = [value for value in near if not math.isnan(value)]
        means.append(sum(there) / len(there) if there else math.nan)
    return means


def draw(series: Sequence[Series]) -> "Figure":
    """Six panels over the optimiser steps, the runs in colours of their own."""
    import matplotlib

    matplotlib.use("Agg")  # writes files, asks for no display
    from matplotlib import pyplot

    look = {
        "font.size": 10,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelcolor": GRAY,
        "axes.edgecolor": "#BBBBBB",
        "xtick.color": GRAY,
        "ytick.color": GRAY,
        "axes.grid": True,
        "grid.color": "#E8E8E8",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.solid_capstyle": "round",
    }
    with pyplot.rc_context(look):
        figure, panels = pyplot.subplots(2, 3, figsize=(15, 8.4), sharex=True)
        pairs = list(zip(series, colours(len(series)), strict=True))
        for panel, paint in zip(panels.flat, PANELS, strict=True):
            paint(panel, pairs)
        for panel in panels[-1]:
            panel.set_xlabel("optimiser step")
            panel.xaxis.set_major_formatter(thousands)
            panel.set_xlim(left=0)
        add_names(figure, pairs)
    return figure


def colours(count: int) -> Iterator[str]:
    """A colour a run, in the same order always."""
    return (COLOURS[i % len(COLOURS)] for i in range(count))


def thousands(value: float, _: object = None) -> str:
    """A step on the axis: 500, 12k, 1.5M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def add_names(figure: "Figure", pairs: Sequence[tuple[Series, str]]) -> None:
    """The legend: a line a run, with its best score and what that was scored on."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linewidth=3, label=label(s)) for s, colour in pairs]
    height = figure.get_figheight()
    room = 0.1 + 0.27 * len(handles)  # inches
    legend = figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.035, 1 - 0.05 / height), fontsize=11
    )
    for text in legend.get_texts():
        text.set_color("#222222")
    figure.tight_layout(rect=(0.01, 0.01, 0.99, 1 - room / height), w_pad=2.5, h_pad=2)


def label(series: Series) -> str:
    """`CRIS_R50: best mIoU 61.20 % after epoch 41 (refcoco val, 10,834 sentences, published)`."""
    validations = series.validations
    if not validations:
        return f"{series.name}: not validated yet"
    best = max(validations, key=lambda record: record["mIoU"])
    on = f" ({series.scored_on})" if series.scored_on else ""
    score = f"best mIoU {100 * best['mIoU']:.2f} % after epoch {best.get('epoch', '?')}"
    return f"{series.name}: {score}{on}"


# ---------------------------------------------------------------------------------------- panels


def paint_loss(panel: "Axes", pairs: Sequence[tuple[Series, str]]) -> None:
    """Training loss at each line of the log, on a logarithmic axis."""
    for series, colour in pairs:
        add_curve(panel, *points(series.steps, "loss"), colour)
    panel.set_title("Training loss")
    panel.set_ylabel("binary cross-entropy (log scale)")
    panel.set_yscale("log")
    plain_ticks(panel)
    if any(len(series.steps) > FEW for series, _ in pairs):
        panel.plot([], [], color=GRAY, linewidth=0.8, alpha=0.5, label="as logged")
        panel.plot([], [], color=GRAY, linewidth=2, label="running mean")
        panel.legend(loc="best")


def paint_miou(panel: "Axes", pairs: Sequence[tuple[Series, str]]) -> None:
    """mIoU of the validation, and thinly that of training, which is measured on the small map."""
    for series, colour in pairs:
        panel.plot(
            *points(series.epochs, "train_mIoU", 100), color=colour, alpha=0.6, linestyle=":"
        )
        x, y = points(series.validations, "mIoU", 100)
        panel.plot(x, y, color=colour, marker="o", markersize=4, linewidth=2)
        if y:
            best = max(range(len(y)), key=y.__getitem__)
            panel.plot(x[best], y[best], marker="*", markersize=13, color=colour)
    panel.set_title("mIoU")
    per_cent(panel, "mIoU (%)")
    add_key(
        panel,
        [("-", "validation (star: best)"), (":", "training, on the small map")],
    )


def paint_precision(panel: "Axes", pairs: Sequence[tuple[Series, str]]) -> None:
    """Pr@X of the validation: of one run all X, of several three of them."""
    keys = sorted({k for s, _ in pairs for r in s.validations for k in r if k.startswith("Pr@")})
    if len(pairs) > 1:
        keys = keys[::2]
    styles = {key: LINE_STYLES[i % len(LINE_STYLES)] for i, key in enumerate(keys)}
    for series, colour in pairs:
        for i, key in enumerate(keys):
            style = styles[key] if len(pairs) > 1 else "-"
            shade = 1 if len(pairs) > 1 else 1 - 0.75 * i / max(1, len(keys) - 1)
            marks = {"marker": "o", "markersize": 4, "linestyle": style, "label": key}
            x, y = points(series.validations, key, 100)
            panel.plot(x, y, color=mixed(colour, shade), **marks)
    panel.set_title("Pr@X of the validation")
    per_cent(panel, "sentences with an IoU above X (%)")
    if len(pairs) > 1:
        add_key(panel, [(styles[key], key) for key in keys])
    elif keys:
        panel.legend(loc="upper left", ncols=min(3, len(keys)))


def paint_rates(panel: "Axes", pairs: Sequence[tuple[Series, str]]) -> None:
    """The learning rate of each group of parameters."""
    keys = list(dict.fromkeys(k for s, _ in pairs for r in s.steps for k in r if is_rate(k)))
    styles = {key: LINE_STYLES[i % len(LINE_STYLES)] for i, key in enumerate(sorted(keys)[::-1])}
    for series, colour in pairs:
        for key in keys:
            x, y = points(series.steps, key)
            panel.plot(x, y, color=colour, linestyle=styles[key], linewidth=1.8)
    panel.set_title("Learning rates")
    panel.set_ylabel("Adam's rate (log scale)")
    panel.set_yscale("log", nonpositive="mask")
    add_key(panel, [(style, key.removeprefix("lr_")) for key, style in styles.items()])


def is_rate(key: str) -> bool:
    """Whether a key of a record is a learning rate."""
    return key.startswith("lr_")


def paint_speed(panel: "Axes", pairs: Sequence[tuple[Series, str]]) -> None:
    """Refs a second, of all ranks together."""
    for series, colour in pairs:
        add_curve(panel, *points(series.steps, "images_per_second"), colour)
    panel.set_title("Speed")
    panel.set_ylabel("training images/s")
    panel.set_ylim(bottom=0)


def paint_waiting(panel: "Axes", pairs: Sequence[tuple[Series, str]]) -> None:
    """The share of the time in which training waited for its loader."""
    for series, colour in pairs:
        add_curve(panel, *points(series.steps, "data_wait_share", 100), colour)
    panel.set_title("Waiting for data")
    per_cent(panel, "share of the time (%)")


PANELS = (paint_loss, paint_miou, paint_precision, paint_rates, paint_speed, paint_waiting)


def add_curve(panel: "Axes", x: list, y: list, colour: str) -> None:
    """A curve; one of many points faintly, under its running mean."""
    if len(x) <= FEW:
        panel.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=2.5)
        return
    panel.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
    panel.plot(x, running_mean(y, max(5, len(y) // 30)), color=colour, linewidth=2)


def per_cent(panel: "Axes", text: str) -> None:
    """A per-cent axis that starts at 0 and leaves room above its curves for the key."""
    panel.set_ylabel(text)
    panel.margins(y=0.12)
    _, high = panel.get_ylim()
    panel.set_ylim(0, min(105, max(high, 1.0) * 1.12))


def plain_ticks(panel: "Axes") -> None:
    """Numbers on a logarithmic axis as people write them, also within a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def add_key(panel: "Axes", entries: Sequence[tuple[str, str]]) -> None:
    """What line styles mean, in gray, since colours are runs."""
    from matplotlib.lines import Line2D

    if entries:
        lines = [Line2D([], [], color=GRAY, linestyle=s, label=text) for s, text in entries]
        panel.legend(handles=lines, loc="best")


def mixed(colour: str, share: float) -> tuple[float, ...]:
    """The colour on white, less of it the smaller the share in [0, 1]."""
    from matplotlib.colors import to_rgb

    return tuple(1 - share * (1 - value) for value in to_rgb(colour))


def save(figure: "Figure", path: Path) -> None:
    """Write the PNG, whole or not at all."""
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=110, facecolor="white")


if __name__ == "__main__":
    run_entry_point(main)
