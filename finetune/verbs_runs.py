"""The words after `finetune report`, `compare` and `doctor` go in; a page, runs side by side, or what is wrong with the
machine come out. `--help` costs no torch."""

from pathlib import Path

from tyro.conf import Positional


def report(run: Positional[Path], *, out: Path | None = None) -> None:
    """Write the page about a run anew, also of one that has not finished.

    Args:
        run: Run folder.
        out: File to write; by default report.html in the folder.
    """
    from finetune.output.report import write_report

    print(write_report(run, out if out is not None else run / "report.html"))


def compare(runs: Positional[tuple[Path, ...]], *, out: Path | None = None) -> None:
    """Put runs side by side: metrics, what they were set to differently, and a test on the test rows that they share.

    Args:
        runs: Run folders, two or more; the others are tested against the first.
        out: Also draw their validation losses into this file (.png, .svg, .pdf).
    """
    from finetune.output.compare import compare as side_by_side
    from finetune.output.compare import draw_curves

    found = side_by_side(runs)
    print(found)
    if out is not None:
        print(draw_curves(found, out))


def doctor(*, out: Path = Path("runs")) -> None:
    """Look at packages, devices, memory, threads, accelerate's configuration and the Hub's settings; end with 1 where
    something has to be mended.

    Args:
        out: Folder where runs will be written.
    """
    from finetune.doctor import examine, said

    found = examine(out)
    print(said(found))
    if any(finding.state == "problem" for finding in found):
        raise SystemExit(1)
