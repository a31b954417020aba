"""Calls in a process that takes the stand-in for the Hub: a function and its arguments go in, the result comes out.

Where the Hub is, huggingface_hub reads when it is imported, so what talks to it runs in a process of its own: one for
all calls of a test file. Waiting is written down there and not done.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = """
import importlib, json, os, sys, time, warnings
answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
waits, sleep = [], time.sleep
time.sleep = lambda seconds: waits.append(round(float(seconds), 2)) if seconds >= 0.5 else sleep(seconds)
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # huggingface_hub's own, as it uploads
for line in sys.stdin:
    call = json.loads(line)
    os.environ.update(call["environment"])
    waits.clear()
    try:
        module, _, name = call["call"].partition(":")
        value = getattr(importlib.import_module(module), name)(*call["arguments"], **call["options"])
        said = {"value": json.loads(json.dumps(value, default=str))}
    except Exception as error:
        causes = []
        while error is not None:
            causes.append(error)
            error = error.__cause__
        said = {"error": " <- ".join(map(str, causes)), "type": type(causes[0]).__name__}
    answers.write(json.dumps({**said, "waits": waits}) + "\\n")
    answers.flush()
"""


@dataclass
class Said:
    """What a call returned, or the error that it raised, and the seconds that it wanted to wait."""

    value: Any = None
    error: str | None = None
    type: str | None = None
    waits: tuple[float, ...] = ()


class Client:
    """A process in which finetune and huggingface_hub talk to the Hub at `url`; start it by `with`."""

    def __init__(self, url: str, folder: Path, **environment: str) -> None:
        self.log, self.cache = folder / "client.log", folder / "hf"
        self.environment = os.environ | hub_environment(url, self.cache) | environment

    def __enter__(self) -> "Client":
        self.file = self.log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.file, text=True,
            env=self.environment, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait(timeout=60)
        self.process.stdout.close()  # type: ignore[union-attr]
        self.file.close()

    def call(self, function: str, *arguments: Any, token: str = "may-write", **options: Any) -> Said:
        """Call "module:function" with these arguments, which must be JSON or paths."""
        call = {"call": function, "arguments": arguments, "options": options, "environment": {"HF_TOKEN": token}}
        self.process.stdin.write(json.dumps(call, default=str) + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        assert line, self.log.read_text()[-3000:]
        return Said(**json.loads(line))

    def value(self, function: str, *arguments: Any, **options: Any) -> Any:
        """What a call returns that should not fail."""
        said = self.call(function, *arguments, **options)
        assert said.error is None, f"{said.type}: {said.error}"
        return said.value


def hub_environment(url: str, cache: Path) -> dict[str, str]:
    """Variables that send huggingface_hub to `url`, with a cache of its own."""
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
