"""What is tried at each size: data, network, lengths, rates and the axes of the maps -> the cells, in their order."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from torch import nn

import finetune
from finetune.data.task import Task, full_kind

from .cells import Cell
from .networks import ResNet
from .sets import Rows, cifar10, digits


@dataclass(frozen=True)
class Size:
    """One size of the experiment.

    Attributes:
        name: In file names and on the command line.
        title: Above the plots: data and network.
        rows: (folder given with --data or None, seed) -> rows.
        network: (rows, seed) -> a new network.
        batch: Pictures a step.
        full: Steps of the piecewise-constant run that the others are measured against.
        slow: (schedule, its rates) of that run.
        lengths: Steps of the short runs.
        cycle: (schedule, its peak rates) of the one-cycle runs.
        decays: Weight decays of the comparison, for every schedule; the last is also that of the other maps.
        map_steps: Steps of a cell of a map.
        other_steps: Steps at which the map of weight decay is drawn again: does the best one hang on the length?
        map_decays, map_momenta, map_peaks: Axes of the maps with SGD.
        adam_peaks, adam_eps, adam_beta2: Axes of the map with AdamW.
        adam_decay: Its weight decay.
        climb: Highest rate of the range test.
    """

    name: str
    title: str
    rows: Callable[[Path | None, int], Rows]
    network: Callable[[Rows, int], nn.Module]
    batch: int
    full: int
    slow: tuple[str, tuple[float, ...]]
    lengths: tuple[int, ...]
    cycle: tuple[str, tuple[float, ...]]
    decays: tuple[float, ...]
    map_steps: int
    other_steps: tuple[int, ...]
    map_decays: tuple[float, ...]
    map_momenta: tuple[float, ...]
    map_peaks: tuple[float, ...]
    adam_peaks: tuple[float, ...]
    adam_eps: tuple[float, ...] = (1e-8, 1e-5, 1e-3, 1e-1)
    adam_beta2: tuple[float, ...] = (0.9, 0.99, 0.999)
    adam_decay: float = 0.01
    climb: float = 10.0

    @property
    def decay(self) -> float:
        """Weight decay where it is not what varies."""
        return self.decays[-1]

    def shortened(self, factor: float) -> "Size":
        """The same with every length divided by `factor`, two steps at least."""

        def short(*lengths: int) -> tuple[int, ...]:
            return tuple(dict.fromkeys(max(2, round(steps / factor)) for steps in lengths))

        return replace(self, full=short(self.full)[0], map_steps=short(self.map_steps)[0],
                       other_steps=short(*self.other_steps), lengths=short(*self.lengths))  # fmt: skip


def comparison(size: Size, seeds: int) -> Iterator[Cell]:
    """Piecewise-constant at its full length, one-cycle at every short one."""
    for decay, seed in product(reversed(size.decays), range(seeds)):
        for peak in size.slow[1]:
            yield Cell(size.slow[0], size.full, peak, size.batch, decay, seed=seed)
        for steps, peak in product(size.lengths, size.cycle[1]):
            yield Cell(size.cycle[0], steps, peak, size.batch, decay, seed=seed)


def rivals(size: Size, seeds: int) -> Iterator[Cell]:
    """Piecewise-constant and cosine at the short lengths, at the two highest rates of the long run."""
    for seed, steps, peak in product(range(seeds), size.lengths, size.slow[1][-2:]):
        for schedule in (size.slow[0], "cosine"):
            yield Cell(schedule, steps, peak, size.batch, size.decay, seed=seed)


def decay_map(size: Size) -> Iterator[Cell]:
    """Weight decay x peak rate."""
    for steps, decay, peak in product((size.map_steps, *size.other_steps), size.map_decays, size.map_peaks):
        yield Cell(size.cycle[0], steps, peak, size.batch, decay)


def momentum_map(size: Size) -> Iterator[Cell]:
    """Momentum, held fixed, x peak rate."""
    schedule = "triangle" if size.cycle[0] == "triangle" else "onecycle, fixed momentum"
    for momentum, peak in product(size.map_momenta, size.map_peaks):
        yield Cell(schedule, size.map_steps, peak, size.batch, size.decay, momentum=momentum)


def adam_map(size: Size) -> Iterator[Cell]:
    """Adam's epsilon x its beta2, at several peak rates."""
    for peak, eps, beta2 in product(size.adam_peaks, size.adam_eps, size.adam_beta2):
        yield Cell("onecycle", size.map_steps, peak, size.batch, size.adam_decay, optimizer="adamw", eps=eps,
                   beta2=beta2)  # fmt: skip


