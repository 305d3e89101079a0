"""A training that is killed again and again and then comes to its end: the program of a test.

    python tests/kill_runs.py CONFIG [PHASE=COUNT ...]

Each life of the run is a fork, so that only the parent imports torch. It sets an alarm when a phase
begins, at which the system ends it as by SIGKILL: at any instruction, and no Python runs. Prints as
JSON how often it was killed after the beginning of each phase.
"""

import json
import os
import random
import signal
import sys
from collections import Counter
from itertools import count
from unittest import mock

import torch._dynamo  # noqa: F401  # which each life would import with its optimiser
from helpers import run_program

from engine import resume, trainer
from utils.logger import Tracker

PHASES = {  # what begins them, and the most seconds to live from then on
    "epoch": (trainer, "train_one_epoch", 0.004),
    "step": (trainer, "forward_backward", 0.05),
    "validation": (trainer, "validate", 0.08),
    "record": (Tracker, "log", 0.004),
    "save": (resume, "save_checkpoint", 0.03),
}


def live(config: str, phase: str, nth: int, delay: float) -> None:
    """Train to the end, or for so many seconds after the phase has begun so often."""
    owner, name, _ = PHASES[phase]
    function, calls = getattr(owner, name), count(1)

    def begin(*args: object, **kwargs: object) -> object:
        if next(calls) == nth:
            signal.setitimer(signal.ITIMER_REAL, delay)
        return function(*args, **kwargs)

    with mock.patch.object(owner, name, begin):
        run_program("train.py", config, "TRAIN.resume", "auto")


def is_killed(*life: object) -> bool:
    """Let the run live once, as `live` says; tell whether it was killed, and not at its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            live(*life)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGALRM), f"a life ended with {status}"
    return status != 0


def main() -> None:
    """Kill until each phase has had its share, then let the run come to its end."""
    config, *words = sys.argv[1:]
    wanted = {name: int(number) for name, number in (word.split("=") for word in words)}
    rng, killed = random.Random(0), Counter()
    while open_phases := [name for name, number in wanted.items() if killed[name] < number]:
        phase = rng.choice(open_phases)
        nth = rng.randint(1, {"step": 3, "validation": 1}.get(phase, 2))
        if not is_killed(config, phase, nth, rng.uniform(1e-6, PHASES[phase][2])):
            break
        killed[phase] += 1
    is_killed(config, "step", 0, 0.0)
    print(json.dumps(killed))


if __name__ == "__main__":
    main()
