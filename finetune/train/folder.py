"""A run folder and what is asked of the run go in; a folder that may be written to comes out, or an error that says
why not."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import IO, Any

from finetune.errors import RunError
from finetune.train.checkpoint import to_disk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RECORD = "run.json"
LOCK = ".finetune-lock"  # a name that nobody else has: the folder may turn out to be somebody's data
# What a run and the verbs on it write there.
OURS = {
    RECORD, "steps.jsonl", "left_out.csv", "checkpoints", "cache", "predictions", "model", "adapter", "report.html",
    "plots", "model.onnx", "model.onnx.data", "tensorboard",
}  # fmt: skip
_HELD: dict[Path, IO[str]] = {}


def open_folder(
    folder: Path, identity: dict[str, Any], *, overwrite: bool = False, resume_anyway: bool = False
) -> bool:
    """Make `folder` ready for the run that `identity` describes; whether an unfinished run of just this kind is there
    to go on.

    Args:
        folder: Created when missing.
        identity: What makes two runs the same run: data fingerprint, backbone, settings, plan, seed. Plain data.
        overwrite: Empty a folder that holds another run, or a finished one.
        resume_anyway: Go on with an unfinished run that differs.

    Raises:
        RunError: The folder cannot be written to, holds something that is not a run, or a run that is finished or
            another.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # the latter of a zero byte in the name
        said = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{folder}: cannot be made ({said}); give another folder with --out") from None
    if not os.access(folder, os.W_OK | os.X_OK) or not _writable(folder):
        raise RunError(f"{folder}: cannot be written to; give another folder with --out, or mend its permissions")
    content = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if not content:
        return False
    if not (folder / RECORD).is_file():
        raise RunError(
            f"{folder}: holds files that are not of a run ({content[0].name}); give another folder with --out"
        )
    try:
        record = json.loads((folder / RECORD).read_text())
    except (ValueError, RecursionError):
        record = {}
    record = record if isinstance(record, dict) else {}
    before = record.get("identity", {})
    before = before if isinstance(before, dict) else {}
    different = [
        f"{key} {_short(before.get(key))} -> {_short(value)}"
        for key, value in json.loads(json.dumps(identity)).items()
        if before.get(key) != value
    ]
    running = record.get("status") == "running"
    if running and (not different or (resume_anyway and not overwrite)):
        for leftover in (*folder.glob(".model.new-*"), *folder.glob(".model.old-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        return True
    if not overwrite:
        what = (
            f"another run ({'; '.join(different[:4])})"
            if different
            else f"a run that is {record.get('status', 'damaged')}"
        )
        ways = ["give another folder with --out", "replace it with --overwrite"]
        ways += ["go on with it all the same with --resume-anyway"] if running else []
        raise RunError(f"{folder}: holds {what}; {', '.join(ways[:-1])}, or {ways[-1]}")
    others = [path.name for path in content if path.name not in OURS]
    if others:
        raise RunError(
            f"{folder}: beside the run there are files that are not of it ({', '.join(others[:3])}); move them out, or "
            "give another folder with --out"
        )
    for path in content:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return False


def take(folder: Path) -> None:
    """Keep other processes from writing to a folder until `release`, or until this process has ended, however it did.

    A launcher that is killed leaves its processes behind, still at work. Where the file system knows no locks, nothing
    is kept.

    Raises:
        RunError: Another process has it, or it cannot be made.
    """
    place = folder.absolute()
    if fcntl is None or place in _HELD:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except (OSError, ValueError):
        return  # `open_folder` says what is wrong with it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another"
        file.close()
        raise RunError(
            f"{folder}: process {holder} is writing to it; wait until it ends, end it, or give another with --out"
        ) from None
    except OSError:
        file.close()
        return
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _HELD[place] = file


def release(folder: Path) -> None:
    """Let others write to a folder that `take` took."""
    file = _HELD.pop(folder.absolute(), None)
    if file is not None:
        (folder / LOCK).unlink(missing_ok=True)
        file.close()


def read_record(folder: Path) -> dict[str, Any]:
    """The content of `run.json`."""
    return json.loads((folder / RECORD).read_text())


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `run.json` beside its place and rename it: a reader never sees half of one."""
    beside = folder / f".{RECORD}"
    try:
        beside.write_text(json.dumps(_finite(record), indent=2, default=str, allow_nan=False) + "\n")
        to_disk(beside)
    except OSError as error:
        why = f"cannot be written ({error.strerror}); make room, and give the same command again to go on"
        raise RunError(f"{folder / RECORD}: {why}") from None
    beside.rename(folder / RECORD)


def _finite(value: Any) -> Any:
    """JSON has no word for numbers that are not finite; None stands for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _writable(folder: Path) -> bool:
    # A file system that is mounted read-only, or a full one, shows itself only in the attempt; so does any folder to
    # root.
    probe = folder / ".finetune-write-test"
    try:
        probe.write_text("")
        probe.unlink()
    except OSError:
        return False
    return True


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
