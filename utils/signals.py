"""Being asked to stop: by Ctrl-C, by the system, or by SLURM before it takes a node away.

What a system lacks is left out: Windows has no SIGHUP and no SIGUSR1.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL: nothing is wrong, start it again later
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
INSISTS = 2.0  # seconds; a launcher passes one Ctrl-C on as a second one, but sooner


class StopRequest:
    """Whether this process has to stop: `name` is the signal's, `loss` a loader's, or None."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.loss: str | None = None
        self._since = 0.0

    def receive(self, number: int, _: FrameType | None) -> None:
        """Note a signal; a person's second Ctrl-C ends the process where it is."""
        now = time.monotonic()
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._since > INSISTS:
            raise KeyboardInterrupt


@contextmanager
def listen(request: StopRequest) -> Iterator[None]:
    """Let `request` receive the signals instead of what they do otherwise."""
    before = {number: signal.signal(number, request.receive) for number in obeyed()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def obeyed() -> list[signal.Signals]:
    """Return the signals that ask to stop; a hang-up that nohup has ignored stays ignored."""
    return [
        number
        for number in SIGNALS
        if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN
    ]


def raise_losses_when_fetching() -> None:
    """Keep torch from raising in the midst of a step when a loader process dies.

    Its handler of SIGCHLD, set when a loader starts, raises wherever the program stands, between
    a change of the weights and its count, too. Without it the next fetch tells, in five seconds.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def leave_stopping_to_the_parent() -> None:
    """Let a loader's process outlive signals to the whole group, but for SIGTERM, which ends it."""
    for number in SIGNALS:
        if number != signal.SIGTERM:  # by which its parent ends it, too
            signal.signal(number, signal.SIG_IGN)
