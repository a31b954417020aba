"""A run's start goes in; its test accuracy over time comes out, with all test evaluations taken off the clock."""

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Meter:
    """Wall and CPU seconds since the process was started (imports included), less those spent in `pause`."""

    def __init__(self, started: float) -> None:
        self.started, self.paused = started, (0.0, 0.0)
        self.curve: list[tuple[float, float, float]] = []  # wall seconds, CPU seconds, test accuracy

    def now(self) -> tuple[float, float]:
        times = os.times()
        cpu = times.user + times.system + times.children_user + times.children_system
        return time.time() - self.started - self.paused[0], cpu - self.paused[1]

    @contextmanager
    def pause(self) -> Iterator[None]:
        wall, cpu = self.now()
        yield
        after = self.now()
        self.paused = self.paused[0] + after[0] - wall, self.paused[1] + after[1] - cpu

    def point(self, accuracy: Callable[[], float]) -> None:
        """Add a point to the curve: the clock as it stands, and the accuracy, computed while it is stopped."""
        wall, cpu = self.now()
        with self.pause():
            self.curve.append((round(wall, 2), round(cpu, 2), round(accuracy(), 5)))

    def summary(self) -> dict[str, object]:
        """All that was measured; to be called when the run has ended and saved."""
        wall, cpu = self.now()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        return {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2), "peak_mb": peak, "curve": self.curve}
