"""Every random choice comes from a named seed; this is where they are named and restored."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device) of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Let torch use only algorithms that give the same bits every time.

    False lets cuDNN try which is fastest for each shape, as training has few of them.

    cuBLAS reads its variable when it is first used, so nothing may have run on the GPU before.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not enabled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def draw(purpose: str, high: int, *names: int) -> int:
    """Draw from 0 … high-1; the same purpose and `names` always give the same number.

    It depends on nothing else: not on the process, the worker, or what was drawn before.

    Args:
        purpose: what is drawn; two purposes draw independently of each other.
        names: seed, epoch, index …
    """
    # The sentences of earlier runs were drawn by names alone.
    own = () if purpose == "sentence" else (int.from_bytes(sha256(purpose.encode()).digest()),)
    return int(np.random.Generator(np.random.PCG64((*names, *own))).integers(high))


def rng_state() -> dict:
    """Return every generator's state in tensors and numbers, as `weights_only=True` loads them."""
    name, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    """Restore what `rng_state` gave; a state of a device that is not here is skipped."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
