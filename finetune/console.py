"""What a run has to say goes in; lines come out on the console, and below them a bar of the stage that trains.

The bar is there on a terminal and in a notebook only; where the output goes to a file or another program, lines are all
there is. Processes other than the first say nothing.
"""

from typing import Any

SHARES = ("accuracy", "f1", "precision", "recall")  # metrics that are told in per cent


class Console:
    """Called with a line, prints it; told of steps, keeps a bar under the lines."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent, self.plain = silent, silent  # without lines, without a bar
        self.live: Any = None
        self.task: Any = None

    def __call__(self, line: str) -> None:
        """Print a line."""
        if self.silent:
            return
        if self.live is None:
            print(line, flush=True)
        else:  # above the bar
            self.live.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def step(self, stage: str, done: int, steps: int) -> None:
        """So many steps of a stage are done."""
        if self.plain:
            return
        if self.live is None and not self.start():
            return
        if self.task is None or self.task[0] != stage:
            if self.task is not None:
                self.live.remove_task(self.task[1])
            self.task = stage, self.live.add_task(stage, total=steps, completed=done)
        self.live.update(self.task[1], completed=done, total=steps)
        if done == steps:
            self.close()

    def start(self) -> bool:
        """Show the bar; whether there is a place for it."""
        from rich.console import Console as Rich
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Rich()
        if not (console.is_terminal or console.is_jupyter):
            self.plain = True
            return False
        self.live = Progress(
            TextColumn("{task.description:<9}"), BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("steps, "),
            TimeRemainingColumn(compact=True), TextColumn("to go"), console=console, transient=True,
        )  # fmt: skip
        self.live.start()
        return True

    def close(self) -> None:
        """Take the bar away."""
        if self.live is not None:
            self.live.stop()
        self.live = self.task = None


def clock(seconds: float) -> str:
    """Whole seconds as "1:05"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def shown(name: str, value: float) -> str:
    """A metric in words: "accuracy 88.1 %", "rmse 0.412"."""
    words = name.replace("_", " ")
    return f"{words} {100 * value:.1f} %" if name.startswith(SHARES) else f"{words} {value:.4g}"


def headline(metrics: dict[str, Any], main: str = "") -> tuple[str, float] | None:
    """The metric that counts: `main` where it is there, else the first; None where there is nothing but the loss."""
    found = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    named = [name for name in (main, *found) if name in found and name not in ("loss", "log_loss")]
    return (named[0], found[named[0]]) if named else None
