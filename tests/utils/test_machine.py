"""What the process uses of the machine."""

import ctypes
import subprocess
import sys

import pytest
from helpers import ROOT

REUSE = """
import resource, sys
from utils.machine import keep_freed_memory
import torch
if sys.argv[1] == "kept":
    keep_freed_memory()

def step():
    maps = [torch.zeros(12_000_000) for _ in range(4)]

for _ in range(10):  # until what is freed lies side by side
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="glibc alone can be told to keep memory",
)
def test_memory_that_is_kept_is_not_cleared_again_by_the_system():
    faults = {}
    for way in ("given back", "kept"):
        command = [sys.executable, "-c", REUSE, way]
        ending = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        faults[way] = int(ending.stdout)
    assert faults["kept"] < faults["given back"] / 10, faults
