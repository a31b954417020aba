"""The errors that people see: each names the file, row or option, what is wrong, and what to do about it."""

import re

SECRET = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{8,}|(?<=://)[^/@\s]+(?=@)")  # tokens of the Hub; name:password@


def without_secrets(text: str) -> str:
    """A text that may be kept and shown: whatever looks like a token or a password in an address is gone."""
    return SECRET.sub("***", text)


class FinetuneError(Exception):
    """Base of every error that is meant for the person at the keyboard; the command line prints it without a
    traceback. What is said in it may come from the command line or from a server, so it is said without secrets."""

    def __init__(self, *said: object) -> None:
        super().__init__(*(without_secrets(each) if isinstance(each, str) else each for each in said))


class DataError(FinetuneError):
    """The data cannot be read, or training on it would be meaningless."""


class BackboneError(FinetuneError):
    """The backbone is unknown, unsafe to load, or does not fit the task."""


class PlanError(FinetuneError):
    """Settings, layer groups or stages contradict each other."""


class RunError(FinetuneError):
    """The run folder cannot be used, or training cannot go on."""
