"""A recipe's typed function goes in; its command line comes out. Importing this costs no torch."""

import os
import sys
from collections.abc import Callable
from typing import Any

import tyro

from finetune.errors import FinetuneError


def cli(main: Callable[..., Any]) -> None:
    """Run `main` with the options of the command line: names, types, defaults and help come from its signature and
    docstring.

    An error meant for the user is printed in one line, by the first process alone, and ends with status 2; a signal
    with 128 and its number, as a shell has it.
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        tyro.cli(main, console_outputs=first)
    except FinetuneError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        if first and stopped.args:
            print(f"Stopped   {stopped}", file=sys.stderr)
        sys.exit(128 + getattr(stopped, "signal", 2))
