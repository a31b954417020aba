"""The stand-in for the Hub, asked by the real huggingface_hub client: it does what the Hub does, and no favours."""

import json
from hashlib import sha256
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.hub_client import Client
from tests.hub_server import Hub
from tests.hub_store import card_errors

API = "tests.output.test_hub_server:"


# Run in the client's process


def upload(repo_id: str, files: dict[str, str], **options: object) -> str:
    """Commit files of the given content; the commit's URL."""
    from huggingface_hub import CommitOperationAdd, HfApi

    additions = [CommitOperationAdd(path, content.encode("latin-1")) for path, content in files.items()]
    return str(HfApi().create_commit(repo_id, additions, commit_message="Try", **options).commit_url)  # type: ignore[call-overload]


def make(repo_id: str, **options: object) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().create_repo(repo_id, **options))  # type: ignore[arg-type]


def info(repo_id: str, revision: str | None = None) -> list[object]:
    from huggingface_hub import HfApi

    found = HfApi().model_info(repo_id, revision=revision)
    return [found.id, found.private, found.gated, found.sha, [file.rfilename for file in found.siblings or ()]]


def tree(repo_id: str, **options: object) -> dict[str, object]:
    from huggingface_hub import HfApi

    return {entry.path: getattr(entry, "size", None) for entry in HfApi().list_repo_tree(repo_id, **options)}  # type: ignore[arg-type]


def download(repo_id: str, path: str, **options: object) -> str:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo_id, path, **options)).read_bytes().decode("latin-1")  # type: ignore[arg-type]


def digest(repo_id: str, path: str) -> str:
    from huggingface_hub import hf_hub_download

    return sha256(Path(hf_hub_download(repo_id, path)).read_bytes()).hexdigest()


def metadata(repo_id: str, path: str) -> list[object]:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    found = get_hf_file_metadata(hf_hub_url(repo_id, path))
    return [found.commit_hash, found.etag, found.size]


# The tests


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.reset()
    return server


def test_a_repository_is_made_once_by_those_who_may(hub: Hub, client: Client) -> None:
    assert client.value(API + "make", "me/new") == f"{hub.url}/me/new"
    assert client.value(API + "make", "new", private=True, exist_ok=True) == f"{hub.url}/me/new"
    assert not hub.repository("me/new").private  # it was there already
    assert client.value(API + "make", "club/hidden", private=True) and hub.repository("club/hidden").private
    assert "409" in (client.call(API + "make", "me/new").error or "")
    for token, status in (("may-read", "403"), ("stranger", "403"), ("unknown", "401")):
        assert status in (client.call(API + "make", "me/other", token=token).error or "")
    assert ("models", "me/other") not in hub.repositories


def test_files_come_back_as_they_went(hub: Hub, client: Client) -> None:
    hub.repository("me/new")
    files = {"config.json": "{}", "model.safetensors": "weights\0" * 99, "images/a.png": "\x89PNG\0"}
    url = client.value(API + "upload", "me/new", files)
    sha = url.rpartition("/")[2]
    repository = hub.repository("me/new")
    assert repository.files == {path: text.encode("latin-1") for path, text in files.items()}
    assert repository.head.large == {"model.safetensors", "images/a.png"} and repository.titles == ["Try"]
    everything = [".gitattributes", *sorted(files)]
    assert client.value(API + "info", "me/new") == ["me/new", False, False, sha, everything]
    assert client.value(API + "tree", "me/new", recursive=False).keys() == {*everything, "images"} - {"images/a.png"}
    assert client.value(API + "tree", "me/new", recursive=True)["images/a.png"] == 5
    for path, text in files.items():
        assert client.value(API + "download", "me/new", path) == text
    digest = sha256(files["model.safetensors"].encode("latin-1")).hexdigest()
    assert client.value(API + "metadata", "me/new", "model.safetensors") == [sha, digest, 8 * 99]
    again = client.call(API + "upload", "me/new", files)
    assert again.value == url and repository.titles == ["Try"]  # nothing new, no commit
    assert hub.times("PUT", "/store/") == 2


def test_parts_are_put_together_and_checked(hub: Hub, client: Client) -> None:
    hub.repository("me/new")
    hub.part_size = 100
    assert client.value(API + "upload", "me/new", {"model.safetensors": "x" * 250})
    assert hub.repository("me/new").files == {"model.safetensors": b"x" * 250} and hub.times("PUT", r"/\d$") == 3
    oid = sha256(b"right").hexdigest()
    for path in (f"/store/models/me/new/{oid}", f"/store/models/me/new/{oid}/1"):
        try:
            urlopen(Request(hub.url + path, data=b"wrong", method="PUT")).read()
            asked = Request(
                hub.url + path[:-2], data=json.dumps({"parts": [{"partNumber": 1}]}).encode(), method="POST"
            )
            urlopen(asked).read()
        except HTTPError as error:
            assert error.code == 400 and b"checksum" in error.read()
            error.close()
        else:
            pytest.fail("a wrong blob was taken")
    assert oid not in hub.repository("me/new").blobs


