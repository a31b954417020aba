"""The errors that people see: each names the file, row or option, what is wrong, and what to do about it."""


class FinetuneError(Exception):
    """Base of every error that is meant for the person at the keyboard; the command line prints it without a
    traceback."""


class DataError(FinetuneError):
    """The data cannot be read, or training on it would be meaningless."""


class BackboneError(FinetuneError):
    """The backbone is unknown, unsafe to load, or does not fit the task."""


class PlanError(FinetuneError):
    """Settings, layer groups or stages contradict each other."""


class RunError(FinetuneError):
    """The run folder cannot be used, or training cannot go on."""
