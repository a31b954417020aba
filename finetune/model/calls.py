"""A call to the Hub goes in; its answer comes out, after waits where the Hub is busy, or why there is none.

huggingface_hub tries uploads and downloads again by itself, but not the small calls around them: these come here.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Container
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError

T = TypeVar("T")
PASSING = (408, 429, 500, 502, 503, 504)  # statuses of a Hub that is busy, or ill for a moment
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between tries, where the Hub does not say how long
LONGEST = 300.0  # seconds; who is asked to wait longer should hear so, and come back

logger = logging.getLogger("finetune")


def patiently(call: Callable[[], T], *, on: Container[int] = PASSING, cut: bool = True) -> T:
    """Return `call()`, tried again after a wait where the Hub was busy or the connection broke.

    Args:
        call: What to do; it must do no harm twice.
        on: Statuses after which to try again.
        cut: Whether to try again after a connection that broke, when the work may or may not be done.

    Raises:
        Whatever `call` raises: at once where waiting is of no use, else after the last try.
    """
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            if not (status(error) in on if http_error(error) is not None else cut and is_broken_line(error)):
                raise
            seconds = asked_to_wait(error) or wait
            if seconds > LONGEST:
                raise
            logger.warning("the Hub: %s; trying again in %g s", in_a_line(error), seconds)
            time.sleep(seconds)
    return call()


def is_broken_line(error: BaseException) -> bool:
    """Whether there was no answer, or a proxy's page (which is no JSON) in place of the Hub's."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError | json.JSONDecodeError):
        cause = cause.__cause__
    return cause is not None and not isinstance(cause, HfHubHTTPError)


def http_error(error: BaseException) -> HfHubHTTPError | None:
    """The Hub's answer among the causes of an error, if it answered."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    return cause


def status(error: BaseException) -> int | None:
    """HTTP status of the Hub's answer among the causes of an error; None where there was no answer."""
    found = http_error(error)
    return found.response.status_code if found is not None else None


def asked_to_wait(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait for, by `Retry-After` (seconds or a date) or by `RateLimit`."""
    found = http_error(error)
    if found is None:
        return None
    given = str(found.response.headers.get("Retry-After", "")).strip()
    if given.isdigit():
        return float(given)
    if given:
        try:
            return max(0.0, (parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds())
        except (ValueError, TypeError):
            return None
    limit = re.search(r"\br=0\b.*?\bt=(\d+)", str(found.response.headers.get("RateLimit", "")))
    return float(limit[1]) if limit else None


def in_a_line(error: BaseException) -> str:
    """What an error says, in a line without secrets: no token, and no signature from the end of an address."""
    found, deepest = http_error(error), error
    while deepest.__cause__ is not None:
        deepest = deepest.__cause__
    if found is not None:
        text = f"{found.response.status_code}: {found.server_message or found}"
    else:
        text = f"{type(deepest).__name__}: {deepest}" if str(deepest).strip() else type(deepest).__name__
    text = " ".join(text.split())
    token = get_token()
    if token:
        text = text.replace(token, "***")
    text = re.sub(r"\bhf_\w{6,}", "***", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)[:200]
