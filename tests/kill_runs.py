"""A training that is killed again and again and then comes to its end: the program of a test.

    python tests/kill_runs.py CONFIG [PHASE=COUNT ...]

Each life of the run is a fork, so that only the parent imports torch. It tells in shared memory
what it is at, and sets an alarm, at which the system ends it as by SIGKILL: at any instruction,
and no Python runs. Prints as JSON how often it was killed in each phase.
"""

import json
import mmap
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from unittest import mock

import torch._dynamo  # noqa: F401  # which each life would import with its optimiser
from helpers import run_program

from engine import resume, trainer

PHASES = ("start", "step", "save", "validation", "boundary")
DELAY = {"step": 0.05, "save": 0.08, "validation": 0.08, "boundary": 0.004}  # seconds, at most
LINGER = 0.004  # seconds at each boundary, which would last microseconds otherwise


def live(config: str, phase: mmap.mmap, target: str, nth: int, delay: float) -> None:
    """Train to the end, or for so many seconds after the phase `target` has begun so often."""
    begun = Counter()

    def enter(name: str) -> None:
        phase[0] = PHASES.index(name)
        begun[name] += 1
        if name == target and begun[name] == nth:
            signal.setitimer(signal.ITIMER_REAL, delay)
        if name == "boundary":
            time.sleep(LINGER)

    def during(name: str, function: Callable, after: str | None = None) -> Callable:
        """Enter a phase for each call, and then `after` or what was before it."""

        def wrapper(*args: object, **kwargs: object) -> object:
            before = PHASES[phase[0]]
            enter(name)
            result = function(*args, **kwargs)
            enter(after or before)
            return result

        return wrapper

    train_one_epoch = trainer.train_one_epoch

    def epoch(run: trainer.Run) -> dict[str, float]:
        if run.position == 0 and run.step > 0:
            enter("boundary")
        losses = train_one_epoch(run)
        enter("boundary")
        return losses

    patches = {
        (trainer, "train_one_epoch"): epoch,
        (trainer, "forward_backward"): during("step", trainer.forward_backward, "step"),
        (trainer, "validate"): during("validation", trainer.validate, "boundary"),
        (resume, "save_checkpoint"): during("save", resume.save_checkpoint),
    }
    for (module, name), replacement in patches.items():
        mock.patch.object(module, name, replacement).start()
    run_program("train.py", config, "TRAIN.resume", "auto")


def take_life(config: str, target: str = "none", nth: int = 0, delay: float = 0.0) -> str | None:
    """Let the run live once: the phase in which it was killed, or None if it came to its end."""
    phase = mmap.mmap(-1, 1)  # shared with the fork
    child = os.fork()
    if child == 0:
        code = 1
        try:
            live(config, phase, target, nth, delay)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGALRM), f"a life ended with {status}"
    return PHASES[phase[0]] if status else None


def main() -> None:
    """Kill until each phase has had its share, then let the run come to its end."""
    config, *words = sys.argv[1:]
    wanted = {name: int(count) for name, count in (word.split("=") for word in words)}
    rng, killed = random.Random(0), Counter()
    while open_phases := [name for name, count in wanted.items() if killed[name] < count]:
        target = rng.choice(open_phases)
        nth = rng.randint(1, {"step": 3, "validation": 1}.get(target, 2))
        phase = take_life(config, target, nth, rng.uniform(1e-6, DELAY[target]))
        if phase is None:
            break
        killed[phase] += 1
    take_life(config)
    print(json.dumps(killed))


if __name__ == "__main__":
    main()
