"""Uploading to a small stand-in for the Hub on this machine: what arrives there, and what is said when it does not."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.errors import RunError
from finetune.output.hub import model_card, push_to_hub

NOTES = {
    "schema": 1,
    "task": {"kind": "single_label_classification", "modality": "text", "labels": ["good", "bad"]},
    "family": "transformers",
    "architecture": "BertForSequenceClassification",
    "base_model": "sentence-transformers/all-MiniLM-L6-v2",
    "licence": "apache-2.0",
    "versions": {"torch": "2.14.1"},
}
RECORD = {
    "data": {"source": "/home/someone/reviews.csv", "counts": {"train": 30, "valid": 8, "test": 10}},
    "metrics": {
        "valid": {"accuracy": 0.875, "f1_macro": 0.86},
        "test": {"accuracy": 0.9, "f1_macro": 0.89, "confusion": [[4, 1], [0, 5]]},
    },
}
# Where the Hub is, huggingface_hub reads when it is imported: so uploads run in a process of their own.
PROGRAM = """
import json, os, sys, warnings
from pathlib import Path
warnings.simplefilter("error")
from finetune.errors import RunError
from finetune.output.hub import push_to_hub
said = []
for call in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = call.pop("token", "may-write")
    try:
        said.append(push_to_hub(Path(call.pop("folder")), call.pop("repo_id"), **call))
    except RunError as error:
        said.append("RunError: " + str(error))
