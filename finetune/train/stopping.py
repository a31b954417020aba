"""Ctrl-C, or the SIGTERM of a scheduler, goes in; the wish to end after the step that runs comes out."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A run that was asked to end, and saved itself first.

    Attributes:
        signal: Number of the signal.
    """

    def __init__(self, sentence: str, number: int) -> None:
        super().__init__(sentence)
        self.signal = number


@dataclass
class StopWish:
    """Number of the signal that asks for an end; 0: none."""

    signal: int = 0


@contextmanager
def listening() -> Iterator[StopWish]:
    """Take the first SIGINT and the first SIGTERM as a wish; the second of its kind ends the process at once.

    A launcher answers Ctrl-C with a SIGTERM to each of its processes, which have had the Ctrl-C themselves: so each
    kind has its own count. Outside of the main thread, where Python has no signal handlers, nothing is taken.
    """
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def take(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        if not wish.signal:
            again = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            print(f"Stopping  after this step, to save it; {again} again stops at once", file=sys.stderr, flush=True)
        wish.signal = wish.signal or number

    # A shell has Ctrl-C ignored by what runs behind it, and so it stays.
    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, take) for number in heard}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
