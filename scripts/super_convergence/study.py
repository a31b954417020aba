"""The cells of a size, a file of what was kept -> every cell trained once, each result kept as it comes."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.plan.range_test import range_test

from .cells import LOOKS, Cell, make_optimizer, train
from .sets import Rows, moved
from .sizes import Size

RANGE = (1e-4, 100.0, 120)  # lowest rate, highest rate, steps of the range test


def carry_out(
    size: Size, cells: Sequence[Cell], kept: Path, *, data: Path | None = None, minutes: float | None = None
) -> None:
    """Train the cells that `kept` does not have, for `minutes` at most, and run the range test."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_flush_denormal(True)
    results, begin = read(kept), time.monotonic()
    results.setdefault("hardware", hardware(device))
    done = {json.dumps(entry["cell"]) for entry in results["cells"]}
    wanted = [cell for cell in cells if json.dumps(cell.key()) not in done]
    rows: dict[int, Rows] = {}
    for number, cell in enumerate(wanted):
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            print(f"{size.name}: {len(wanted) - number} cells left; the same command goes on", flush=True)
            return
        if cell.seed not in rows:
            rows[cell.seed] = size.rows(data, cell.seed).to(device)
        network = new_network(size, rows[cell.seed], cell.seed, device)
        result = train(cell, rows[cell.seed], network, looks=looks(cell))
        results["cells"].append({"cell": cell.key(), **result})
        write(kept, results)
        print(
            f"{number + 1}/{len(wanted)} {cell.schedule}, {cell.optimizer}, {cell.steps} steps, peak {cell.peak:g}, "
            f"decay {cell.weight_decay:g}, seed {cell.seed}: {result['accuracy']:.4f} in {result['seconds']:.0f} s",
            flush=True,
        )
    if "range_test" not in results:
        found = size.rows(data, 0).to(device)
        results["range_test"] = looked_at(size, found, new_network(size, found, 0, device))
        write(kept, results)


def looks(cell: Cell) -> int:
    """Looks at the test set, which cost as much as many steps: often enough for the curves of seed 0, two elsewhere."""
    return LOOKS if cell.schedule == "climb" else min(LOOKS if cell.seed == 0 else 2, max(1, cell.steps // 100))


def new_network(size: Size, rows: Rows, seed: int, device: torch.device) -> nn.Module:
    """The network of `size` with its first weights drawn by `seed`."""
    torch.manual_seed(seed)
    network: nn.Module = size.network(rows, seed).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def looked_at(size: Size, rows: Rows, model: nn.Module) -> dict[str, Any]:
    """`finetune.plan.range_test` with SGD: training loss over a rate that climbs, and the rate that it suggests."""
    cell = Cell("flat", 1, 1.0, size.batch, size.decay)
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(RANGE[2]):
            chosen = torch.randint(len(rows.train_y), (size.batch,), generator=generator).to(rows.train_y.device)
            yield moved(rows.train_x[chosen], rows, generator), rows.train_y[chosen]

    def loss(network: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(network.train()(batch[0]), batch[1])

    lowest, highest, steps = RANGE
    found = range_test(model.train(), batches(), loss, lowest=lowest, highest=highest, steps=steps,
                       optimizer=lambda groups: make_optimizer(groups, cell))  # fmt: skip
    return {name: value for name, value in asdict(found).items() if name != "losses"}


def hardware(device: torch.device) -> str:
    """What it runs on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = next((line.split(":")[1].strip() for line in model.splitlines() if line.startswith("model name")), "CPU")
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def read(kept: Path) -> dict[str, Any]:
    """What was kept: {"hardware", "cells": [{"cell", "accuracy", "loss", "curve", ...}], "range_test"}."""
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {"cells": []}
    return found


def write(kept: Path, results: dict[str, Any]) -> None:
    """Keep `results`, a line a cell, in one piece or not at all."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(entry) for entry in results["cells"])
    rest = {name: value for name, value in results.items() if name != "cells"}
    head = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in rest.items())
    fresh = kept.with_suffix(".tmp")
    fresh.write_text(f'{{\n{head}"cells": [\n{lines}\n]\n}}\n')
    fresh.replace(kept)
