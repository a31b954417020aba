"""Feeds the toolkit bad inputs by the hundred, made from good ones by a seed, and looks at how each of them ends.

    python scripts/fuzz_inputs.py                              # all of them, a quarter of an hour of two cores
    python scripts/fuzz_inputs.py --share 0.1 --seed 300       # a tenth of each kind, others
    python scripts/fuzz_inputs.py --only tables:17             # one, with its traceback

Each input is a folder of its own and a process of its own, forked when everything is imported: it may hang (20 seconds
of work, or 100 of waiting), take memory (2 GB more than before), or die, and only its own result tells of it. What it
ends as:

- fine: the input was harmless, or is understood all the same;
- skip: a part of it was left out, and counted;
- error: a FinetuneError, or a refusal of the command line, that names the file, row, column or option and says what to
  do;
- BAD: any other exception, an error that says too little, a hang, a file of the user that is not what it was, memory
  out of all proportion, a death of the process, a token on the console or in a file, or code of the input that was run.

A sample of the command lines is given in a shell's way too, in a new process. Ends with 1 if one input is BAD.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
for name in ("HF_TOKEN", "RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)

from fuzz import checkpoints, flags, photos, runs, tables  # noqa: E402
from fuzz.made import REVIEWS, Made, Random, Reached, as_csv  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "fuzz_inputs.json"
MEMORY, MOST_MEMORY = 2_000, 6_000  # MB: an input that takes more than the first is BAD, the second it cannot have
WAIT, LONGEST = 100, 130  # seconds; an alarm may not be heard, so the process is ended from outside after the second
CLASSES = ("fine", "skip", "error", "BAD")
TOKEN = "hf_abcdefghijkl"  # how those of the command lines begin
ADVICE = re.compile(
    r"[;?]|\b(give|check|save|mend|rename|remove|leave|fetch|make|add|update|write|invalid|required"
    r"|must|choices|name it|name one|--help)\b|Expected|Unrecognized"
)
Generator = Callable[[Random, Path, Path, int], Made]
KINDS: dict[str, tuple[Generator, int]] = {
    "photos": (photos.photos, 110),
    "tables": (tables.tables, 170),
    "pictures": (tables.pictures_in_tables, 57),
    "saved": (tables.saved, 30),
    "timm": (checkpoints.timm, 120),
    "bert": (checkpoints.transformers_text, 130),
    "vit": (checkpoints.transformers_images, 60),
    "runs": (runs.runs, 110),
    "resumes": (runs.resumes, 46),
    "predict": (runs.predict_inputs, 104),
    "flags": (flags.flags, 200),
}


def main() -> int:
    """Run what the command line asks for; print and keep the tables; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs of each kind")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--only", default="", help="KIND, or KIND:NUMBER")
    parser.add_argument("--shells", type=int, help="command lines that are given in a new process too; by default 8")
    parser.add_argument("--json", type=Path, help="keep the results here; those of a whole run are kept in any case")
    options = parser.parse_args()
    kind, _, number = options.only.partition(":")
    asked = {
        name: [int(number)] if number else range(options.seed, options.seed + max(1, round(options.share * count)))
        for name, (_, count) in KINDS.items()
        if kind in ("", name)
    }
    shells = (8 if not kind and options.share == 1.0 else 0) if options.shells is None else options.shells
    begin, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        for name, numbers in asked.items():
            for each in numbers:
                rows.append(tried(name, each, Path(scratch), bool(number)))
                if rows[-1]["class"] == "BAD" or number:
                    print(shown(rows[-1]), flush=True)
        for each in range(shells):
            rows.append(tried("flags", each * 29 + 20, Path(scratch), False, shell=True) | {"kind": "shell"})
    table = {name: Counter(row["class"] for row in rows if row["kind"] == name) for name in (*asked, "shell")}
    print(f"\n{'kind':<14}{'inputs':>8}" + "".join(f"{each:>8}" for each in CLASSES))
    for name, counts in [*table.items(), ("all", sum(table.values(), Counter()))]:
        print(f"{name:<14}{counts.total():>8}" + "".join(f"{counts[each]:>8}" for each in CLASSES))
    bad = [row for row in rows if row["class"] == "BAD"]
    for row in bad:
        print(f"BAD  {row['what']}: python scripts/fuzz_inputs.py --only {row['kind']}:{row['number']}")
    if options.json or (not kind and options.share == 1.0):
        packages = ("torch", "timm", "transformers", "datasets", "pillow", "tyro")
        found = {
            "script": "scripts/fuzz_inputs.py",
            "versions": {name: version(name) for name in packages},
            "inputs": len(rows),
            "seconds": round(time.monotonic() - begin),
            "table": {name: {each: counts[each] for each in CLASSES} for name, counts in table.items()},
            "bad": bad,
            "rows": [f"{r['kind']}:{r['number']} {r['class']}  {r['what']} | {r['text'][:200]}" for r in rows],
        }
        (options.json or RESULTS).write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(bad))


