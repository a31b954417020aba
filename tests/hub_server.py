"""A stand-in for the Hugging Face Hub on loopback: what huggingface_hub's client asks is answered as the Hub does.

It speaks what an upload and a download need: making repositories and branches, the check of a card's head, preupload,
the large-file batch with single and multi-part uploads (every blob is checked against its SHA-256), commits and pull
requests, information, trees, and files by HEAD and GET with ETag, commit and size, the large ones by a redirect to
another host. Private and gated repositories ask for tokens. `hub.fail(...)` queues faults.

    with Hub() as hub: ...  # HF_ENDPOINT=hub.url HF_HUB_DISABLE_XET=1
"""

import json
import re
import socket
import struct
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_pages import Pages
from tests.hub_store import Account, Refused, Repository


@dataclass
class Fault:
    """A rule for one kind of request: an error in place of the answer, a connection that breaks, or something that
    happens just before (`do`).

    `cut`: "request" breaks it half-way through what the client sends, "answer" once the work is done but not yet
    answered, "body" half-way through the answer.
    """

    method: str
    path: str
    status: int = 0
    cut: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "Internal error"
    code: str | None = None
    page: bytes | None = None  # answered in place of JSON, as a proxy does
    do: Callable[[], Any] | None = None
    times: int = 1
    skip: int = 0  # how many requests pass before it strikes


class Hub(ThreadingHTTPServer):
    """The server: start it by `with`. Tokens are keys of `accounts`, repositories are found by `repository(name)`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/cdn"  # another origin, as the Hub's storage is
        self.lock = threading.RLock()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.accounts = {"may-write": Account("me", organisations=("club",)), "may-read": Account("me", writes=False)}
        self.accounts["stranger"] = Account("stranger")
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.broken: list[str] = []  # mistakes of this server
        self.asked: list[tuple[str, str, int]] = []  # method, path, status; 0 for a connection that was cut
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_size: int | None = None  # bytes of a part of a multi-part upload; None for uploads in one piece

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()
        assert not self.broken, self.broken[0]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is none of the server's business."""

    def repository(self, name: str, kind: str = "models", **options: Any) -> Repository:
        """The repository of this name, made where it is not there."""
        return self.repositories.setdefault((kind, name), Repository(name, **options))

    def fail(self, method: str, path: str, status: int = 0, **options: Any) -> None:
        """Queue a fault for requests whose path has `path` (a regular expression) in it."""
        self.faults.append(Fault(method, path, status, **options))

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                        return None
                    fault.times -= 1
                    if not fault.times:
                        self.faults.remove(fault)
                    return fault
        return None

    def times(self, method: str, path: str) -> int:
        """How often this was asked."""
        return sum(asked[0] == method and re.search(path, asked[1]) is not None for asked in self.asked)


class Answer(Pages):
    server: Hub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), url.path
        fault = self.server.fault(self.command, path)
        if fault is not None and fault.cut == "request":
            self.rfile.read(int(self.headers.get("Content-Length", "0")) // 2)
            return self.cut()
        self.fault, self.body = fault, self.read_body()
        try:
            if fault is not None and fault.do is not None:
                fault.do()
            elif fault is not None and fault.page is not None:
                return self.say(fault.status, fault.page, {"Content-Type": "text/html"})
            elif fault is not None and not fault.cut:
                raise Refused(fault.status, fault.message, fault.code, **fault.headers)
            method = "GET" if self.command == "HEAD" else self.command
            for asked, pattern, work in self.routes():
                if asked == method and (found := re.fullmatch(pattern, path)):
                    with self.server.lock:
                        content = work(*(unquote(part) if part else part for part in found.groups()))
                    break
            else:
                raise Refused(404, f"No such page: {path}")
        except Refused as error:
            headers = {name.replace("_", "-"): value for name, value in error.headers.items()}
            headers |= {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
            return self.say(error.status, {"error": error.message}, headers)
        except Exception:
            self.server.broken.append(traceback.format_exc())
            return self.say(500, {"error": "a mistake of the stand-in"})
        if content is not None:
            self.say(200, content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def say(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        if self.fault is not None and self.fault.cut == "answer":
            return self.cut()
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.server.asked.append((self.command, self.path.partition("?")[0], status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.cut == "body":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            return self.cut(reset=False)
        self.wfile.write(body)

    def cut(self, reset: bool = True) -> None:
        """Break the connection, as a router that is switched off does."""
        if reset:
            self.server.asked.append((self.command, self.path.partition("?")[0], 0))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Nothing on the console: `asked` has it all."""
