"""What the stand-in Hub keeps: commits, blobs and accounts go in; snapshots, object ids and verdicts on cards come out.

Rules of the real Hub that are kept here: a commit is a snapshot with a parent; large and binary files live in a store
addressed by SHA-256; a commit that names a blob that is not there is refused; so is a card whose head is not valid.
"""

import base64
import json
import re
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from typing import Any

import yaml

# What a new repository's .gitattributes sends to the large store.
LARGE = tuple(
    ".7z .arrow .bin .bz2 .ckpt .ftz .gz .h5 .joblib .mlmodel .model .msgpack .npy .npz .onnx .ot .parquet .pb .pickle "
    ".pkl .pt .pth .rar .safetensors .tar .tflite .tgz .wasm .xz .zip .zst".split()
)
# The identifiers that the Hub accepts, as its own refusal lists them (huggingface_hub issue 4218, 2026-05).
LICENCES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr "
    "mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr "
    "deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "grok2-community gemma unknown other"
).split()
RELATIONS = ("adapter", "merge", "quantized", "finetune")
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual")
HEAD = re.compile(r"^\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")


class Refused(Exception):
    """An answer other than the one asked for."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, and whether it may write."""

    name: str
    writes: bool = True
    organisations: tuple[str, ...] = ()

    def owns(self, repository: str) -> bool:
        return repository.partition("/")[0] in (self.name, *self.organisations)


@dataclass(frozen=True)
class Commit:
    """A snapshot: content by path."""

    oid: str
    parent: str | None
    title: str
    files: dict[str, bytes]
    large: frozenset[str] = frozenset()  # paths whose content is in the large store

    def entry(self, path: str) -> dict[str, Any]:
        """A file as the tree of a repository lists it."""
        content = self.files[path]
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if path in self.large:
            digest = sha256(content).hexdigest()
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
            found |= {
                "oid": git_oid(pointer),
                "lfs": {"oid": digest, "size": len(content), "pointerSize": len(pointer)},
            }
        return found


@dataclass
class Repository:
    """A model or data set with its history."""

    name: str
    private: bool = False
    gated: bool = False
    allowed: set[str] = field(default_factory=set)  # accounts that were let into a gated one
    blobs: dict[str, bytes] = field(default_factory=dict)  # the large store, by SHA-256
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    requests: int = 0

    def __post_init__(self) -> None:
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
        self.record("main", None, "initial commit", {".gitattributes": attributes.encode()}, frozenset())

    @property
    def head(self) -> Commit:
        return self.commits[self.refs["main"]]

    @property
    def files(self) -> dict[str, bytes]:
        """Files on main, without the one that every new repository has."""
        return {path: content for path, content in self.head.files.items() if path != ".gitattributes"}

    @property
    def titles(self) -> list[str]:
        """Titles of the commits on main, the oldest first, without the initial one."""
        titles, commit = [], self.head
        while commit.parent is not None:
            titles.insert(0, commit.title)
            commit = self.commits[commit.parent]
        return titles

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a pull request or an id means."""
        oid = self.refs.get(revision.removeprefix("refs/heads/"), revision)
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def record(
        self, ref: str, parent: str | None, title: str, files: dict[str, bytes], large: frozenset[str]
    ) -> Commit:
        content = "".join(f"{path}:{git_oid(data)}\n" for path, data in sorted(files.items()))
        oid = sha1(f"{parent}\n{title}\n{content}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = commit = Commit(oid, parent, title, files, large)
        self.refs[ref] = oid
        return commit

    def put(self, files: dict[str, bytes | str], title: str = "Edit in the browser") -> Commit:
        """Commit to main as its owner does by other means."""
        content = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
        large = {path for path, data in content.items() if is_large(path, len(data), data[:512])}
        self.blobs.update({sha256(content[path]).hexdigest(): content[path] for path in large})
        kept = {path for path in self.head.large if path not in content}
        return self.record("main", self.head.oid, title, self.head.files | content, frozenset(large | kept))

    def commit(self, lines: list[dict[str, Any]], branch: str, *, as_request: bool) -> Commit:
        """Apply the operations of one request, all or none of them."""
        header, base = lines[0]["value"], self.resolve(branch)
        if branch not in self.refs and not as_request:
            raise Refused(400, "Commits can only be made on branches")
        parent = header.get("parentCommit")
        if parent and not base.oid.startswith(parent):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        if not header.get("summary"):
            raise Refused(400, "A commit needs a summary")
        files, large = dict(base.files), set(base.large)
        for line in lines[1:]:
            path = line["value"]["path"]
            if path.startswith("/") or {"..", ".git", ""} & set(path.split("/")):
                raise Refused(400, f"Invalid path: {path}")
            large.discard(path)
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"], validate=True)
                if is_large(path, len(files[path]), files[path][:512]):
                    raise Refused(400, f"{path} must be uploaded through the large store")
            elif line["key"] == "lfsFile":
                content = self.blobs.get(line["value"]["oid"])
                if content is None or len(content) != line["value"].get("size", len(content)):
                    raise Refused(400, f"{path}: its blob {line['value']['oid']} has not been uploaded")
                files[path] = content
                large.add(path)
            elif line["key"] == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refused(400, f"Unknown operation {line['key']}")
        if "README.md" in files and (errors := card_errors(files["README.md"].decode())):
            raise Refused(400, "; ".join(errors))
        ref = branch
        if as_request:
            self.requests += 1
            ref = f"refs/pr/{self.requests}"
        return self.record(ref, base.oid, header["summary"], files, frozenset(large))


def git_oid(content: bytes) -> str:
    """Id of a blob in git."""
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub wants a file in its large store: by its name, its size, or because it is not text."""
    return size > 0 and (path.endswith(LARGE) or size > 10_000_000 or b"\0" in sample)