def shown(row: dict[str, Any]) -> str:
    """A result for the console."""
    text = row["text"].replace("\n", "\n    ")
    return f"{row['kind']}:{row['number']} {row['class']}  {row['what']}  ({row['seconds']} s)\n    {text}"


# One input in a process of its own


def tried(kind: str, number: int, scratch: Path, trace: bool, shell: bool = False) -> dict[str, Any]:
    """Make an input, use it, and say how that ended."""
    place, began = scratch / "one", time.monotonic()
    shutil.rmtree(place, ignore_errors=True)
    for name in ("in", "cwd", "out"):
        (place / name).mkdir(parents=True)
    os.chdir(place / "cwd")
    pid, mine = os.fork(), resident()
    if pid == 0:
        try:
            found = used(kind, number, place, scratch / "base", trace, shell)
        except BaseException:
            found = {"text": f"this script failed: {traceback.format_exc(limit=-3)}"}
        (place / "result.json").write_text(json.dumps(found))
        os._exit(0)
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        time.sleep(0.002)
        if time.monotonic() - began > LONGEST:
            os.kill(pid, signal.SIGKILL)
    row = {"kind": kind, "number": number, "what": "?", "class": "BAD", "text": f"the process died ({ended[1]})"}
    with suppress(OSError, ValueError):
        row |= json.loads((place / "result.json").read_text())
    grown = (ended[2].ru_maxrss - mine) // 1024
    if grown > MEMORY:
        row |= {"class": "BAD", "text": f"{grown} MB of memory; {row['text']}"}
    return row | {"seconds": round(time.monotonic() - began, 1)}