def climbs(size: Size) -> Iterator[Cell]:
    """Smith's range test: the accuracy while the rate climbs along a line."""
    yield Cell("climb", size.map_steps, size.climb, size.batch, size.decay)


def all_cells(size: Size, seeds: int) -> list[Cell]:
    """Every cell once, in the order in which they are worth having."""
    found = [*comparison(size, seeds), *climbs(size), *decay_map(size), *momentum_map(size), *rivals(size, seeds),
             *adam_map(size)]  # fmt: skip
    return list(dict.fromkeys(found))


def _fractals(rows: Rows, seed: int) -> nn.Module:
    task = Task(full_kind("single_label"), "image", tuple(str(label) for label in range(rows.classes)))
    return finetune.load_backbone("fractals", task, image_size=rows.train_x.shape[-1], seed=seed).model


def _resnet(blocks: int, width: int) -> Callable[[Rows, int], nn.Module]:
    return lambda rows, seed: ResNet(rows.train_x.shape[1], rows.classes, blocks=blocks, width=width)


def _cifar(rows: int | None, side: int) -> Callable[[Path | None, int], Rows]:
    return lambda data, seed: cifar10(data or Path("data"), rows, side=side)


# Lengths are a twentieth, a tenth, a fifth and a third of the full one.
DIGITS = Size(
    "digits", "500 digits of 8x8 pixels, ResNet-8 of width 8", lambda data, seed: digits(500, seed), _resnet(1, 8),
    batch=64, full=4000, slow=("piecewise", (0.01, 0.03, 0.1, 0.3)), lengths=(200, 400, 800, 1333),
    cycle=("onecycle", (0.03, 0.1, 0.3, 1.0)), decays=(5e-4, 5e-3), map_steps=400, other_steps=(100,),
    map_decays=(5e-5, 5e-4, 5e-3, 2e-2, 5e-2), map_momenta=(0.8, 0.85, 0.9, 0.95), map_peaks=(0.03, 0.1, 0.3, 1.0, 3.0),
    adam_peaks=(1e-3, 1e-2),
)  # fmt: skip
TRANSFER = Size(
    "transfer", "100 digits of 16x16 pixels, the embedded fractal backbone, everything open",
    lambda data, seed: digits(100, seed, side=16, channels=3), _fractals,
    batch=32, full=2000, slow=("piecewise", (0.01, 0.03, 0.1, 0.3)), lengths=(100, 200, 400, 667),
    cycle=("onecycle", (0.03, 0.1, 0.3, 1.0)), decays=(5e-4, 5e-3), map_steps=200, other_steps=(),
    map_decays=(5e-5, 5e-4, 5e-3, 2e-2, 5e-2), map_momenta=(0.8, 0.85, 0.9, 0.95), map_peaks=(0.03, 0.1, 0.3, 1.0),
    adam_peaks=(1e-3, 1e-2),
)  # fmt: skip
# Smith & Topin 2017: batches of 1,000 (8 GPUs of 125); 0.35 over 80k steps; 0.1 -> 3 -> 0.1 in 10k.
CIFAR10 = Size(
    "cifar10", "CIFAR-10, ResNet-56", _cifar(None, 32), _resnet(9, 16),
    batch=1000, full=80_000, slow=("piecewise, Smith", (0.35,)), lengths=(2_000, 6_000, 10_000, 20_000),
    cycle=("triangle", (1.0, 3.0)), decays=(1e-4,), map_steps=10_000, other_steps=(),
    map_decays=(1e-3, 1e-4, 1e-5, 1e-6), map_momenta=(0.8, 0.85, 0.9, 0.95), map_peaks=(0.35, 1.0, 3.0),
    adam_peaks=(1e-3, 3e-3), climb=3.0,
)  # fmt: skip
# The same on 2,000 of its pictures at 16x16 with a ResNet-8, for two cores: that it runs, not what it would give.
CIFAR10_REDUCED = replace(
    CIFAR10, name="cifar10_reduced", title="2,000 pictures of CIFAR-10 at 16x16, ResNet-8 of width 8",
    rows=_cifar(2_000, 16), network=_resnet(1, 8), batch=64,
).shortened(500.0)  # fmt: skip

SIZES = {size.name: size for size in (DIGITS, TRANSFER, CIFAR10, CIFAR10_REDUCED)}
