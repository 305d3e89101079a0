"""Prove the project on a GPU: tests, speed, memory, a profile, a training; print one table.

    make gpu                  # into .venv, as the other targets
    make gpu PY=python3       # the Python that is given; nothing is installed

Each part runs in a process of its own, so a failure leaves the results of the others. Needs no
network and no data. `gpu.md` has the table; `gpu.json` also each part's own figures and output.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.build import find_device
from engine.guard import optimizer_step
from engine.trainer import forward_backward
from tools.benchmark import Setting, build_run, pack_shapes, parse_args, read_batch
from tools.latency import describe_machine, machine, take_turns
from utils.arguments import text_parser
from utils.errors import run_entry_point
from utils.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = "not run: no CUDA device"
TOP = 10  # kernels of the profile
LEARNING = Path("config/refshapes/cris_r50.yaml")
LOADER = "loader, one core"
ON_CPU = {LOADER}  # what needs no GPU
BENCHMARKS = {
    "step of 64, fp16": "train --batch 64 --rounds 5 --compile --opts TRAIN.precision fp16",
    "step of 64, bf16": "train --batch 64 --rounds 5 --compile --opts TRAIN.precision bf16",
    "step of 16, fp16": "train --batch 16 --rounds 5 --compile --opts TRAIN.precision fp16",
    "memory of 64, fp16": "memory --batch 64 --rounds 1 --opts TRAIN.precision fp16",
    "evaluation": "eval --photos 24",
    "evaluation, bf16": "eval --photos 24 --opts TEST.precision bf16",
    "evaluation, fp16": "eval --photos 24 --opts TEST.precision fp16",
    LOADER: "data",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run every part, print the table, write both files; exit with 1 if a part failed."""
    args = _parse_args(argv)
    if args.part:
        print(json.dumps(MEASURED[args.part](find_device("cuda", "--part"))))
        return
    results = {"machine": machine_and_driver(), "parts": {}}
    with TemporaryDirectory() as folder:
        for name, command in commands(Path(folder)).items():
            print(f"● {name}", flush=True)
            is_run = torch.cuda.is_available() or name in ON_CPU
            results["parts"][name] = run_part(command) if is_run else {"outcome": NO_GPU}
    table = to_markdown(results)
    for name, text in (("gpu.json", json.dumps(results, indent=2) + "\n"), ("gpu.md", table)):
        with atomic_path(args.output / name) as partial:
            partial.write_text(text, encoding="utf-8")
    print(table)
    if failed := [n for n, part in results["parts"].items() if part["outcome"] == "failed"]:
        sys.exit(f"error: failed: {', '.join(failed)}; {args.output / 'gpu.json'} has their output")


def commands(folder: Path) -> dict[str, list[object]]:
    """Return each part's command line, whose JSON goes below `folder` or is its last line."""
    parts = {
        "tests": ["-m", "pytest", "-q", "-m", "gpu", "tests"],
        "bf16 product": ["tools/gpu.py", "--part", "product"],
    }
    for name, words in BENCHMARKS.items():
        device = "cpu" if name in ON_CPU else "cuda"
        given = ["--device", device, "--json", folder / f"{name}.json"]
        parts[name] = ["tools/benchmark.py", *given, *words.split()]
    parts["profile of a step"] = ["tools/gpu.py", "--part", "profile"]
    return parts | {"learning": ["tools/quickstart.py", "--config", LEARNING]}


def run_part(words: Sequence[object]) -> dict:
    """Run a command line; return its outcome, seconds, last lines and figures."""
    start = time.monotonic()
    ending = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = ending.stdout.splitlines()
    return {
        "outcome": "failed" if ending.returncode else "ok",
        "seconds": round(time.monotonic() - start, 1),
        "output": lines[-60:],
        "figures": {} if ending.returncode else read_figures(words, lines),
    }


