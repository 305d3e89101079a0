"""Fixtures that more than one test file uses."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def mini_root() -> Path:
    """The folder of real RefCOCO photos and sentences, which may not lie in this repository."""
    root = Path(os.environ.get("REFCOCO_MINI", ROOT.parent / "shared" / "refcoco_mini"))
    if not root.is_dir():
        pytest.skip(f"real photos are not part of the repository: no {root} (set REFCOCO_MINI)")
    return root
