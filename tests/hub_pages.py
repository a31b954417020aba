"""The pages of the stand-in Hub: a request and the one who makes it go in; what the Hub would answer comes out."""

import base64
import json
import re
from collections.abc import Callable
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs

from tests.hub_store import Account, Refused, Repository, card_errors, card_head, git_oid, is_large

KINDS = {"models": "", "datasets": "datasets/"}


class Pages(BaseHTTPRequestHandler):
    """One method a page. It returns the content of a 200 answer, or says its answer itself and returns None."""

    server: Any
    body: bytes
    query: dict[str, list[str]]

    def routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        name, rest = r"([\w.-]+/[\w.-]+)", "(.+)"
        return [
            ("POST", "/api/repos/create", self.create),
            ("POST", "/api/validate-yaml", self.validate),
            ("GET", "/api/whoami-v2", self.who),
            ("POST", f"/api/(models|datasets)/{name}/preupload/{rest}", self.preupload),
            ("POST", f"/api/(models|datasets)/{name}/commit/{rest}", self.commit),
            ("POST", f"/api/(models|datasets)/{name}/branch/{rest}", self.branch),
            ("POST", f"/api/(models|datasets)/{name}/paths-info/{rest}", self.paths),
            ("GET", f"/api/(models|datasets)/{name}/tree/([^/]+)(?:/{rest})?", self.tree),
            ("GET", f"/api/(models|datasets)/{name}(?:/revision/{rest})?", self.info),
            ("POST", rf"/(datasets/)?{name}\.git/info/lfs/objects/batch", self.batch),
            ("POST", rf"/(datasets/)?{name}\.git/verify", self.verify),
            ("PUT", r"/store/(models|datasets)/([\w.-]+/[\w.-]+)/(\w{64})(?:/(\d+))?", self.store),
            ("POST", r"/store/(models|datasets)/([\w.-]+/[\w.-]+)/(\w{64})", self.complete),
            ("GET", r"/cdn/(models|datasets)/([\w.-]+/[\w.-]+)/(\w{64})", self.cdn),
            ("GET", f"/(datasets/)?{name}/resolve/([^/]+)/{rest}", self.resolve),
        ]

    def say(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        """Send an answer; JSON, unless it is bytes."""
        raise NotImplementedError

    # Who asks, and for what

    def account(self) -> Account | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.server.accounts:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.server.accounts.get(token)

    def find(self, kind: str, name: str, *, write: bool = False, content: bool = False) -> Repository:
        """The repository, if the one who asks may see it, read its files (`content`), write to it."""
        account, repository = self.account(), self.server.repositories.get((kind, name))
        owner = account is not None and account.owns(name)
        if repository is None or (repository.private and not owner):
            raise Refused(401 if account is None else 404, "Repository not found", "RepoNotFound")
        if content and repository.gated and not owner:
            if account is None:
                message = f"Access to {name} is restricted. You must have access to it and be authenticated"
                raise Refused(401, message, "GatedRepo")
            if account.name not in repository.allowed:
                raise Refused(
                    403, f"Access to {name} is restricted and you are not in the authorized list", "GatedRepo"
                )
        if write and (account is None or not owner or not account.writes):
            raise Refused(403, f"You have no right to write to {name} with this token")
        return repository

    def asks_request(self) -> bool:
        """Whether a pull request is wanted, which those may make who can only read."""
        return self.query.get("create_pr") == ["1"]

    # The pages

    def create(self) -> dict[str, Any]:
        asked, account = json.loads(self.body), self.account()
        name = f"{asked.get('organization') or (account.name if account else '')}/{asked['name']}"
        if account is None or not account.writes or not account.owns(name):
            raise Refused(401 if account is None else 403, f"You have no right to create {name} with this token")
        kind = f"{asked.get('type') or 'model'}s"
        url = f"{self.server.url}/{KINDS[kind]}{name}"
        if (kind, name) in self.server.repositories:
            self.say(409, {"error": f"You already created this {kind[:-1]} repo", "url": url})
            return None  # type: ignore[return-value]
        private = asked.get("visibility") == "private" or asked.get("private", False)  # newer and older clients
        self.server.repository(name, kind, private=private)
        return {"url": url, "id": name}

    def validate(self) -> dict[str, Any] | None:
        content = json.loads(self.body)["content"]
        errors = [{"message": error} for error in card_errors(content)]
        warnings = [] if card_head(content) else [{"message": "empty or missing yaml metadata in repo card"}]
        self.say(400 if errors else 200, {"errors": errors, "warnings": warnings})
        return None

    def who(self) -> dict[str, Any]:
        account = self.account()
        if account is None:
            raise Refused(401, "Invalid username or password.")
        return {"type": "user", "name": account.name, "orgs": [{"name": name} for name in account.organisations]}

    def preupload(self, kind: str, name: str, revision: str) -> dict[str, Any]:
        repository = self.find(kind, name, write=not self.asks_request())
        commit, files = repository.resolve(revision), []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            large = is_large(path, file["size"], base64.b64decode(file["sample"]))
            there = commit.files.get(path)
            oid = None if there is None else sha256(there).hexdigest() if path in commit.large else git_oid(there)
            files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def batch(self, prefix: str | None, name: str) -> dict[str, Any]:
        kind = "datasets" if prefix else "models"
        repository, objects = self.find(kind, name), []
        for blob in json.loads(self.body)["objects"]:
            if blob["oid"] in repository.blobs:
                objects.append(blob)
                continue
            href, size = f"{self.server.url}/store/{kind}/{name}/{blob['oid']}", self.server.part_size
            parts = -(-blob["size"] // size) if size else 0
            header = (
                {"chunk_size": str(size)} | {f"{i + 1:05d}": f"{href}/{i + 1}" for i in range(parts)} if size else {}
            )
            verify = {"href": f"{self.server.url}/{KINDS[kind]}{name}.git/verify"}
            objects.append(blob | {"actions": {"upload": {"href": href, "header": header}, "verify": verify}})
        return {"transfer": "multipart" if self.server.part_size else "basic", "objects": objects}

    def store(self, kind: str, name: str, oid: str, part: str | None) -> None:
        if part:
            self.server.parts[oid, int(part)] = self.body
        else:
            self.keep(kind, name, oid, self.body)
        self.say(200, b"", {"ETag": f'"{git_oid(self.body)}"'})

    def complete(self, kind: str, name: str, oid: str) -> dict[str, Any]:
        parts = [self.server.parts.get((oid, part["partNumber"])) for part in json.loads(self.body)["parts"]]
        if None in parts:
            raise Refused(400, "A part is missing")
        self.keep(kind, name, oid, b"".join(part for part in parts if part is not None))
        return {}

    def keep(self, kind: str, name: str, oid: str, content: bytes) -> None:
        if sha256(content).hexdigest() != oid:
            raise Refused(400, "The content does not match the checksum")
        self.server.repositories[kind, name].blobs[oid] = content

    def verify(self, prefix: str | None, name: str) -> dict[str, Any]:
        repository, asked = self.find("datasets" if prefix else "models", name), json.loads(self.body)
        if len(repository.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "No such blob")
        return {}

    def commit(self, kind: str, name: str, revision: str) -> dict[str, Any]:
        repository = self.find(kind, name, write=not self.asks_request())
        lines = [json.loads(line) for line in self.body.splitlines()]
        made = repository.commit(lines, revision, as_request=self.asks_request())
        page = f"{self.server.url}/{KINDS[kind]}{name}"
        answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{page}/commit/{made.oid}", "hookOutput": ""}
        if self.asks_request():
            answer["pullRequestUrl"] = f"{page}/discussions/{repository.requests}"
        return answer

    def branch(self, kind: str, name: str, branch: str) -> dict[str, Any]:
        repository = self.find(kind, name, write=True)
        if branch in repository.refs:
            raise Refused(409, "Reference already exists")
        repository.refs[branch] = repository.resolve(json.loads(self.body).get("startingPoint") or "main").oid
        return {}

    def info(self, kind: str, name: str, revision: str | None) -> dict[str, Any]:
        repository = self.find(kind, name)
        commit = repository.resolve(revision or "main")
        head = card_head(commit.files.get("README.md", b"").decode())
        tags = [*head.get("tags", []), *(f"license:{head['license']}" for _ in range(1) if head.get("license"))]
        return {
            "id": name, "private": repository.private, "gated": "auto" if repository.gated else False, "tags": tags,
            "sha": commit.oid, "siblings": [{"rfilename": path} for path in sorted(commit.files)], "cardData": head,
            "library_name": head.get("library_name"), "pipeline_tag": head.get("pipeline_tag"), "downloads": 0,
            "lastModified": "2026-11-24T00:00:00.000Z", "createdAt": "2026-11-24T00:00:00.000Z",
        }  # fmt: skip

    def tree(self, kind: str, name: str, revision: str, folder: str | None) -> list[dict[str, Any]]:
        commit, prefix = self.find(kind, name).resolve(revision), f"{folder}/" if folder else ""
        recursive, entries = self.query.get("recursive", ["false"])[0].lower() == "true", {}
        for path in sorted(commit.files):
            inner = path.removeprefix(prefix)
            if path.startswith(prefix):
                for depth in range(1, inner.count("/") + 1):
                    above = prefix + "/".join(inner.split("/")[:depth])
                    if recursive or depth == 1:
                        entries[above] = {"type": "directory", "path": above, "oid": git_oid(above.encode()), "size": 0}
                if recursive or "/" not in inner:
                    entries[path] = commit.entry(path)
        if prefix and not entries:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return list(entries.values())

    def paths(self, kind: str, name: str, revision: str) -> list[dict[str, Any]]:
        commit, asked = self.find(kind, name).resolve(revision), self.body.decode()
        wanted = json.loads(asked)["paths"] if asked.startswith("{") else parse_qs(asked)["paths"]
        wanted = [wanted] if isinstance(wanted, str) else wanted
        folders = [path for path in wanted if any(file.startswith(f"{path}/") for file in commit.files)]
        found = [{"type": "directory", "path": path, "oid": git_oid(path.encode()), "size": 0} for path in folders]
        return found + [commit.entry(path) for path in wanted if path in commit.files]

    def resolve(self, prefix: str | None, name: str, revision: str, path: str) -> None:
        kind = "datasets" if prefix else "models"
        commit = self.find(kind, name, content=True).resolve(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        content, entry = commit.files[path], commit.entry(path)
        if path in commit.large:
            digest = entry["lfs"]["oid"]
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
            location = {"Location": f"{self.server.storage}/{kind}/{name}/{digest}"}
            return self.say(302, b"", headers | linked | location)
        self.ranged(content, headers | {"ETag": f'"{entry["oid"]}"'})

    def cdn(self, kind: str, name: str, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise Refused(400, "Only one auth mechanism allowed")  # a token must not leave the Hub
        self.ranged(self.server.repositories[kind, name].blobs[oid], {"ETag": f'"{oid}"'})

    def ranged(self, content: bytes, headers: dict[str, str]) -> None:
        """The content, or what of it a Range header asks for."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not found:
            return self.say(200, content, headers | {"Accept-Ranges": "bytes"})
        start, end = int(found[1]), int(found[2] or len(content) - 1)
        headers |= {"Content-Range": f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"}
        self.say(206, content[start : end + 1], headers)
