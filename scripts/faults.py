# ruff: noqa: E501
"""Takes the handling of each fault and trap out of the code, one at a time, and sees whether its test fails.

    python scripts/faults.py                     # all of them, about twenty minutes of a core
    python scripts/faults.py --only checkpoint   # those whose name has this in it

Works on a copy of the project. A test that still passes without what it is about is worth nothing: ends with 1 then,
and where the code has changed so far that a handling is not found.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "faults.json"


@dataclass(frozen=True)
class Fault:
    """What can go wrong, the code that deals with it, what is left when that is taken out, and the test."""

    name: str
    file: str
    handling: str
    without: str
    test: str


def found_in(name: str, test: str, file: str, handling: str, without: str) -> Fault:
    return Fault(name, f"finetune/{file}", handling, without, f"tests/{test}")


FAULTS = [
    # Many devices
    found_in("a launcher that starts one process whatever it is asked for", "train/test_processes.py",
             "train/processes.py", "if asked == 1 and (launched := _processes_of_launcher()) > 1:",
             "if asked == 1 and (launched := _processes_of_launcher()) > 99:"),
    found_in("a launcher that did not join the processes", "train/test_processes.py",
             "train/processes.py", "if asked != accelerator.num_processes:", "if False:"),
    found_in("DeepSpeed, which would train otherwise", "train/test_processes.py",
             "train/processes.py", 'if _flag("ACCELERATE_USE_DEEPSPEED"):', "if False:"),
    found_in("FSDP of version 1", "train/test_processes.py",
             "train/processes.py", 'if sharded and os.environ.get("FSDP_VERSION", "1") != "2":', "if False:"),
    found_in("groups that open after the wrap for several processes", "train/test_processes.py",
             "train/processes.py", "        bare = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)\n",
             "        if model is not self.accelerator.unwrap_model(model):\n            return model\n        bare = model\n"),
    found_in("weights that drift apart", "train/test_processes.py",
             "train/processes.py", "if not torch.allclose(other, sums, rtol=1e-6, atol=1e-6):", "if False:"),
    found_in("out of memory on one process of several", "train/test_memory.py",
             "train/memory.py", "if processes.total(failed) == 0:", "if failed == 0:"),
    found_in("out of memory with one example at a time", "train/test_memory.py",
             "train/trainer.py", "if found is None and not self.progress.recompute:", "if False:"),
    found_in("an uneven last batch of several processes", "train/test_processes.py",
             "train/trainer.py", "shares = [part for rows in order[offset:end] for part in _split(rows, parts)[mine]]",
             "shares = [rows[: len(rows) // parts] for rows in order[offset:end] for _ in range(accumulation)]"),
    found_in("micro-batches of unequal size", "train/test_trainer.py",
             "train/trainer.py", "* (count / total)", "/ len(micro_batches)"),
    found_in("rows that several processes count twice", "train/test_evaluate.py",
             "train/processes.py", "mine = batches[self.rank :: self.count]", "mine = batches[:]"),
    # A run that goes on
    found_in("random numbers that the way here has drawn", "train/test_resume.py",
             "train/trainer.py", "        torch.manual_seed((1_000_003 * self.seed + self.progress.step)", "        ((1_000_003 * self.seed + self.progress.step)"),
    found_in("a kill in the middle of an epoch", "train/test_resume.py",
             "train/trainer.py", "for rows in order[offset:end] for part", "for rows in order[0 : end - offset] for part"),
    found_in("the optimizer's moments", "train/test_resume.py",
             "train/resuming.py", "    checkpoint.restore_optimizer(trainer.optimizer, optimizer)\n", ""),
    found_in("the average of the weights", "train/test_resume.py",
             "train/resuming.py", 'if "average" in weights:', "if False:"),
    found_in("lines of the log behind the last checkpoint", "train/test_resume.py",
             "train/resuming.py", 'cut(trainer.folder / "steps.jsonl", trainer.progress.step)', "pass"),
    found_in("a stage that was shortened before the kill", "train/test_trainer.py",
             "train/resuming.py", "    trainer.plan = trainer.progress.applied_to(trainer.planned)\n", ""),
    found_in("a kill while a checkpoint is written", "train/test_checkpoint.py",
             "train/checkpoint.py", 'beside = folder / f".{target.name}"', "beside = target"),
    found_in("a checkpoint that is damaged", "train/test_checkpoint.py",
             "train/checkpoint.py", "_checksum(path / name) != checksum", "False"),
    found_in("a disk that is full of checkpoints", "train/test_checkpoint.py",
             "train/checkpoint.py", 'kept = sorted(path for path in folder.glob("step-*") if path <= target)[-2:]', 'kept = sorted(folder.glob("step-*"))'),
    found_in("checkpoints of what was given up", "train/test_checkpoint.py",
             "train/checkpoint.py", "if path <= target)[-2:]", ")[-2:]"),
    found_in("a full disk under a checkpoint", "train/test_resume.py",
             "train/resuming.py", "    except OSError as error:\n        trainer.say", "    except ZeroDivisionError as error:\n        trainer.say"),
    found_in("a kill while run.json is written", "train/test_folder.py",
             "train/folder.py", 'beside = folder / f".{RECORD}"', "beside = folder / RECORD"),
    found_in("SIGTERM and Ctrl-C", "train/test_resume.py",
             "train/trainer.py", "        if self.stop.signal:\n            return STOP\n", ""),
    found_in("a second Ctrl-C", "train/test_resume.py",
             "train/stopping.py", "        signal.signal(number, before[signal.Signals(number)])\n", ""),
    found_in("Ctrl-C that a shell has ignored", "train/test_resume.py",
             "train/stopping.py", "if signal.getsignal(n) not in (signal.SIG_IGN, None)", ""),
    found_in("another run in the folder", "train/test_folder.py",
             "train/folder.py", "if running and (not different or (resume_anyway and not overwrite)):", "if running:"),
    found_in("a process that still writes to the folder", "train/test_folder.py",
             "train/folder.py", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
    found_in("files of the user in the folder", "train/test_folder.py",
             "train/folder.py", "    if others:\n", "    if False:\n"),
    found_in("a folder that cannot be written to", "train/test_folder.py",
             "train/folder.py", "    except OSError:\n        return False\n    return True", "    except OSError:\n        return True\n    return True"),
    found_in("a log that can no longer be written", "train/test_steplog.py",
             "train/steplog.py", "        except OSError as error:\n            self.say", "        except ZeroDivisionError as error:\n            self.say"),
    # Training
    found_in("a gradient that is no number", "train/test_trainer.py",
             "train/trainer.py", "useless = ~torch.isfinite(norm + loss)", "useless = torch.zeros((), dtype=torch.bool)"),
    found_in("no usable gradient any more", "train/test_trainer.py",
             "train/steplog.py", "if progress.skipped_in_a_row >= SKIPS:", "if False:"),
    found_in("a loss that rises far", "train/test_trainer.py",
             "train/steplog.py", "if progress.smooth_loss > RISE * max(progress.first_loss, UNINFORMED):", "if False:"),
    found_in("a rate that is too high for the weights to go back to", "train/test_trainer.py",
             "train/trainer.py", '"factor": SLOWER,', '"factor": 1.0,'),
    found_in("a rewind before a kill", "train/test_trainer.py",
             "train/trainer.py", 'self.say(f"Back      {why}: this stage again from {best}, at {SLOWER:g} of the rate")\n        self.save_checkpoint()', "pass"),
    found_in("images that vanish under way", "train/test_trainer.py",
             "train/trainer.py", "if len(lost) > max(1.0, UNREADABLE_SHARE * rows):", "if False:"),
    found_in("a picture that cannot be read any more", "data/test_loaders.py",
             "data/loaders.py", "        except (BadImage, OSError):\n            for row", "        except ZeroDivisionError:\n            for row"),
    found_in("a loading process that dies", "data/test_loaders.py",
             "data/loaders.py", "            except (RuntimeError, OSError, EOFError) as error:", "            except ZeroDivisionError as error:"),
    found_in("a full disk under the replay", "train/test_replaying.py",
             "train/replaying.py", "    except OSError as error:", "    except ZeroDivisionError as error:"),
    found_in("a network that cannot be replayed", "train/test_replaying.py",
             "train/replaying.py", "except (NoBoundary, NotEqual, Refused) as error:",
             "except ZeroDivisionError as error:"),
    found_in("a network that fails when run in parts", "train/test_replaying.py",
             "train/replaying.py",
             "except (RuntimeError, IndexError, TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:",
             "except ZeroDivisionError as error:"),
    # The Hub
    found_in("a Hub that is busy", "output/test_hub.py",
             "model/calls.py", "PASSING = (408, 429, 500, 502, 503, 504)", "PASSING = (499,)"),
    found_in("a connection that breaks in an upload", "output/test_hub.py",
             "model/calls.py", "else cut and is_broken_line(error)", "else False"),
    # Security
    found_in("pickles among the weights", "model/test_backbones.py",
             "model/fetch.py", "    if not trust.pickles:\n        _refuse_pickle(name, files)\n", ""),
    found_in("a pickle in a checkpoint of a run", "test_security.py",
             "train/checkpoint.py", "weights_only=True", "weights_only=False"),
    found_in("a table that leads out of its folder", "test_security.py",
             "data/checks.py", 'return path, f"path leads outside the data folder: {value}"', 'return path, ""'),
    found_in("a saved data set that leads elsewhere", "test_security.py",
             "data/sources.py", r'if file in (".", "..") or re.search(r"[/\\]", file):', "if False:"),
    found_in("a name in a checkpoint that leads elsewhere", "train/test_checkpoint.py",
             "train/checkpoint.py", "Path(name).name != name or ", ""),
    found_in("a picture that would fill the memory", "data/test_checks.py",
             "data/images.py", "    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:\n        raise BadImage(TOO_LARGE)\n", ""),
    found_in("a line that would fill the memory", "test_security.py",
             "data/images.py", "if max(width, height) > STRETCHED * min(width, height):", "if False:"),
    found_in("a pipe that would be waited for", "test_security.py",
             "data/images.py", "and not os.path.isfile(source):", "and not os.path.exists(source):"),
    found_in("pictures that other programs run", "test_security.py",
             "data/images.py", "if image.format in RUN:", "if False:"),
    found_in("a token in an error", "test_security.py",
             "errors.py", 'return SECRET.sub("***", text)', "return text"),
    found_in("a token in a command line", "test_security.py",
             "commandline.py", "        if ended.code == 2 and secret and first:", "        if False:"),
    found_in("markup in class names and texts", "test_security.py",
             "output/report.py", "autoescape=True", "autoescape=False"),
    # Shards
    found_in("a shard that is damaged", "data/test_shards.py",
             "data/shards.py", "except (tarfile.TarError, EOFError, ValueError, OSError) as error:", "except ZeroDivisionError as error:"),
    found_in("a link in a shard", "data/test_shards.py",
             "data/shards.py", "not member.isfile() or ", ""),
    found_in("a network that is away for a moment", "data/test_shards.py",
             "data/shards.py", "if attempt == TRIES - 1:", "if True:"),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the name of a fault, or of its test's file")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only in fault.name or options.only in fault.test]
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", ".*_cache"))
        for fault in faults:
            outcome = tried(fault, copy)
            table.append({"fault": fault.name, "file": fault.file, "test": outcome[1], "result": outcome[0]})
            print(f"{outcome[0]:<8} {fault.name}: {outcome[1]}", flush=True)
    kept = [row for row in table if row["result"] != "fails"]
    print(f"{len(table) - len(kept)} of {len(table)} tests fail without what they are about")
    if not options.only:
        RESULTS.write_text(json.dumps({"script": "scripts/faults.py", "rows": table}, indent=1) + "\n")
    return int(bool(kept))


def tried(fault: Fault, copy: Path) -> tuple[str, str]:
    """("fails", the first test that does), or what is wrong instead."""
    file = copy / fault.file
    source = file.read_text()
    if not fault.handling or source.count(fault.handling) < 1:
        return "MISSING", f"{fault.file} has no {fault.handling[:60]!r}"
    try:
        file.write_text(source.replace(fault.handling, fault.without))
        compile(file.read_text(), str(file), "exec")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-m", "", "-p", "no:cacheprovider", fault.test],
            cwd=copy, capture_output=True, text=True, timeout=600,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    except SyntaxError as error:
        return "BROKEN", f"what is left is no program: {error}"
    except subprocess.TimeoutExpired:
        return "fails", f"{fault.test} does not end"
    finally:
        file.write_text(source)
    failed = [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode != 1 or not failed:
        return "PASSES" if done.returncode == 0 else "BROKEN", fault.test
    return "fails", failed[0]


if __name__ == "__main__":
    sys.exit(main())