def read_figures(words: Sequence[object], lines: Sequence[str]) -> dict:
    """Return what a command line has measured: of its JSON files, or of its last line."""
    if "--json" in words:
        return json.loads(words[words.index("--json") + 1].read_text())
    if LEARNING in words:
        stem = ROOT / "exp/refshapes" / LEARNING.stem / "test_refshapes_val.aligned"
        paths = {"mIoU": f"{stem}.json", "mIoU, sentences swapped": f"{stem}.swapped.json"}
        return {name: json.loads(Path(path).read_text())["mIoU"] for name, path in paths.items()}
    return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


def measure_product(device: torch.device, side: int = 8192) -> dict[str, float]:
    """Measure the rate of a large product of bf16 matrices, in TFLOP/s."""
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    seconds = take_turns({"product": lambda: a @ b}, 20, device, warmup=3)["product"]
    return {"TFLOP/s": 2 * side**3 / median(seconds) / 1e12}


def profile_step(device: torch.device, words: str = "--batch 64") -> dict:
    """Profile a training step: its costliest kernels, the device's idle share, the host's waits.

    Args:
        words: further options of `tools/benchmark.py train`.
    """
    args = parse_args(["train", "--device", str(device), *words.split()])
    with TemporaryDirectory() as folder:
        args.records = pack_shapes(Path(folder))
        setting = Setting(args)
        run = build_run(setting, setting.ours().train())
        batch = read_batch(setting.dataset(), setting.position_batches(args.batch)[0])

        def step() -> None:
            forward_backward(run, batch, synchronize=True)
            optimizer_step(run)

        on_gpu, waits = device.type == "cuda", "none"
        for _ in range(3):
            step()
        if on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            waits = str(error).splitlines()[0]
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
        with torch.profiler.profile() as seen:
            (seconds,) = take_turns({"step": step}, 1, device)["step"]
    key = f"self_{'device' if on_gpu else 'cpu'}_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, key))
    busy = sum(getattr(row, key) for row in rows) / 1e6
    return {
        "ms": 1e3 * seconds,
        "idle share": max(0.0, 1 - busy / seconds),
        "waits of the host": waits,
        "kernels, ms": {row.key[:60]: getattr(row, key) / 1e3 for row in rows[:TOP]},
    }


def machine_and_driver() -> dict[str, str | int]:
    """Return the machine as benchmarks do, with the GPU's driver."""
    found = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        driver = ""
    return found | {"driver": driver or "none", "cuda": torch.version.cuda or "none"}


def to_markdown(results: Mapping) -> str:
    """Return a table of the parts, and of what each has measured."""
    lines = [describe_machine(results["machine"]), ""]
    lines += ["| part | outcome | measured |", "|---|---|---|"]
    for name, part in results["parts"].items():
        seconds = f", {part['seconds']:.0f} s" if "seconds" in part else ""
        lines.append(f"| {name} | {part['outcome']}{seconds} | {describe_figures(part)} |")
    return "\n".join(lines) + "\n"


def describe_figures(part: Mapping) -> str:
    """Return what a part has measured in one line; the output's last one if that is all."""
    figures = part.get("figures", {})
    if "ways" in figures:
        unit, ratios = figures["unit"], figures["ratios"]
        cells = []
        for name, row in figures["ways"].items():
            rate = f", {row['GFLOP/s'] / 1e3:,.2f} TFLOP/s" if row.get("GFLOP/s") else ""
            ratio = f", ratio {ratios[name]['median']:.2f}" if name in ratios else ""
            cells.append(f"{name}: {row[unit]['median']:,.1f} {unit}{rate}{ratio}")
        return "; ".join(cells)
    if figures:
        plain = {key: value for key, value in figures.items() if not isinstance(value, dict)}
        return ", ".join(
            f"{key} {value:,.2f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in plain.items()
        )
    return (part.get("output") or [""])[-1]


MEASURED = {"product": measure_product, "profile": profile_step}


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = text_parser(__doc__)
    folder = {"type": Path, "default": Path("exp/gpu"), "help": "folder (%(default)s)"}
    parser.add_argument("-o", "--output", **folder)
    parser.add_argument("--part", choices=MEASURED, help="measure this alone, and print JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_entry_point(main)
