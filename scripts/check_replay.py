"""Is a replayed forward pass the plain one, on every network of check_architectures.py? A table and results as JSON.

    python scripts/check_replay.py
    python scripts/check_replay.py --family timm --only 'resnet|vit'

Each network with at least two layer groups is frozen up to its middle, and up to its head. What crosses is stored for
eight examples (texts of different lengths), in batches other than those of the check; then outputs and the gradients of
everything open have to be those of a plain forward and backward pass of the same examples, in training mode. Where a
boundary is refused, or the check finds a difference, training would go on plainly: that is counted as "plain", with the
reason. "WRONG" would be a difference that the package's own check lets pass: it is looked for with another batch.
"""

import ctypes
import gc
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from check_architectures import Network, asked, cases, reason
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from finetune.model.boundary import NoBoundary, find_boundary  # noqa: E402
from finetune.model.groups import layer_groups, set_mode, set_trainable  # noqa: E402
from finetune.model.replay import NotEqual, Replay, check  # noqa: E402
from finetune.model.store import make_store, plan_store  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "replay_architectures.json"
ROWS = 8
SLOW = ("deepseek_vit",)  # a forward pass of 4,096 tokens takes half a minute, and 100 of them are needed here


def main() -> int:
    """Check the networks that the command line asks for; print and write the table; the exit status."""
    options = asked(__doc__)
    rows = []
    for family, name, build in cases():
        if options.family in (None, family) and re.search(options.only, name) and (options.only or name not in SLOW):
            for row in check_one(family, name, build):
                rows.append(row)
                print(f"{family:13}{name:32}{row['frozen']:>9}  {row['state']:9}{row['why']}", flush=True)
            tidy()
    equal = sum(row["state"] == "equal" for row in rows)
    wrong = [row["name"] for row in rows if row["state"] == "WRONG"]
    share = equal / len(rows) if rows else 0.0
    print(f"\n{equal} of {len(rows)} replayed, equal ({share:.1%}); wrong without notice: {wrong or 'none'}")
    if not (options.family or options.only):
        summary = {
            "script": "scripts/check_replay.py",
            "versions": {library.__name__: library.__version__ for library in (torch, timm, transformers)},
            "boundaries": len(rows),
            "equal": equal,
            "share": round(share, 4),
            "wrong": wrong,
            "not_run": list(SLOW),
            "plain": {f"{r['family']}/{r['name']} {r['frozen']}": r["why"] for r in rows if r["state"] == "plain"},
            "results": rows,
        }
        RESULTS.write_text(json.dumps(summary, indent=1) + "\n")
    return 0 if share >= 0.95 and not wrong else 1


def tidy() -> None:
    """Give the memory of the last network back: the C library keeps it otherwise, network after network."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def check_one(family: str, name: str, build: Callable[[], Network]) -> list[dict[str, Any]]:
    """A row for each boundary of one network; none for a network that cannot be built or has one group."""
    torch.manual_seed(0)
    try:
        network = Logits(**vars(build()))
        groups = layer_groups(network, network.batch)  # type: ignore[arg-type]
    except Exception:
        return []
    rows = []
    for label, first in (("middle", len(groups) // 2), ("head", len(groups) - 1)):
        if len(groups) < 2 or first == 0:
            continue
        set_trainable(network.model, groups, first)
        set_mode(network.model, groups, first)
        begin = time.process_time()
        state, why, stored = "equal", "", 0
        try:
            stored = replayed(network)
        except NoBoundary as error:
            state, why = "plain", str(error)
        except NotEqual as error:
            state, why = "plain", f"check: {error}"
        except Wrong as error:
            state, why = "WRONG", str(error)
        except Exception as error:
            state, why = "plain", reason(error)
        rows.append({"family": family, "name": name, "frozen": label, "state": state, "why": why,
                     "bytes_per_example": stored, "cpu_seconds": round(time.process_time() - begin, 2)})  # fmt: skip
    return rows


class Wrong(Exception):
    """A difference that the package's own check did not find."""


