"""A recipe's typed function goes in; its command line comes out. Importing this costs no torch."""

import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import Any

import tyro

from finetune.errors import FinetuneError, without_secrets


def cli(main: Callable[..., Any]) -> None:
    """Run `main` with the options of the command line: names, types, defaults and help come from its signature and
    docstring.

    An error meant for the user is printed in one line, by the first process alone, and ends with status 2; a signal
    with 128 and its number, as a shell has it. A command line that cannot be read and has a token in it is not shown.
    """
    first = os.environ.get("RANK", "0") == "0"
    secret = any(without_secrets(word) != word for word in sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a console may lack a letter of a file's name, or of a class
            stream.reconfigure(errors="backslashreplace")
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not {"-h", "--help"} & set(sys.argv):
            from finetune.train.processes import start_processes

            start_processes()  # before the data is looked at, so that each looks at its share
        tyro.cli(main, console_outputs=first and not secret)
    except SystemExit as ended:
        if ended.code == 2 and secret and first:
            print(
                "error: this command line cannot be read, and is not shown as it holds a token; leave the token out, "
                "`hf auth login` keeps it, and see --help",
                file=sys.stderr,
            )
        raise
    except FinetuneError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        if first and stopped.args:
            print(f"Stopped   {stopped}", file=sys.stderr)
        sys.exit(128 + getattr(stopped, "signal", 2))
