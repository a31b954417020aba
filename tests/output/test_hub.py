"""Uploading to a stand-in for the Hub by the real client: what arrives there, and what is said when it does not."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.errors import RunError
from finetune.output.hub import push_to_hub
from finetune.run import Run
from tests.hub_client import Client, Said, hub_environment
from tests.hub_server import Hub
from tests.output.test_card import NOTES, RECORD, make_model

PUSH = "finetune.output.hub:push_to_hub"


@pytest.fixture(scope="module")
def client(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(server.url, tmp_path_factory.mktemp("client")) as client:
        yield client
    said = client.log.read_text()
    assert "may-write" not in said and "hf_secretsecret" not in said  # no token is ever logged


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.reset()
    return server


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def head_of(card: str | bytes) -> dict[str, Any]:
    return yaml.safe_load((card if isinstance(card, str) else card.decode()).split("---\n")[1])


def edit(hub: Hub, name: str, *changes: tuple[str, str]) -> str:
    """Edit a card as in the browser."""
    card = hub.repository(name).files["README.md"].decode()
    for old, new in changes:
        assert old in card
        card = card.replace(old, new)
    hub.repository(name).put({"README.md": card})
    return card


def test_what_arrives(tmp_path: Path, hub: Hub, client: Client) -> None:
    run = make_model(tmp_path / "run")
    before = content(tmp_path)
    url = client.value(PUSH, run / "model", "me/new", commit_message="First")
    assert content(tmp_path) == before
    new = hub.repository("me/new")
    assert url == f"{hub.url}/me/new/commit/{new.head.oid}" and new.titles == ["First"] and not new.private
    card = new.files["README.md"].decode()
    pictures = {name for name in new.files if name.startswith("images/")}
    assert {name: data for name, data in new.files.items() if name != "README.md" and name not in pictures} == content(
        run / "model"
    )
    assert pictures and all(f'src="{name}"' in card and new.files[name].startswith(b"\x89PNG") for name in pictures)
    assert new.head.large == {"model.safetensors", *pictures}
    assert 'model="me/new"' in card

    client.value(PUSH, run, "hidden", private=True)  # the run folder, and a name without its owner
    assert hub.repository("me/hidden").private and "model.safetensors" in hub.repository("me/hidden").files
    assert 'model="me/hidden"' in hub.repository("me/hidden").files["README.md"].decode()


def test_the_same_again_is_no_new_commit(tmp_path: Path, hub: Hub, client: Client) -> None:
    run = make_model(tmp_path / "run")
    first = client.value(PUSH, run, "me/new")
    sent = hub.times("PUT", "/store/")
    assert client.value(PUSH, run, "me/new") == first
    assert hub.repository("me/new").titles == ["Add model"] and hub.times("PUT", "/store/") == sent > 0


def test_what_was_edited_by_hand_survives(tmp_path: Path, hub: Hub, client: Client) -> None:
    run = make_model(tmp_path / "run")
    client.value(PUSH, run, "me/new")
    edit(
        hub,
        "me/new",
        ("With transformers:", "With transformers, as we do in the lab:"),
        ("license: apache-2.0", "license: mit\ncustom: 7"),
        ("## Limits\n", "## Thanks\n\nTo the cats.\n\n## Limits\n"),
    )
    card = edit(hub, "me/new", ("## Settings, and why", "## Gone"))
    start, end = card.index("## Gone"), card.index("## Thanks")
    hub.repository("me/new").put({"README.md": card[:start] + card[end:]})
    (run / "run.json").write_text(json.dumps(RECORD).replace("0.9,", "0.7,"))
    client.value(PUSH, run, "me/new", commit_message="Again")
    card = hub.repository("me/new").files["README.md"].decode()
    assert "as we do in the lab" in card and "To the cats." in card and "## Settings" not in card
    assert head_of(card)["license"] == "mit" and head_of(card)["custom"] == 7
    assert "Accuracy 70.0 %" in card and "| accuracy | 70.0 % |" in card  # the rest is new
    assert card.index("## Training") < card.index("## Thanks") < card.index("## Limits")
    assert (
        "parts of the card that were edited stay: head: license, head: custom, Use it, Thanks" in client.log.read_text()
    )
    client.value(PUSH, run, "me/new", commit_message="And again")
    assert hub.repository("me/new").files["README.md"].decode() == card


def test_cards_of_others_stay_whole(tmp_path: Path, hub: Hub, client: Client) -> None:
    run = make_model(tmp_path / "run")
    hub.repository("me/theirs").put({"README.md": "---\nlicense: mit\n---\n# By hand\n"})
    client.value(PUSH, run, "me/theirs")
    files = hub.repository("me/theirs").files
    assert files["README.md"] == b"---\nlicense: mit\n---\n# By hand\n" and "model.safetensors" in files
    assert not any(name.startswith("images/") for name in files)
    (run / "model" / "README.md").write_text("---\nlicense: mit\n---\nMine\n")
    client.value(PUSH, run, "me/mine")
    assert hub.repository("me/mine").files["README.md"].endswith(b"Mine\n")


def test_a_card_of_ours_in_the_folder_is_a_draft(tmp_path: Path, hub: Hub, client: Client) -> None:
    from finetune.output.card import make_card
    from finetune.output.card_facts import Facts

    run = make_model(tmp_path / "run")
    draft = make_card(Facts.of(run / "model"), "me/new").text
    (run / "model" / "README.md").write_text(draft.replace("## Limits\n", "## Limits\n\n- Mind the gap.\n"))
    client.value(PUSH, run, "me/new")
    edit(hub, "me/new", ("With transformers:", "In short:"))
    client.value(PUSH, run, "me/new")
    card = hub.repository("me/new").files["README.md"].decode()
    assert "Mind the gap." in card and "In short:" in card


def test_branch_and_pull_request(tmp_path: Path, hub: Hub, client: Client) -> None:
    run = make_model(tmp_path / "run")
    url = client.value(PUSH, run, "me/new", revision="v2")
    repository = hub.repository("me/new")
    assert repository.files == {} and repository.resolve("v2").oid in url
    assert "model.safetensors" in repository.resolve("v2").files
    url = client.value(PUSH, run, "me/new", create_pr=True, token="stranger")
    assert url == f"{hub.url}/me/new/discussions/1" and repository.files == {}
    assert "README.md" in repository.resolve("refs/pr/1").files
    client.value(PUSH, run, "me/new", revision="refs/pr/1", commit_message="More")
    assert repository.resolve("refs/pr/1").title != "More"  # nothing had changed


def test_dry_run_sends_and_asks_nothing(tmp_path: Path, hub: Hub, client: Client) -> None:
    run = make_model(tmp_path / "run")
    (run / "model" / "training_args.bin").write_bytes(b"pickle")
    before = content(tmp_path)
    said = client.value(PUSH, run, "me/new", dry_run=True, token="")
    first, *lines = said.splitlines()
    assert hub.asked == [] and content(tmp_path) == before
    assert re.fullmatch(r"me/new: would get \d+ files, [\d.]+ kB; nothing was sent", first)
    sent = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert sent["model.safetensors"] == "20.0 kB" and "README.md" in sent and "images/rates.png" in sent
    assert sent["training_args.bin"].startswith("kept back")
    client.value(PUSH, run, "me/new")
    assert hub.repository("me/new").files.keys() == sent.keys() - {"training_args.bin"}


def test_files_of_an_earlier_model_go(tmp_path: Path, hub: Hub, client: Client) -> None:
    earlier = {
        "preprocessor_config.json": "{}",
        "pytorch_model.bin": "pickle",
        "vocab.txt": "a",
        "onnx/model.onnx": "o",
    }
    hub.repository("me/new").put({**earlier, "notes.txt": "mine", "model-00001-of-00002.safetensors": "half"})
    client.value(PUSH, make_model(tmp_path / "run"), "me/new")
    files = hub.repository("me/new").files.keys()
    assert {"onnx/model.onnx", "notes.txt", "model.safetensors"} <= files
    assert not files & {
        "preprocessor_config.json",
        "pytorch_model.bin",
        "vocab.txt",
        "model-00001-of-00002.safetensors",
    }


def test_no_file_from_elsewhere_is_sent(tmp_path: Path, hub: Hub, client: Client) -> None:
    run = make_model(tmp_path / "run")
    (run / "model" / ".cache").mkdir()
    (run / "model" / ".cache" / "token").write_text("hf_secretsecret")
    client.value(PUSH, run, "me/new")
    assert not any(b"hf_secret" in data for data in hub.repository("me/new").files.values())
    (tmp_path / "secret.json").write_text("{}")
    (run / "model" / "more.json").symlink_to(tmp_path / "secret.json")
    said = client.call(PUSH, run, "me/other")
    assert said.type == "RunError" and "more.json: a link to a file outside of the folder" in str(said.error)


BUSY = {"headers": {"Retry-After": "7"}}
PLACES = [
    ("POST", "/api/repos/create"),
    ("GET", "/api/models/me/new"),
    ("HEAD", "/resolve/"),
    ("POST", "/api/validate-yaml"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/store/"),
    ("POST", "/verify"),
    ("POST", "/commit/"),
]


@pytest.mark.parametrize(("method", "path"), PLACES)
def test_a_busy_hub_is_waited_for(tmp_path: Path, hub: Hub, client: Client, method: str, path: str) -> None:
    run = make_model(tmp_path / "run", record=None)
    hub.repository("me/new").put({"README.md": ""})
    hub.fail(method, path, 429, **BUSY)
    hub.fail(method, path, 500)
    said = client.call(PUSH, run, "me/new")
    assert said.error is None and hub.faults == []
    # The client asks once more for a file's head before it heeds the answer.
    assert (7.0 <= max(said.waits) <= 8.0 and len(said.waits) == 2) or (method == "HEAD" and said.waits)
    assert (
        hub.repository("me/new").titles[1:] == ["Add model"]
        and "Licence" in hub.repository("me/new").files["README.md"].decode()
    )


LOST = [("POST", "/api/repos/create"), ("PUT", r"/store/.*/2$"), ("POST", r"/store/"), ("POST", "/commit/")]


@pytest.mark.parametrize(
    ("method", "path", "cut"), [(*place, "request") for place in PLACES] + [(*place, "answer") for place in LOST]
)
def test_a_broken_connection_is_made_again(
    tmp_path: Path, hub: Hub, client: Client, method: str, path: str, cut: str
) -> None:
    run = make_model(tmp_path / "run", record=None)
    hub.part_size = 8000 if cut == "answer" else None
    hub.repository("me/new")
    hub.fail(method, path, cut=cut)
    said = client.call(PUSH, run, "me/new")
    assert said.error is None and hub.faults == []
    assert hub.repository("me/new").titles == ["Add model"]  # one commit, also where the answer to it was lost
    assert hub.repository("me/new").head.oid in said.value
    assert hub.repository("me/new").files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()


def test_an_upload_that_was_given_up_goes_on_where_it_was(tmp_path: Path, hub: Hub, client: Client) -> None:
    run = make_model(tmp_path / "run")
    before = content(tmp_path)
    hub.fail("PUT", "/store/", cut="request", times=99, skip=2)
    said = client.call(PUSH, run, "me/new")
    assert said.type == "RunError" and "the Hub cannot be reached (" in str(said.error)
    assert str(said.error).endswith(f"upload it later; the model is whole in {run / 'model'}")
    assert content(tmp_path) == before and hub.repository("me/new").files == {}
    there, hub.faults = len(hub.repository("me/new").blobs), []
    hub.asked.clear()
    assert there == 2 and client.call(PUSH, run, "me/new").error is None
    assert hub.times("PUT", "/store/") == len(hub.repository("me/new").blobs) - there > 0


def test_somebody_else_commits_in_between(tmp_path: Path, hub: Hub, client: Client) -> None:
    run = make_model(tmp_path / "run")
    client.value(PUSH, run, "me/new")
    (run / "run.json").write_text(json.dumps(RECORD).replace("0.9,", "0.7,"))
    hub.fail("POST", "/commit/", do=lambda: edit(hub, "me/new", ("With transformers:", "In short:")))
    assert client.call(PUSH, run, "me/new", commit_message="Again").error is None
    card = hub.repository("me/new").files["README.md"].decode()
    assert "In short:" in card and "| accuracy | 70.0 % |" in card
    assert hub.repository("me/new").titles == ["Add model", "Edit in the browser", "Again"]


def refusal(said: Said) -> str:
    assert said.type == "RunError", said
    return str(said.error)


@pytest.mark.parametrize(
    ("fault", "start", "end"),
    [
        (("POST", "/commit/", 412), "me/new: others keep committing there (412); push again", ""),
        (("POST", "/commit/", 401), "me/new: the Hub refused the upload (401); check that the token", ""),
        (("POST", "/commit/", 403), "me/new: the Hub refused the upload (403); check that the token", ""),
        (("POST", "/preupload/", 404, "RepoNotFound"), "me/new: no such repository, or the token may not see it", ""),
        (("POST", "/preupload/", 403, "GatedRepo"), "me/new: access to it must be asked for; accept its terms on", ""),
        (("POST", "/commit/", 500), "me/new: the Hub answered 500: Internal error; try again", ""),
        (("PUT", "/store/", 500), "me/new: the Hub answered 500: Internal error; try again", ""),
        (("POST", "/api/validate-yaml", 502, "page"), "me/new: the Hub cannot be reached (JSONDecodeError", ""),
        (("POST", "/api/repos/create", 429, "hour"), "me/new: too many requests, the Hub says; push again in 60", ""),
        (("POST", "/api/repos/create", 0), "me/new: the Hub cannot be reached (", "upload it later; "),
    ],
)  # fmt: skip
def test_what_is_said_when_it_does_not_get_better(
    tmp_path: Path, hub: Hub, client: Client, fault: tuple, start: str, end: str
) -> None:
    run = make_model(tmp_path / "run", record=None)
    repository, before = hub.repository("me/new"), content(tmp_path)
    method, path, status, *more = fault
    options: dict[str, Any] = {"times": 99}
    for word in more:
        options |= {
            "page": {"page": b"<html>Bad gateway</html>"},
            "hour": {"headers": {"Retry-After": "3600"}},
        }.get(word, {"code": word})
    hub.fail(method, path, status, **options, **({"cut": "request"} if not status else {}))
    said = refusal(client.call(PUSH, run, "me/new"))
    assert said.startswith(start) and said.endswith(f"{end}the model is whole in {run / 'model'}")
    assert "\n" not in said and "may-write" not in said
    assert repository.files == {} and content(tmp_path) == before


def test_a_pull_request_is_never_made_twice(tmp_path: Path, hub: Hub, client: Client) -> None:
    run = make_model(tmp_path / "run", record=None)
    hub.repository("me/new")
    hub.fail("POST", "/commit/", cut="answer")
    said = refusal(client.call(PUSH, run, "me/new", create_pr=True))
    assert hub.repository("me/new").requests == 1 and f"look at {hub.url}/me/new/discussions" in said


def test_who_may_not(tmp_path: Path, hub: Hub, client: Client) -> None:
    run, bad = make_model(tmp_path / "run", record=None), make_model(tmp_path / "bad")
    (bad / "model" / "README.md").write_text("---\nlicense: mine\n---\nMine\n")
    hub.repository("me/open")
    for token, status in (("outdated", 401), ("may-read", 403)):
        said = refusal(client.call(PUSH, run, "me/new", token=token))
        assert (
            said.startswith(f"me/new: the Hub refused the upload ({status}); check that the token")
            and token not in said
        )
    assert refusal(client.call(PUSH, run, "me/open", private=True)).startswith("me/open: exists and is public")
    name = refusal(client.call(PUSH, run, "me//new"))
    assert name.startswith("me//new: not a name of a repository") and "\n" not in name
    card = refusal(client.call(PUSH, bad, "me/new"))
    assert '"license" must be one of' in card and card.startswith(str(bad / "model" / "README.md"))
    branch = refusal(client.call(PUSH, run, "me/open", revision="v9", create_pr=True))
    assert branch.startswith("me/open: has no branch 'v9'; make it first")
    assert refusal(client.call(PUSH, run, "me/open", revision="0" * 40)).startswith("revision: 0000")
    hub.repository("club/gated", gated=True).put({"README.md": "---\nlicense: mit\n---\n"})
    gated = refusal(client.call(PUSH, run, "club/gated", create_pr=True, token="stranger"))
    assert gated.startswith("club/gated: access to it must be asked for; accept its terms on https://huggingface.co/")
    assert all(not repository.files.get("model.safetensors") for repository in hub.repositories.values())


@pytest.mark.parametrize("token", ["hf_secretsecret", "may-write"])
def test_a_secret_in_an_error_is_not_repeated(tmp_path: Path, hub: Hub, client: Client, token: str) -> None:
    hub.accounts["hf_secretsecret"] = hub.accounts["may-write"]
    message = f"{token} or hf_anothersecret is not good enough, see https://s3/x?X-Amz-Signature=abc"
    hub.fail("POST", "/commit/", 400, message=message)
    said = refusal(client.call(PUSH, make_model(tmp_path / "run", record=None), "me/new", token=token))
    assert "400: *** or *** is not good enough, see https://s3/x;" in said


def test_what_the_hub_knows_of_backbone_and_data(tmp_path: Path, hub: Hub, client: Client) -> None:
    hub.repository(NOTES["base_model"]).put({"README.md": "---\nlanguage: en\nlicense: apache-2.0\n---\n"})
    hub.repository("me/hidden", "datasets", private=True).put({"train.csv": "text,label\n"})

    def head_with(source: str) -> dict[str, Any]:
        record = RECORD | {"data": RECORD["data"] | {"source": source}}
        run = make_model(tmp_path / source.replace("/", "_"), record=record)
        client.value(PUSH, run, "me/new")
        return head_of(hub.repository("me/new").files["README.md"])

    head = head_with("me/hidden")
    assert head["language"] == ["en"] and head["datasets"] == ["me/hidden"] and "widget" not in head
    assert "datasets" not in head_with("photos/pets")  # a folder that is called like a data set


def test_rows_of_a_public_data_set_are_shown(tmp_path: Path, hub: Hub, client: Client) -> None:
    from finetune.data.task import Task
    from finetune.model.backbones import load_backbone
    from finetune.output.export import save_pretrained
    from tests.tiny import bert_folder

    rows = "a film,yes\nthe story,no\na good film,yes\n"
    hub.repository("me/reviews", "datasets").put(
        {"train.csv": f"text,label\n{rows}", "test.csv": f"text,label\n{rows}"}
    )
    of = Task("single_label_classification", "text", ("no", "yes"))
    save_pretrained(load_backbone(bert_folder(tmp_path / "bert"), of), of, tmp_path / "run" / "model")
    data = RECORD["data"] | {"source": "me/reviews", "columns": {"text": "text", "label": "label"}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(RECORD | {"data": data}))
    client.value(PUSH, tmp_path / "run", "me/new")
    widget = head_of(hub.repository("me/new").files["README.md"])["widget"]
    assert [entry["text"] for entry in widget] == ["a film", "the story"]
    assert all({output["label"] for output in entry["output"]} == {"yes", "no"} for entry in widget)


def test_by_command_and_by_run(tmp_path: Path, hub: Hub) -> None:
    run = make_model(tmp_path / "run", record=None)
    done = subprocess.run(
        [sys.executable, "-m", "finetune.verbs_cli", "push", str(run), "me/new", "--revision=v2", "--message=Mine"],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
        env=os.environ | hub_environment(hub.url, tmp_path / "hf") | {"HF_TOKEN": "may-write"},
    )  # fmt: skip
    commit = hub.repository("me/new").resolve("v2")
    assert done.returncode == 0 and done.stdout == f"{hub.url}/me/new/commit/{commit.oid}\n" and commit.title == "Mine"
    said = Run(run, {}, None, None, []).push_to_hub("me/new", dry_run=True)  # type: ignore[arg-type]
    assert said.startswith("me/new: would get ")
    assert Run(run, {}, None, None, [], is_main=False).push_to_hub("me/new") == ""  # type: ignore[arg-type]


def test_no_token_and_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="no model here.*give a run folder"):
        push_to_hub(tmp_path, "owner/new")
    monkeypatch.setattr("finetune.output.hub.get_token", lambda: None)
    with pytest.raises(RunError, match="owner/new: no Hugging Face token; run `hf auth login`"):
        push_to_hub(make_model(tmp_path / "run", record=None), "owner/new")
    with pytest.raises(RunError, match="commit_message: is empty"):
        push_to_hub(tmp_path / "run", "owner/new", commit_message=" ")
