"""Fixtures that more than one test file uses."""

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
import torch
from helpers import ROOT, make_run, pack, write_records
from loguru import logger
from odd_server import OddServer, serve

from tools import refshapes

# Tests fork. A child whose parent had OpenCV's pool of threads can wait for one of them for ever.
cv2.setNumThreads(1)
# Another number of threads gives other last bits, and tests compare to the bit.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mini_root() -> Path:
    """The folder of real RefCOCO photos and sentences, which may not lie in this repository."""
    root = Path(os.environ.get("REFCOCO_MINI", ROOT.parent / "shared" / "refcoco_mini"))
    if not root.is_dir():
        pytest.skip(f"real photos are not part of the repository: no {root} (set REFCOCO_MINI)")
    return root


@pytest.fixture(scope="session")
def shapes_lmdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of 12 images with 1-4 refs each (29 refs), 1-4 sentences a ref."""
    path = tmp_path_factory.mktemp("records") / "train.lmdb"
    return write_records(path, [2, 3, 1, 4, 2, 2, 3, 1, 4, 2, 3, 2])


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small RefShapes: its REFER files, and lmdb/shapes/{train,val,testA,testB}.lmdb."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    counts = "--train 12 --val 5 --testA 2 --testB 2"  # images
    refshapes.main(["--output", str(root), *counts.split(), "--seed", "3"])
    pack(root, root, "refshapes", "unc", "shapes")
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The config of a run whose masks are not trivial."""
    return make_run(tmp_path_factory.mktemp("trained"), data, threshold=0.15)


@pytest.fixture(autouse=True)
def end_of_logs() -> Iterator[None]:
    """Close the logs that a test has opened: they would take the lines of those after it."""
    yield
    logger.remove()


@pytest.fixture
def log_lines() -> list[str]:
    """What is logged during the test, on any level."""
    lines: list[str] = []
    logger.add(lambda message: lines.append(message.record["message"]))
    return lines


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OddServer]:
    """A web server that is the Hugging Face Hub too; nobody waits between two tries."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with serve() as odd:
        monkeypatch.setenv("HF_ENDPOINT", odd.url)
        yield odd


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With -v, print the differences that tests measured (`record_property("difference", …)`)."""
    reports = terminalreporter.getreports("passed")
    rows = [row for r in reports for key, row in r.user_properties if key == "difference"]
    if rows and terminalreporter.verbosity > 0:
        terminalreporter.section("largest differences measured")
        for case, what, found, limit in rows:
            terminalreporter.write_line(f"{case:<22} {what:<32} {found:>9.2e}  (limit {limit:.0e})")