def card_head(card: str) -> dict[str, Any]:
    """The metadata of a card; {} without any, or with a head that cannot be read."""
    found = HEAD.match(card)
    try:
        head = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return json.loads(json.dumps(head, default=str)) if isinstance(head, dict) else {}


def card_errors(card: str) -> list[str]:
    """What the Hub finds wrong with the head of a model card; its words are the Hub's where they are known."""
    found = HEAD.match(card)
    if not found:
        return []  # a warning, no error
    try:
        head = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"YAML is not valid: {' '.join(str(error).split())}"]
    if not isinstance(head, dict):
        return ["YAML metadata must be a dictionary"]
    errors: list[str] = []

    def each(key: str) -> list[Any]:
        value = head.get(key)
        return value if isinstance(value, list) else [] if value is None else [value]

    def check(key: str, good: Any, message: str) -> None:
        errors.extend(f'"{key}" with value "{one}" is not valid. {message}' for one in each(key) if not good(one))

    def is_text(one: Any) -> bool:
        return isinstance(one, str) and bool(one.strip())

    if any(one not in LICENCES for one in each("license")):
        errors.append(f'"license" must be one of [{", ".join(LICENCES)}, array]')
    if "other" in each("license") and not is_text(head.get("license_name")):
        errors.append('"license_name" is required where "license" is "other"')
    check(
        "base_model",
        lambda one: is_text(one) and REPOSITORY.fullmatch(one),
        "Use a model id from https://hf.co/models.",
    )
    check("base_model_relation", RELATIONS.__contains__, f"Use one of {', '.join(RELATIONS)}.")
    check(
        "datasets",
        lambda one: is_text(one) and REPOSITORY.fullmatch(one),
        "Use a dataset id from https://hf.co/datasets.",
    )
    check(
        "language",
        lambda one: is_text(one) and LANGUAGE.fullmatch(one),
        "It must be an ISO 639-1, 639-2 or 639-3 code.",
    )
    for key in ("tags", "metrics"):
        if key in head and not isinstance(head[key], list):
            errors.append(f'"{key}" must be an array')
        check(key, is_text, "Use a string.")
    for key in ("library_name", "pipeline_tag", "license_name"):
        check(key, is_text, "Use a string.")
    for i, example in enumerate(each("widget")):
        if not isinstance(example, dict) or not {"text", "src"} & example.keys():
            errors.append(f'"widget[{i}]" needs a "text" or a "src"')
    for i, model in enumerate(each("model-index")):
        where = f"model-index[{i}]"
        if not isinstance(model, dict) or not is_text(model.get("name")) or not model.get("results"):
            errors.append(f'"{where}" needs a "name" and "results"')
            continue
        for j, result in enumerate(model["results"]):
            needed = {"task": ("type",), "dataset": ("type", "name")}
            for part, keys in needed.items():
                for key in keys:
                    if not is_text((result.get(part) or {}).get(key)):
                        errors.append(f'"{where}.results[{j}].{part}.{key}" is required')
            for k, metric in enumerate(result.get("metrics") or [{}]):
                if not is_text(metric.get("type")) or not isinstance(metric.get("value"), int | float | str):
                    errors.append(f'"{where}.results[{j}].metrics[{k}]" needs a "type" and a "value"')
    return errors