class Logits(Network):
    """A network that answers with its logits alone, as the package reads it."""

    def forward(self, batch: dict[str, Tensor], model: nn.Module | None = None) -> Any:
        output = super().forward(batch, model)
        return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def replayed(network: Network) -> int:
    """Bytes stored an example.

    Raises:
        NoBoundary, NotEqual: The package would train plainly.
        Wrong: It would not, and should.
    """
    data, lengths = examples(network)
    traced = [batch_of(network, data, lengths, rows)[0] for rows in ([0, 1], [2, 3, 4], [1, 2, 3, 5, 6])]
    if lengths is None:
        traced = traced[:2]
    boundary = find_boundary(network.model, network.forward, traced)
    shapes, dtypes, size = plan_store(boundary, ROWS, lengths)
    replay = Replay(network, boundary, make_store(shapes, dtypes, ROWS))  # type: ignore[arg-type]
    for rows in ([0, 1, 2], [3, 4, 5], [6, 7]):
        replay.fill(batch_of(network, data, lengths, rows)[0], rows, lengths and [lengths[row] for row in rows])
    batches = [batch_of(network, data, lengths, rows) for rows in ([5, 0, 7, 2], [1, 6, 3])]
    check(replay, batches, loss, torch.enable_grad)
    inputs, rest, rows, _ = batch_of(network, data, lengths, [4, 7, 6, 1, 0])
    network.model.eval()
    with torch.no_grad():
        plain, again = network.forward(inputs), replay.forward(rest, rows)
    for a, b in zip(tree_leaves(plain), tree_leaves(again), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and not torch.allclose(a, b, rtol=1e-3, atol=1e-3):
            raise Wrong(f"outputs differ by {float((a - b).abs().max()):.2e}")
    return size // ROWS


def loss(outputs: Any, targets: Tensor) -> Tensor:
    """Some number that depends on all logits."""
    logits = tree_leaves(outputs)[0]
    return (logits.float().flatten(1).mean(1) - targets).pow(2).mean() + logits.float().pow(2).mean()


def examples(network: Network) -> tuple[dict[str, Tensor], list[int] | None]:
    """Eight examples, and for texts with a mask their lengths."""
    generator = torch.Generator().manual_seed(1)
    data = {}
    lengths = [9, 6, 7, 9, 5, 8, 9, 6] if "attention_mask" in network.batch else None
    for name, tensor in network.batch.items():
        if tensor.is_floating_point():
            data[name] = torch.randn(ROWS, *tensor.shape[1:], generator=generator)
        elif name == "input_ids":
            width = max(lengths) if lengths else tensor.shape[1]
            data[name] = torch.randint(5, int(tensor.max()) + 1, (ROWS, width), generator=generator)
        else:
            data[name] = tensor[:1].expand(ROWS, *tensor.shape[1:]).clone()
    if lengths:
        last = network.batch["input_ids"][0, -1]
        for row, length in enumerate(lengths):
            data["input_ids"][row, length - 1] = last
    return data, lengths


def batch_of(
    network: Network, data: dict[str, Tensor], lengths: list[int] | None, rows: list[int]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int], Tensor]:
    """(inputs, what replay is given of them, rows, targets), padded on the right to the longest."""
    inputs = {name: tensor[rows] for name, tensor in data.items()}
    if lengths:
        longest = max(lengths[row] for row in rows)
        mask = torch.arange(longest) < torch.tensor([lengths[row] for row in rows])[:, None]
        pad = getattr(network.model.config.get_text_config(), "pad_token_id", None) or 0
        inputs["input_ids"] = torch.where(mask, inputs["input_ids"][:, :longest], pad)
        inputs["attention_mask"] = mask.long()
    rest = inputs if "pixel_values" not in inputs else {
        name: torch.zeros_like(tensor) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()
    }  # fmt: skip
    return inputs, rest, rows, torch.tensor([0.1 * row for row in rows])


if __name__ == "__main__":
    sys.exit(main())
