"""Kills short runs at any instant, gives the same command again until they end, and compares with runs left alone.

    python scripts/chaos.py --kills 100            # pictures and texts, one process and two; about an hour of two cores
    python scripts/chaos.py --kills 10 --runs pictures/1

Half of the kills come at a random instant; the others wait for a moment that is easily got wrong: while a checkpoint is
being written, just after it was renamed, at the change of a stage, while the model is exported, and when `run.json` is
about to be replaced. A run that ended must have the weights, the log of steps (but for the seconds), the history and
the predictions of the undisturbed run, byte by byte. Ends with 1 if one has not.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from equivalence import LOCAL, ROOT, make_data

RUNS = ("pictures/1", "texts/1", "pictures/2", "texts/2")
MOST_STARTS = 12  # of one run; the last of them is left alone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="keep the table here")
    options = parser.parse_args()
    rng, table, failures = random.Random(options.seed), [], []
    with tempfile.TemporaryDirectory() as scratch:
        make_data(Path(scratch) / "data")
        shares = [
            options.kills // len(options.runs) + (i < options.kills % len(options.runs))
            for i in range(len(options.runs))
        ]
        for name, kills in zip(options.runs, shares, strict=True):
            kind, count = name.split("/")
            out, command = Path(scratch) / "run", commanded(Path(scratch) / "data" / kind, int(count), Path(scratch))
            shutil.rmtree(out, ignore_errors=True)
            seconds, expected = undisturbed([*command, str(out)], out), state_of(out)
            left, moments = kills, dict.fromkeys(MOMENTS, 0)
            ended = same = 0
            while left > 0:
                shutil.rmtree(out)
                starts: list[str] = []
                while True:
                    moment = rng.choice(["any instant"] * 5 + list(MOMENTS)[1:]) if left else "none"
                    how = started(command, out, moment if len(starts) < MOST_STARTS else "none", rng, seconds)
                    starts.append(how)
                    if how in MOMENTS:
                        left, moments[how] = left - 1, moments[how] + 1
                    elif how == "ended":
                        break
                    else:
                        failures.append(f"{name}: after {starts[:-1]}: {how}")
                        break
                ended += 1
                different = [key for key, value in state_of(out).items() if value != expected[key]]
                same += not different
                if different:
                    failures.append(f"{name}: killed at {starts[:-1]}, and {', '.join(different)} differ")
                print(f"{name}: {kills - left} of {kills} kills, {same} of {ended} runs equal", flush=True)
            table.append({"run": name, "seconds": round(seconds, 1), "kills": sum(moments.values()), **moments,
                          "runs": ended, "equal": same})  # fmt: skip
            if options.json:
                options.json.write_text(json.dumps({"table": table, "failures": failures}, indent=1) + "\n")
    print("\n| " + " | ".join(table[0]) + " |\n" + "|---" * len(table[0]) + "|")
    for row in table:
        print("| " + " | ".join(map(str, row.values())) + " |")
    print("\n".join(["", *failures]))
    return int(bool(failures))


def commanded(rows: Path, count: int, scratch: Path) -> list[str]:
    """The command line of a run, but for its folder."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
    return [sys.executable, *launcher, __file__, "--rows", str(rows), "--into"]


def environment() -> dict[str, str]:
    return {**os.environ, **LOCAL, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def undisturbed(command: list[str], out: Path) -> float:
    """Let a run end; its seconds from when it has a folder: before, there is nothing to lose."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment(), stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None and not (out / "run.json").exists():
            time.sleep(0.01)
        begin = time.monotonic()
        if process.wait():
            said.seek(0)
            raise SystemExit(f"undisturbed, it failed\n{said.read()[-4000:]}")
        return time.monotonic() - begin


def started(command: list[str], out: Path, moment: str, rng: random.Random, seconds: float) -> str:
    """Start the run, and kill it with all its processes at that moment; the moment, "ended", or what went wrong."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*command, str(out)], env=environment(), stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        wait = rng.random() * seconds if moment == "any instant" else 0.0
        begin, fires = time.monotonic(), MOMENTS.get(moment, lambda _: False)
        folder_seen: float | None = None
        while process.poll() is None:
            now = time.monotonic()
            if folder_seen is None and (out / "run.json").exists():
                folder_seen = now
            if folder_seen is not None and now - folder_seen >= wait and fires(out):
                kill(process)
                return moment
            if now - begin > 20 * seconds + 120:
                kill(process)
                return f"{moment}: it hangs"
            time.sleep(0.001)
        said.seek(0)
        text = said.read()
        if process.returncode == 0 or "holds a run that is finished" in text:
            return "ended"
        return f"{moment}: ended with {process.returncode}: {text[-1500:]}"


def kill(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started: a launcher's have sessions of their own, and would go on without it."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=30)
    process.wait()


def _lines(out: Path) -> int:
    try:
        return (out / "steps.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "any instant": lambda out: True,
    "checkpoint half written": lambda out: any((out / "checkpoints").glob(".step-*/*")),
    "checkpoint renamed": lambda out: any((out / "checkpoints").glob("step-*")) and random.random() < 0.02,
    "change of stage": lambda out: _lines(out) in (9, 10, 19, 20),
    "export": lambda out: any(out.glob(".model.new-*")),
    "record": lambda out: (out / ".run.json").exists() or (out / "model").exists(),
}


def state_of(out: Path) -> dict[str, Any]:
    """All of a run that must not depend on how often it was killed."""

    def content(name: str) -> str:
        path = out / name
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"

    try:
        steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
        record = json.loads((out / "run.json").read_text())
    except (OSError, ValueError):
        steps, record = [], {}
    return {
        "weights": content("model/model.safetensors"),
        "predictions": content("predictions/test.csv"),
        "log": [{name: value for name, value in step.items() if name != "seconds"} for step in steps],
        "history": record.get("history"),
        "metrics": record.get("metrics"),
        "status": record.get("status"),
    }


def train(rows: Path, out: Path) -> None:
    """One run of three stages, the first two replayed, with a checkpoint every second step."""
    import torch

    import finetune

    torch.set_num_threads(1)
    backbone = rows.parent / ("vit" if rows.name == "pictures" else "bert")
    stages = finetune.Plan(*(finetune.Stage(first, steps=10) for first in (-1, 3)), finetune.Stage(0, steps=15))
    options: dict[str, Any] = {"precision": "fp32"}
    if rows.name == "texts":
        options |= {"accumulation": 2}

    def run() -> None:
        finetune.fit(str(rows), backbone, out=out, batch_size=8, plan=stages, settings=options, save_steps=2)

    finetune.cli(run)


if __name__ == "__main__":
    if "--into" in sys.argv:  # `finetune.cli` reads the command line, and this program has read it
        place = sys.argv.index("--into")
        rows, into = Path(sys.argv[sys.argv.index("--rows") + 1]), Path(sys.argv[place + 1])
        sys.argv = sys.argv[:1]
        train(rows, into)
    else:
        sys.exit(main())
