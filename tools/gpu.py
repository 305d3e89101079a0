"""Prove the project on a GPU: tests, speed, memory, a profile, a training; print one table.

    make gpu                  # into .venv, as the other targets
    make gpu PY=python3       # the Python that is given; nothing is installed

Each part runs in a process of its own, so a failure leaves the results of the others. Needs no
network and no data. `gpu.md` has the table; `gpu.json` also all figures, and errors in full.
"""

import json
import multiprocessing
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch.utils import collect_env

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.guard import optimizer_step
from engine.trainer import forward_backward
from tools import benchmark, quickstart
from tools.benchmark import Setting, build_run, pack_shapes, parse_args, read_batch
from tools.latency import describe_machine, machine, take_turns
from utils.arguments import text_parser
from utils.config import load_config
from utils.errors import run_entry_point
from utils.files import check_writable, write_text

NO_GPU = "not run: no CUDA device"
SPAWN = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
TOP = 10  # kernels of the profile
LEARNING = "config/refshapes/cris_r50.yaml"
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
    parser = text_parser(__doc__)
    parser.add_argument("-o", "--output", type=Path, default="exp/gpu", help="folder (%(default)s)")
    output = parser.parse_args(argv).output
    check_writable(output)
    found = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found["driver"] = collect_env.get_nvidia_driver_version(collect_env.run) or "none"
    results = {"machine": found | {"cuda": torch.version.cuda or "none"}, "parts": {}}
    for name, (measure, *given) in PARTS.items():
        print(f"● {name}", flush=True)
        is_run = torch.cuda.is_available() or name in ON_CPU
        results["parts"][name] = run_part(measure, *given) if is_run else {"outcome": NO_GPU}
    print(table := to_markdown(results))
    write_text(output / "gpu.json", json.dumps(results, indent=2) + "\n")
    write_text(output / "gpu.md", table)
    if failed := [n for n, part in results["parts"].items() if part["outcome"] == "failed"]:
        sys.exit(f"error: failed: {', '.join(failed)}; {output / 'gpu.json'} has their errors")


def run_part(measure: Callable[..., dict], *given: object) -> dict:
    """Call a function in a new process; return its outcome, seconds, and figures or error."""
    start = time.monotonic()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        process = SPAWN.Process(target=write_part, args=(path, measure, *given))
        process.start()
        process.join()
        ended = {"outcome": "failed", "error": f"its process ended with code {process.exitcode}"}
        part = json.loads(path.read_text(encoding="utf-8")) if path.exists() else ended
    return part | {"seconds": round(time.monotonic() - start, 1)}


def write_part(path: Path, measure: Callable[..., dict], *given: object) -> None:
    """Call a function, and write its outcome, and figures or error, as JSON."""
    try:
        part = {"outcome": "ok", "figures": measure(*given)}
    except (Exception, SystemExit):
        part = {"outcome": "failed", "error": traceback.format_exc().strip()}
    write_text(path, json.dumps(part))


def run_tests() -> dict[str, str]:
    """Run the tests marked `gpu`, and return pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    root = Path(__file__).resolve().parents[1]
    ending = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=False)
    if ending.returncode:
        raise RuntimeError(ending.stdout)
    return {"pytest": ending.stdout.splitlines()[-1]}


def learn() -> dict[str, float]:
    """Take the quickstart's steps with RN50's size, and return the scores on val."""
    quickstart.main(["--config", LEARNING])
    cfg, swapped = load_config(LEARNING), {"mIoU": False, "mIoU, sentences swapped": True}
    paths = {name: quickstart.result(cfg, "val", swapped=is_so) for name, is_so in swapped.items()}
    return {name: json.loads(path.read_text())["mIoU"] for name, path in paths.items()}


def measure_product(device: str = "cuda", side: int = 8192) -> dict[str, float]:
    """Measure the rate of a large product of bf16 matrices, in TFLOP/s."""
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    seconds = take_turns({"product": lambda: a @ b}, 20, a.device, warmup=3)["product"]
    return {"TFLOP/s": 2 * side**3 / median(seconds) / 1e12}


def profile_step(device: str = "cuda", words: str = "--batch 64") -> dict:
    """Profile a training step: its costliest kernels, the device's idle share, the host's waits.

    Args:
        words: further options of `tools/benchmark.py train`.
    """
    args = parse_args(["train", "--device", device, *words.split()])
    with TemporaryDirectory() as folder:
        args.records = pack_shapes(Path(folder))
        setting = Setting(args)
        run = build_run(setting, setting.ours().train())
        batch = read_batch(setting.dataset(), setting.position_batches(args.batch)[0])

        def step() -> None:
            forward_backward(run, batch, synchronize=True)
            optimizer_step(run)

        on_gpu, waits = setting.device.type == "cuda", "none"
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
            (seconds,) = take_turns({"step": step}, 1, setting.device)["step"]
    key = f"self_{'device' if on_gpu else 'cpu'}_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, key))
    busy = sum(getattr(row, key) for row in rows) / 1e6
    return {
        "ms": 1e3 * seconds,
        "idle share": max(0.0, 1 - busy / seconds),
        "waits of the host": waits,
        "kernels, ms": {row.key[:60]: getattr(row, key) / 1e3 for row in rows[:TOP]},
    }


def to_markdown(results: Mapping) -> str:
    """Return a table of the parts, and of what each has measured."""
    lines = [describe_machine(results["machine"]), ""]
    lines += ["| part | outcome | measured |", "|---|---|---|"]
    for name, part in results["parts"].items():
        seconds = f", {part['seconds']:.0f} s" if "seconds" in part else ""
        lines.append(f"| {name} | {part['outcome']}{seconds} | {describe_figures(part)} |")
    return "\n".join(lines) + "\n"


def describe_figures(part: Mapping) -> str:
    """Return what a part has measured in one line; the last one of its error if it failed."""
    figures = part.get("figures", {})
    if "ways" in figures:
        unit, ratios = figures["unit"], figures["ratios"]
        cells = []
        for name, row in figures["ways"].items():
            rate = f", {row['GFLOP/s'] / 1e3:,.2f} TFLOP/s" if row.get("GFLOP/s") else ""
            ratio = f", ratio {ratios[name]['median']:.2f}" if name in ratios else ""
            cells.append(f"{name}: {row[unit]['median']:,.2f} {unit}{rate}{ratio}")
        return "; ".join(cells)
    plain = {key: value for key, value in figures.items() if not isinstance(value, dict)}
    cells = [f"{k} {v:,.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items()]
    return ", ".join(cells) or part.get("error", "").rpartition("\n")[2]


# By name: a function, and what it is called with. GPUs are measured by all but those in ON_CPU.
PARTS = {
    "tests": (run_tests,),
    "bf16 product": (measure_product,),
    **{
        name: (benchmark.main, ["--device", "cpu" if name in ON_CPU else "cuda", *words.split()])
        for name, words in BENCHMARKS.items()
    },
    "profile of a step": (profile_step,),
    "learning": (learn,),
}


if __name__ == "__main__":
    run_entry_point(main)