def resident() -> int:
    """Memory of this process, in KiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


class Hang(BaseException):
    """Too slow."""


def used(kind: str, number: int, place: Path, base: Path, trace: bool, shell: bool) -> dict[str, Any]:
    """In the process of its own: the result of one input."""
    made = KINDS[kind][0](Random(f"{kind}:{number}"), place, base, number)
    before = state_of(place)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST_MEMORY * 2**20, resource.RLIM_INFINITY))

    def too_slow(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, too_slow)
    signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_PROF, made.limit)  # of work, whatever else the machine does
    signal.alarm(WAIT)  # of waiting
    if shell:
        flags.use = in_a_shell
    outcome, text, trail = how_it_ends(made, place)
    signal.alarm(0)
    signal.setitimer(signal.ITIMER_PROF, 0)
    told = b"".join((place / name).read_bytes() for name in ("stdout", "stderr"))
    if b"Traceback" in told:
        outcome, text = "BAD", "a traceback on the console"
    if TOKEN.encode() in told or any(TOKEN in file.read_text(errors="replace") for file in written(place)):
        outcome, text = "BAD", "a token on the console, or in a file"
    if state_of(place) != before:
        outcome, text = "BAD", f"files of the user changed: {changes(before, state_of(place))}; {text}"
    if (place / "ran").exists():
        outcome, text = "BAD", "code of the input was run"
    text = (text + "\n" + trail * trace).strip().replace(str(place), "…")
    return {"what": made.what, "class": outcome, "text": text.encode("utf-8", "backslashreplace").decode()}


def how_it_ends(made: Made, place: Path) -> tuple[str, str, str]:
    """(class, text, traceback) of using an input."""
    from finetune.errors import FinetuneError

    try:
        skipped = made.act()
        sys.stdout.flush()
        return ("skip", f"{skipped} left out", "") if skipped else ("fine", "", "")
    except Hang:
        return "BAD", f"no end within {made.limit} s", traceback.format_exc()
    except Reached:
        return "fine", "training would begin", ""
    except FinetuneError as error:
        why = unclear(str(error), made.names)
        return ("BAD", f"{why}: {error}", traceback.format_exc()) if why else ("error", str(error), "")
    except SystemExit as stopped:
        sys.stderr.flush()
        text = (place / "stderr").read_text(errors="replace").strip()
        if stopped.code in (0, None):
            return "fine", "", ""
        why = unclear(text, made.names) if stopped.code == 2 else f"status {stopped.code}"
        return ("BAD", f"{why}: {text[-600:]}", traceback.format_exc()) if why else ("error", text, "")
    except BaseException as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/finetune/" in frame.filename]
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
        return "BAD", f"{type(error).__name__} in {where}: {str(error)[:300]}", traceback.format_exc()


def in_a_shell(how: str, words: tuple[str, ...]) -> int:
    """Give a command line to a new process; where training would begin, it trains."""
    program = ["recipes/image_classification.py"] if how == "recipe" else ["-m", "finetune.verbs_cli"]
    done = subprocess.run([sys.executable, *program, *words], cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)
    return 0


def unclear(text: str, names: tuple[str, ...]) -> str:
    """What an error lacks; "" where it has everything."""
    if not text.strip():
        return "an error without words"
    if len(text) > 8000:
        return f"an error of {len(text)} characters"
    if not ADVICE.search(text):
        return "no advice"
    return "" if any(name in text for name in names) else f"names none of {', '.join(names)}"[:300]


def written(place: Path) -> list[Path]:
    """Files of text that the run wrote."""
    found = (path for path in (place / "out").rglob("*") if path.suffix in (".json", ".html", ".md", ".jsonl", ".csv"))
    return [path for path in found if path.is_file()]


def state_of(place: Path) -> dict[str, str]:
    """Each file of the user with a digest of it; in the working folder there should be none."""
    found = {}
    for top in ("in", "cwd"):
        for folder, folders, files in os.walk(place / top):
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                status = os.lstat(path)
                plain = os.path.isfile(path) and not os.path.islink(path)
                content = Path(path).read_bytes() if plain else b""
                content = os.fsencode(os.readlink(path)) if os.path.islink(path) else content
                found[path] = f"{status.st_mode} {hashlib.blake2b(content, digest_size=12).hexdigest()}"
    return found


def changes(before: dict[str, str], after: dict[str, str]) -> str:
    """Names of what differs."""
    return ", ".join(
        sorted(Path(key).name for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    )


# What good inputs are made of


def prepare(scratch: Path) -> None:
    """Import everything, and make good inputs, in a process of its own: one with threads cannot be forked safely."""
    os.environ |= {"HF_HOME": str(scratch / "hf"), "HOME": str(scratch / "home"), "TMPDIR": str(scratch)}
    os.environ["MPLCONFIGDIR"] = str(scratch / "matplotlib")
    (scratch / "home").mkdir()
    import accelerate  # noqa: F401
    import matplotlib.font_manager  # noqa: F401  # finds the fonts, which takes a while
    import torch

    import tests.tiny  # noqa: F401

    torch.set_num_threads(1)
    pid = os.fork()
    if pid == 0:
        status = 1
        with open(scratch / "log", "w") as log, suppress(BaseException):
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                make_good(scratch / "base")
                status = 0
            except BaseException:
                traceback.print_exc()
        os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"the good inputs cannot be made\n{(scratch / 'log').read_text()[-3000:]}")


def make_good(base: Path) -> None:
    """Pictures, tables, checkpoints, two runs that ended and one that did not."""
    import numpy as np
    from PIL import Image

    import finetune
    from finetune.train.trainer import Trainer
    from tests.tiny import bert_folder, timm_folder, vit_folder

    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for label, colour in (("blue", (40, 60, 200)), ("green", (40, 180, 60)), ("red", (200, 50, 40))):
            (base / "photos" / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(colour, 60, (24, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(base / "photos" / split / label / f"{i}.png")
    timm_folder(base / "timm", "test_resnet", cfg={"input_size": [3, 32, 32]})
    bert_folder(base / "bert", ["bad", "good"])
    vit_folder(base / "vit")
    (base / "reviews.csv").write_text(as_csv(REVIEWS))
    pictures, texts = finetune.load_images(base / "photos"), finetune.load_table(base / "reviews.csv")
    finetune.fit(pictures, base / "timm", out=base / "run", **runs.OPTIONS).write_report()
    finetune.fit(texts, base / "bert", out=base / "texts", **runs.OPTIONS).write_report()
    save = Trainer.save_checkpoint

    def stop(self: Any, *given: Any, **named: Any) -> Any:
        save(self, *given, **named)
        if self.progress.step >= 3:
            raise Reached

    Trainer.save_checkpoint = stop  # type: ignore[method-assign]
    with suppress(Reached):
        finetune.fit(base / "photos", base / "timm", out=base / "unfinished", save_steps=1, **runs.OPTIONS)
    assert any((base / "unfinished" / "checkpoints").iterdir())


if __name__ == "__main__":
    raise SystemExit(main())
