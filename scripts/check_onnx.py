"""Does an ONNX file answer as PyTorch does, on every network of check_architectures.py? A table and results as JSON.

    python scripts/check_onnx.py
    python scripts/check_onnx.py --family timm --only 'resnet|vit'

Each network is exported by the package's own `save_checked` from two examples, and onnxruntime answers these, one
example, and three or five (texts of other lengths, padded). Equal is a difference of at most 1e-4 in units of
max(1, |logit|); before that the classifier is scaled so that logits differ by about 1 from example to example: random
weights give logits near 0, where any difference would pass. Each runs in a process of its own, with a time limit. What
was measured with the same versions is not measured again. Exit status 1 below 90 % of what could be built.
"""

import json
import logging
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import onnxruntime  # noqa: F401  # loaded once, before the processes are forked
import torch
import torch.nn.functional as F
from check_architectures import CLASSES, Network, asked, cases, reason
from check_replay import batch_of, examples

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from finetune.model.pretrained import Pretrained  # noqa: E402
from finetune.output.onnx_export import TOLERANCE, save_checked  # noqa: E402
from finetune.output.onnx_ways import OPSET, NotExported  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "check_onnx.json"
LIMIT = 120  # CPU seconds for one network
PACKAGES = ("torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime")


def main() -> int:
    """Check the networks that the command line asks for; print and keep the table; the exit status."""
    options = asked(__doc__)
    torch.set_num_threads(1)  # a process with threads cannot be forked safely
    versions = {package: version(package) for package in PACKAGES}
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    rows = {row["name"]: row for row in before.get("results", []) if before["versions"] == versions}
    for family, case, build in cases():
        name = f"{family}/{case}"
        if options.family not in (None, family) or not re.search(options.only, case):
            continue
        if name not in rows or options.only:
            rows[name] = {"name": name, **in_a_process(family, build)}
            write(list(rows.values()), versions)
        print(line(rows[name]), flush=True)
    found = summary(list(rows.values()))
    print(f"\n{found['equal']} of {found['tried']} equal ({found['share']:.1%}); the others:")
    print("\n".join(line(row) for row in rows.values() if not row["ok"]))
    return 0 if found["share"] >= 0.9 else 1


def line(row: dict[str, Any]) -> str:
    """One row for the console."""
    state = "equal" if row["ok"] else "NO" if row["built"] else "not built"
    told = f"{row['difference']:.1e}, logits spread over {row['spread']:.2g}" if row["ok"] else row["reason"]
    return f"{row['name']:50}{state:10}{row.get('cpu_seconds', ''):>6}  {told}"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of the whole table."""
    built = [row for row in rows if row["built"]]
    equal = sum(row["ok"] for row in built)
    return {"tried": len(built), "equal": equal, "share": round(equal / len(built), 4) if built else 0.0}


def write(rows: list[dict[str, Any]], versions: dict[str, str]) -> None:
    """The table as JSON, failures and what could not be built listed apart."""
    content = {
        "script": "scripts/check_onnx.py",
        "versions": versions,
        "opset": OPSET,
        "tolerance": TOLERANCE,
        **summary(rows),
        "largest_difference": max((row["difference"] for row in rows if row["ok"]), default=None),
        "not_equal": {row["name"]: row["reason"] for row in rows if row["built"] and not row["ok"]},
        "not_built": {row["name"]: row["reason"] for row in rows if not row["built"]},
        "results": sorted(rows, key=lambda row: row["name"]),
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def in_a_process(family: str, build: Callable[[], Network]) -> dict[str, Any]:
    """What `check` gives, or why it came to no end."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=check, args=(family, build, sender))
    process.start()
    sender.close()
    found: dict[str, Any] = {"built": True, "ok": False, "difference": None}
    try:
        found |= receiver.recv()
    except EOFError:
        process.join()
        slow = process.exitcode == -signal.SIGXCPU
        found["reason"] = f"no result in {LIMIT} CPU seconds" if slow else f"the process died ({process.exitcode})"
    process.join()
    return found


def check(family: str, build: Callable[[], Network], sender: Connection) -> None:
    """Send {"built", "ok", "difference", "reason", "spread"} of one network."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 10))
    torch.manual_seed(0)
    try:
        network = build()
        network.model.eval()
        model = Pretrained(network.model, None, family, network.name, frozenset(), "image")  # type: ignore[arg-type]
        data, lengths = examples(network)
        if data.get("pixel_values", torch.zeros(0)).ndim == 4:  # noise looks alike to a network: stains of colour
            small = torch.randn(len(data["pixel_values"]), data["pixel_values"].shape[1], 5, 5)
            data["pixel_values"] = F.interpolate(small, data["pixel_values"].shape[2:], mode="bicubic")
        batches = [batch_of(network, data, lengths, rows)[0] for rows in ([0, 1], [4], [2, 3, 4], [3, 5, 1, 6, 7])]
        livened(network.model, convolutions=False)
        spread = spread_out(model, network.new_parameters, batches)
        if spread < 0.1:
            livened(network.model, convolutions=True)
            spread = spread_out(model, network.new_parameters, batches)
    except Exception as error:
        sender.send({"built": False, "reason": reason(error)})
        return
    found: dict[str, Any] = {"variant": network.name, "spread": float(f"{spread:.3g}")}
    began = time.process_time()
    try:
        with tempfile.TemporaryDirectory() as folder:
            far = save_checked(model, batches, Path(folder) / "m.onnx", {}, kind="single_label_classification")
        found |= {"ok": True, "difference": float(f"{far:.2g}")}
    except NotExported as error:
        found["reason"] = str(error)
    except Exception as error:
        found["reason"] = f"a mistake of the package: {reason(error)}"
    sender.send(found | {"cpu_seconds": round(time.process_time() - began, 1)})


@torch.no_grad()
def livened(model: torch.nn.Module, convolutions: bool) -> None:
    """Give layer scales a value at which blocks matter, and convolutions weights that keep the size of signals."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and 0 < parameter.max() == parameter.min() < 0.01:
            parameter.fill_(0.5)
    for module in model.modules():
        if convolutions and isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


@torch.no_grad()
def spread_out(model: Pretrained, new: frozenset[str], batches: list[dict[str, torch.Tensor]]) -> float:
    """Scale the last layer so that logits have a deviation of 1 over the examples, if they differ at all; the
    deviation that they have then."""
    last = [p for name, p in model.model.named_parameters() if name in new and p.ndim > 1 and p.shape[0] == CLASSES]

    def deviation() -> float:
        return float(torch.cat([model.forward(batch).flatten(1) for batch in batches]).std(0).mean())

    before = deviation()
    for parameter in last:
        parameter.mul_(min(1 / max(before, 1e-9), 1e4))
    return deviation()


if __name__ == "__main__":
    sys.exit(main())