def post(hub: Hub, path: str, *lines: dict) -> tuple[int, str]:
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    request = Request(hub.url + path, data=body, method="POST", headers={"Authorization": "Bearer may-write"})
    try:
        with urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ({"key": "lfsFile", "value": {"path": "m.safetensors", "oid": "0" * 64, "size": 3}}, 400, "not been uploaded"),
        ({"key": "file", "value": {"path": "../up", "content": ""}}, 400, "Invalid path"),
        ({"key": "file", "value": {"path": ".git/config", "content": ""}}, 400, "Invalid path"),
        ({"key": "file", "value": {"path": "m.safetensors", "content": "aGVsbG8="}}, 400, "large store"),
        ({"key": "file", "value": {"path": "README.md", "content": "LS0tCmxpY2Vuc2U6IG1pbmUKLS0tCg=="}}, 400, "must"),
        ({"key": "deletedFile", "value": {"path": "gone"}}, 404, "doesn't exist"),
    ],
)  # fmt: skip
def test_commits_that_are_refused_change_nothing(hub: Hub, line: dict, status: int, message: str) -> None:
    repository = hub.repository("me/new")
    good = {"key": "file", "value": {"path": "a.txt", "content": ""}}
    before = repository.head
    said = post(hub, "/api/models/me/new/commit/main", {"key": "header", "value": {"summary": "Try"}}, good, line)
    assert said[0] == status and message in said[1]
    assert repository.head is before


def test_a_stale_parent_is_a_conflict(hub: Hub, client: Client) -> None:
    repository = hub.repository("me/new")
    stale = repository.head.oid
    repository.put({"README.md": "Hello\n"})
    said = client.call(API + "upload", "me/new", {"a.txt": "a"}, parent_commit=stale)
    assert "412" in (said.error or "") and "a.txt" not in repository.files
    assert client.value(API + "upload", "me/new", {"a.txt": "a"}, parent_commit=repository.head.oid)


def test_branches_and_pull_requests(hub: Hub, client: Client) -> None:
    repository = hub.repository("me/new")
    said = client.call(API + "upload", "me/new", {"a.txt": "a"}, create_pr=True, token="stranger")
    assert said.value and repository.files == {} and repository.resolve("refs/pr/1").files["a.txt"] == b"a"
    assert "403" in (client.call(API + "upload", "me/new", {"a.txt": "a"}, token="stranger").error or "")
    said = client.call(API + "upload", "me/new", {"a.txt": "a"}, revision="v2")
    assert said.type == "RevisionNotFoundError"
    assert client.call("huggingface_hub:create_branch", "me/new", branch="v2").error is None
    assert client.value(API + "upload", "me/new", {"a.txt": "b"}, revision="v2")
    assert repository.files == {} and client.value(API + "download", "me/new", "a.txt", revision="v2") == "b"


def test_who_may_see_and_read(hub: Hub, client: Client) -> None:
    hub.repository("me/hidden", private=True).put({"a.txt": "a"})
    hub.repository("me/gated", gated=True, allowed={"guest"}).put({"a.txt": "a"})
    hub.accounts["guest"] = hub.accounts["stranger"].__class__("guest")
    assert client.value(API + "download", "me/hidden", "a.txt") == "a"
    for name in ("me/hidden", "me/gone"):
        assert client.call(API + "info", name, token="stranger").type == "RepositoryNotFoundError"
    assert client.value(API + "info", "me/gated", token="stranger")  # shown to all, as on the Hub
    assert client.call(API + "download", "me/gated", "a.txt", token="stranger").type == "GatedRepoError"
    assert client.value(API + "download", "me/gated", "a.txt", token="guest") == "a"
    assert client.call(API + "download", "me/gated", "b.txt", token="guest").type == "RemoteEntryNotFoundError"
    assert client.call(API + "info", "me/gated", "v9", token="guest").type == "RevisionNotFoundError"


def test_faults_strike_as_often_as_asked(hub: Hub, client: Client) -> None:
    big = b"x" * 21_000_000  # the client keeps what it has in pieces of ten million
    hub.repository("me/new").put({"big.bin": big})
    hub.fail("GET", "/api/models/me/new", 500, times=2)
    assert [client.call(API + "info", "me/new").type for _ in range(3)] == ["HfHubHTTPError", "HfHubHTTPError", None]
    hub.fail("GET", "/cdn/", cut="body")
    assert client.value(API + "digest", "me/new", "big.bin") == sha256(big).hexdigest()
    assert [status for method, path, status in hub.asked if method == "GET" and "/cdn/" in path] == [200, 206]
    hub.fail("POST", "/preupload/", cut="request")
    hub.fail("POST", "/commit/", 429, headers={"Retry-After": "7"})
    said = client.call(API + "upload", "me/new", {"a.txt": "a"})
    assert "429" in (said.error or "") and list(said.waits) == [1.0]
    hub.fail("POST", "/commit/", cut="answer")
    said = client.call(API + "upload", "me/new", {"a.txt": "a"})
    assert said.error and hub.repository("me/new").files["a.txt"] == b"a"  # done, but not heard of
    assert hub.faults == []


@pytest.mark.parametrize(
    ("head", "error"),
    [
        ("license: apache-2.0\nbase_model: timm/resnet18.a1_in1k\nbase_model_relation: finetune\nlanguage: [en]", None),
        ("license: other\nlicense_name: fair", None),
        ("license: GPL", '"license" must be one of'),
        ("license: other", "license_name"),
        ("base_model: /home/me/model", "Use a model id"),
        ("base_model_relation: child", "base_model_relation"),
        ("datasets: [photos of cats]", "Use a dataset id"),
        ("language: english", "ISO 639"),
        ("tags: one", "must be an array"),
        ("tags: [1]", "Use a string"),
        ("widget: [{example_title: a}]", "widget[0]"),
        ("model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d}, metrics: [{type: m, value: 1}]}]}]",
         "dataset.name"),
        ("model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: d}, metrics: [{type: m}]}]}]",
         "metrics[0]"),
        ("a: [", "not valid"),
    ],
)  # fmt: skip
def test_cards(head: str, error: str | None) -> None:
    errors = card_errors(f"---\n{head}\n---\n\n# Card\n")
    assert (errors == []) if error is None else (len(errors) == 1 and error in errors[0])
