"""A training that is killed again and again, and one that is not: the program of a test.

    python tests/kill_runs.py CONFIG [NAME=COUNT ...]

Each life of the run is a fork, so that only the first one imports torch. A life only tells, in
shared memory, what it is at; SIGKILL comes from outside, at a drawn moment. Counted is what the
life was at when it was dead. Prints the counts as JSON.
"""

import json
import mmap
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

from helpers import run_program

from engine import resume, trainer

PHASES = ("start", "step", "save", "validation", "boundary")
DELAY = {"step": 0.05, "save": 0.08, "validation": 0.08, "boundary": 0.004}  # seconds, at most
LINGER = 0.004  # seconds at each boundary, which would last microseconds otherwise


class Diary:
    """What a life is at, and how often it has come to the phase in which it is to be killed."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.memory = mmap.mmap(-1, 2)  # shared with forks

    @property
    def phase(self) -> str:
        return PHASES[self.memory[0]]

    def enter(self, phase: str) -> None:
        self.memory[0] = PHASES.index(phase)
        self.memory[1] = min(255, self.memory[1] + (phase == self.target))
        if phase == "boundary":
            time.sleep(LINGER)

    def during(self, phase: str, function, after: str | None = None):
        """`function`, told in the diary, and then what was before it or `after`."""

        def wrapper(*args, **kwargs):
            before = self.phase
            self.enter(phase)
            result = function(*args, **kwargs)
            self.enter(after or before)
            return result

        return wrapper


def live(config: Path, diary: Diary) -> None:
    """One life, to its end."""
    train_one_epoch = trainer.train_one_epoch

    def epoch(run):
        if run.position == 0 and run.step > 0:
            diary.enter("boundary")
        losses = train_one_epoch(run)
        diary.enter("boundary")
        return losses

    patches = {
        (trainer, "train_one_epoch"): epoch,
        (trainer, "forward_backward"): diary.during("step", trainer.forward_backward, "step"),
        (trainer, "validate"): diary.during("validation", trainer.validate, "boundary"),
        (resume, "save_checkpoint"): diary.during("save", resume.save_checkpoint),
    }
    for (module, name), replacement in patches.items():
        mock.patch.object(module, name, replacement).start()
    run_program("train.py", config, "TRAIN.resume", "auto")


def fork(config: Path, diary: Diary) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            live(config, diary)
            code = 0
        finally:
            os._exit(code)
    return child


def kill_one(config: Path, metrics: Path, target: str, rng: random.Random) -> str | None:
    """Start a life and kill it in `target`: what it was at, or None if it came to its end."""
    diary, nth = Diary(target), rng.randint(1, {"step": 3, "validation": 1}.get(target, 2))
    child = fork(config, diary)
    while diary.memory[1] < nth or not (metrics.exists() and metrics.stat().st_size):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.0002)
    time.sleep(rng.uniform(0, DELAY[target]))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):  # it was quicker
        assert status == 0, f"a life ended with {status}"
        return None
    return diary.phase


def main() -> None:
    """Kill until each phase has had its share, then let the run come to its end."""
    config, *words = sys.argv[1:]
    wanted = {name: int(count) for name, count in (word.split("=") for word in words)}
    metrics = Path(config).parent / "exp/tiny/metrics.jsonl"
    rng, killed = random.Random(0), Counter()
    while open_phases := [name for name, count in wanted.items() if killed[name] < count]:
        phase = kill_one(Path(config), metrics, rng.choice(open_phases), rng)
        if phase is None:
            break
        killed[phase] += 1
    _, status = os.waitpid(fork(Path(config), Diary("start")), 0)
    print(json.dumps(killed))
    sys.exit(0 if status == 0 else 1)


if __name__ == "__main__":
    main()