print(json.dumps(said))
"""


class Hub(ThreadingHTTPServer):
    """Repositories as {name: {"private", "files": {path: bytes}, "commits": [title]}}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url, self.repositories = f"http://127.0.0.1:{self.server_port}", {}
        self.repositories["owner/open"] = {"private": False, "files": {}, "commits": []}

    def push(self, tmp_path: Path, *calls: dict[str, Any]) -> list[str]:
        """URL or error of each upload."""
        environment = os.environ | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(calls, default=str)],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            if name == "owner/unreachable":
                self.close_connection = True
            elif self.headers["Authorization"] == "Bearer outdated":
                self.say(401, {"error": "Invalid credentials"})
            elif self.headers["Authorization"] == "Bearer may-read":
                self.say(403, {"error": "Forbidden"})
            elif name == "owner/broken":
                self.say(500, {"error": "Internal error"})
            else:
                private = asked.get("visibility") == "private" or asked.get("private", False)  # newer, older
                new = {"private": private, "files": {}, "commits": []}
                status = 409 if name in self.server.repositories else 200
                self.server.repositories.setdefault(name, new)
                self.say(status, {"url": f"{self.server.url}/{name}", "error": "exists"})
        elif self.path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            bad = head.get("license") == "mine"
            self.say(400 if bad else 200, {"errors": [{"message": "license unknown"}] if bad else [], "warnings": []})
        elif parts[4] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.say(200, {"files": [file | {"shouldIgnore": False} for file in files]})
        elif parts[4] == "commit":
            repository = self.server.repositories["/".join(parts[2:4])]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    repository["commits"].append(line["value"]["summary"])
                else:
                    repository["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/{'/'.join(parts[2:4])}/commit/{len(repository['commits']):040d}"
            self.say(200, {"success": True, "commitOid": url[-40:], "commitUrl": url})

    def do_GET(self) -> None:
        parts = self.path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repository = self.server.repositories.get(name)
        if repository is None:
            self.say(404, {"error": "Not found"}, {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api":
            self.say(200, {"id": name, "private": repository["private"], "sha": "0" * 40, "siblings": []})
        elif parts[4] in repository["files"]:
            self.say(200, repository["files"][parts[4]], {"ETag": '"1"', "X-Repo-Commit": "0" * 40})
        else:
            self.say(404, {"error": "Not found"}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def say(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def make_model(folder: Path, record: dict[str, Any] | None = RECORD, **notes: Any) -> Path:
    (folder / "model" / "backbone").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "model" / "backbone" / "config.json").write_text("{}")
    (folder / "model" / "finetune.json").write_text(json.dumps(NOTES | notes))
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_upload_again_and_with_a_card_that_somebody_edited(tmp_path, hub):
    run = make_model(tmp_path / "run")
    own = make_model(tmp_path / "own")
    (own / "model" / "README.md").write_text("---\nlicense: mit\n---\nMine\n")
    before = content(tmp_path / "run")
    first, private, mine = hub.push(
        tmp_path,
        {"folder": run / "model", "repo_id": "owner/new", "commit_message": "First"},
        {"folder": run, "repo_id": "hidden", "private": True},
        {"folder": own, "repo_id": "owner/mine"},
    )
    assert first == f"{hub.url}/owner/new/commit/{1:040d}"
    assert private.startswith(f"{hub.url}/owner/hidden/commit/") and hub.repositories["owner/hidden"]["private"]
    assert hub.repositories["owner/mine"]["files"]["README.md"].endswith(b"Mine\n") and mine.startswith(hub.url)
    new = hub.repositories["owner/new"]
    assert new["commits"] == ["First"] and not new["private"]
    card = new["files"].pop("README.md").decode()
    assert new["files"] == content(run / "model")
    assert content(tmp_path / "run") == before

    new["files"]["README.md"] = card.encode()
    hidden = hub.repositories["owner/hidden"]["files"]
    hidden["README.md"] = edited = hidden["README.md"].replace(b"## Use", b"## How to use")
    (run / "run.json").write_text(json.dumps(RECORD).replace("0.9,", "0.7,"))
    again = {"folder": run, "commit_message": "Again"}
    hub.push(tmp_path, again | {"repo_id": "owner/new"}, again | {"repo_id": "owner/hidden", "private": True})
    assert "| accuracy | 0.7 |" in new["files"]["README.md"].decode()
    assert hidden["README.md"] == edited and hub.repositories["owner/hidden"]["commits"] == ["Add model", "Again"]


def test_what_is_said_when_it_fails(tmp_path, hub):
    run, bad = make_model(tmp_path / "run"), make_model(tmp_path / "bad")
    (bad / "model" / "README.md").write_text("---\nlicense: mine\n---\nMine\n")
    before = content(tmp_path)
    call = {"folder": run, "repo_id": "owner/new"}
    outdated, reader, broken, unreachable, public, name, card = hub.push(
        tmp_path,
        call | {"token": "outdated"},
        call | {"token": "may-read"},
        call | {"repo_id": "owner/broken"},
        call | {"repo_id": "owner/unreachable"},
        call | {"repo_id": "owner/open", "private": True},
        call | {"repo_id": "owner//new"},
        call | {"folder": bad},
    )
    whole = f"the model is whole in {run / 'model'}"
    for said, status in ((outdated, 401), (reader, 403)):
        assert said.startswith(f"RunError: owner/new: the Hub refused the upload ({status}); check that the token")
        assert said.endswith(whole)
    assert broken.startswith("RunError: owner/broken: the Hub answered 500") and broken.endswith(whole)
    assert unreachable.startswith("RunError: owner/unreachable: the Hub cannot be reached")
    assert unreachable.endswith(f"upload it later; {whole}")
    assert public.startswith("RunError: owner/open: exists and is public")
    assert name.startswith("RunError: owner//new: not a name of a repository") and "\n" not in name
    assert "license unknown" in card and str(bad / "model" / "README.md") in card
    assert all(not repository["files"] for repository in hub.repositories.values())
    assert {name: data for name, data in content(tmp_path).items() if not name.startswith("hf/")} == before


def test_no_token_and_no_model(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="no model here.*give a run folder"):
        push_to_hub(tmp_path, "owner/new")
    monkeypatch.setattr("finetune.output.hub.get_token", lambda: None)
    with pytest.raises(RunError, match="owner/new: no Hugging Face token; run `hf auth login`"):
        push_to_hub(make_model(tmp_path / "run"), "owner/new")


def head_and_text(card: str) -> tuple[dict[str, Any], str]:
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def test_card(tmp_path):
    head, text = head_and_text(model_card(make_model(tmp_path / "run") / "model", "owner/reviews"))
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "base_model": NOTES["base_model"],
        "license": "apache-2.0",
        "metrics": ["accuracy", "f1"],
        "tags": ["finetune-onecycle", "single-label-classification"],
    }
    assert "# reviews\n" in text and 'pipeline("text-classification", model="owner/reviews")' in text
    assert "| accuracy | 0.9 | 0.875 |" in text and "train 30, valid 8, test 10" in text
    assert "/home/someone" not in text and "confusion" not in text


@pytest.mark.parametrize(
    ("notes", "expected", "use"),
    [
        ({"family": "timm", "task": NOTES["task"] | {"modality": "image"}, "licence": "CC-BY-NC-4.0"},
         {"library_name": "timm", "pipeline_tag": "image-classification", "license": "cc-by-nc-4.0"},
         'timm.create_model("hf-hub:owner/m", pretrained=True)'),
        ({"base_model": "/home/someone/weights", "licence": "Fair Research"},
         {"library_name": "transformers", "pipeline_tag": "text-classification", "license": "other",
          "license_name": "fair-research"}, "pipeline("),
        ({"head": {"class": "Species", "linear": False}, "licence": None, "base_model": None}, {}, "head=Species)"),
        ({"family": "module", "head": {"class": "Linear", "linear": True}, "licence": None, "base_model": None}, {},
         "module=...)"),
    ],
)  # fmt: skip
def test_card_says_only_what_is_known(tmp_path, notes, expected, use):
    card = model_card(make_model(tmp_path / "run", record=None, **notes) / "model", "owner/m")
    head, text = head_and_text(card)
    keys = ("library_name", "pipeline_tag", "license", "license_name")
    assert {key: head[key] for key in keys if key in head} == expected
    assert use in text and "/home/someone" not in card
    assert ("base_model" in head) == ("base_model" not in notes)
    assert "metrics" not in head and "## Results" not in text
