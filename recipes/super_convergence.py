"""Super-convergence (Smith & Topin 2017): one-cycle at a high rate against piecewise-constant over ten times the steps.

    python recipes/super_convergence.py --size digits                      # from scratch, minutes on two cores
    python recipes/super_convergence.py --size transfer                    # the same for a pretrained backbone
    python recipes/super_convergence.py --size cifar10 --data cifar10/     # Smith's own settings: hours on one GPU
    python recipes/super_convergence.py --size cifar10_reduced --data ../shared/data/vision/cifar10_small

For each size: accuracy over steps for piecewise-constant, cosine and one-cycle, the range test, and maps of weight
decay, momentum, Adam's epsilon and beta2. Results are kept as they come and are not computed again: in a clone, the
first two commands with `--minutes 0` only draw what `docs/super_convergence.md` shows. The experiment is in
`scripts/super_convergence/`.
"""

import sys
from pathlib import Path
from typing import Literal

import finetune

ROOT = Path(__file__).resolve().parent.parent


def main(
    size: Literal["digits", "transfer", "cifar10", "cifar10_reduced"], *, data: Path | None = None,
    results: Path = ROOT / "scripts/results", out: Path = ROOT / "docs/pictures", seeds: int = 3, shorten: float = 1.0,
    minutes: float | None = None,
) -> None:  # fmt: skip
    """Train what is missing, print the tables and draw the plots.

    Args:
        size: The experiment.
        data: CIFAR-10: a folder with cifar-10-batches-py, or with train/CLASS/* and test/CLASS/*.
        results: Folder in which results are kept.
        out: Folder of the plots.
        seeds: Runs of each cell of the comparison; the maps have one.
        shorten: Divide all lengths by this.
        minutes: Stop training after so long; the same command goes on.
    """
    sys.path.insert(0, str(ROOT))  # the experiment is no part of the package
    from scripts.super_convergence import pictures, study, summary
    from scripts.super_convergence.sizes import SIZES, all_cells

    chosen = SIZES[size].shortened(shorten)
    kept = results / f"super_convergence_{size}.json"
    study.carry_out(chosen, all_cells(chosen, seeds), kept, data=data, minutes=minutes)
    print(summary.report(study.read(kept), chosen))
    for path in pictures.draw_all(study.read(kept), chosen, out):
        print(f"Drawn     {path}")


if __name__ == "__main__":
    finetune.cli(main)
