"""Backbones from the Hub by id and revision, through the real client: private, gated, offline, cached, broken off."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_client import Client, Said
from tests.hub_server import Hub
from tests.tiny import bert_folder, timm_folder

LOAD = "tests.model.test_from_hub:load"


def load(name: str) -> list[object]:  # in the client's process
    """Where a backbone came from, and a digest of its weights."""
    from finetune.model.fetch import locate

    found = locate(name)
    assert found.weights is not None
    weights = hashlib.sha256(found.weights.read_bytes()).hexdigest()
    return [found.family, found.base_model, found.revision, found.licence, weights]


@pytest.fixture(scope="module")
def offline(server: Hub, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client in offline mode that has the same cache."""
    home = {"HF_HOME": str(client.cache), "HF_HUB_CACHE": str(client.cache / "hub"), "HF_HUB_OFFLINE": "1"}
    with Client(server.url, tmp_path_factory.mktemp("offline"), **home) as offline:
        yield offline


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes | str]]:
    root = tmp_path_factory.mktemp("models")
    folders = {
        "bert": bert_folder(root / "bert", ["bad", "good"]),
        "timm": timm_folder(root / "timm", "test_resnet", labels=["cat", "dog"], num_classes=2),
    }
    return {
        name: {file.name: file.read_bytes() for file in folder.iterdir()}
        | {"README.md": "---\nlicense: mit\n---\n", "onnx/config.json": "{}", "pytorch_model.bin": "pickle"}
        for name, folder in folders.items()
    }


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.reset()
    return server


def refusal(said: Said) -> str:
    assert said.type == "BackboneError", said
    assert "\n" not in str(said.error) and "may-write" not in str(said.error)
    return str(said.error)


@pytest.mark.parametrize(("kind", "family"), [("bert", "transformers"), ("timm", "timm")])
def test_by_id_and_revision(hub: Hub, client: Client, offline: Client, files: dict, kind: str, family: str) -> None:
    repository = hub.repository(f"me/{kind}")
    first = repository.put(files[kind]).oid
    other = files["timm" if kind == "bert" else "bert"]
    repository.put({"extra.txt": other["config.json"]})
    loaded = client.value(LOAD, f"me/{kind}")
    weights = hashlib.sha256(files[kind]["model.safetensors"]).hexdigest()
    assert loaded == [family, f"me/{kind}", repository.head.oid, "mit", weights]
    assert client.value(LOAD, f"hf-hub:me/{kind}@{first}")[2] == first
    client.value("huggingface_hub:create_branch", f"me/{kind}", branch="v2", revision=first)
    assert client.value(LOAD, f"me/{kind}@v2")[2] == first
    fetched = {path for method, path, status in hub.asked if method == "GET" and status == 200 and "/resolve/" in path}
    assert not any(path.endswith((".bin", "onnx/config.json")) for path in fetched)
    assert refusal(client.call(LOAD, f"me/{kind}@v9")) == f"me/{kind}: no revision 'v9'; leave out @v9 for the newest"

    hub.asked.clear()
    assert offline.value(LOAD, f"me/{kind}") == loaded
    assert offline.value(LOAD, f"me/{kind}@v2")[2] == first and offline.value(LOAD, f"me/{kind}@{first}")[2] == first
    assert hub.asked == []


def test_private_gated_unknown_and_a_wrong_token(hub: Hub, client: Client, files: dict) -> None:
    hub.repository("me/hidden", private=True).put(files["timm"])
    hub.repository("me/gated", gated=True).put(files["timm"])
    assert client.value(LOAD, "me/hidden")[0] == "timm"
    missing = "no such repository on the Hub, or it is private; check the name, or log in with `hf auth login`"
    assert refusal(client.call(LOAD, "me/hidden", token="stranger")) == f"me/hidden: {missing}"
    assert refusal(client.call(LOAD, "me/gone", token="")) == f"me/gone: {missing}"
    for token in ("stranger", ""):  # its page is shown to everybody, its files are not
        assert refusal(client.call(LOAD, "me/gated", token=token)) == (
            "me/gated: access to this repository must be asked for; accept its terms on "
            "https://huggingface.co/me/gated, then log in with `hf auth login`"
        )
    said = refusal(client.call(LOAD, "me/open", token="outdated"))
    assert said.startswith("me/open: the Hub does not know the token (of HF_TOKEN") and "outdated" not in said
    assert client.value(LOAD, "me/gated")[0] == "timm"


def test_a_busy_hub_is_waited_for_unless_the_model_is_there(hub: Hub, client: Client, files: dict) -> None:
    hub.repository("me/busy").put(files["timm"])
    hub.fail("GET", "/api/models/me/busy$", 429, headers={"Retry-After": "7"}, times=2)
    hub.fail("GET", "/cdn/", cut="body")
    hub.fail("GET", "/tree/", 503)
    said = client.call(LOAD, "me/busy")
    assert said.error is None and hub.faults == [] and 7.0 in said.waits
    hub.fail("GET", "/api/models/me/busy$", 500, times=99)
    again = client.call(LOAD, "me/busy")
    assert again.value == said.value and list(again.waits) == []
    hub.repository("me/ill")
    hub.fail("GET", "/api/models/me/ill$", 500, times=99)
    assert "me/ill: neither in the cache (" in (ill := refusal(client.call(LOAD, "me/ill"))) and "(500: Internal" in ill


def test_what_broke_off_is_said_and_goes_on(hub: Hub, client: Client, offline: Client, files: dict) -> None:
    hub.repository("me/torn").put(files["timm"])
    hub.fail("GET", "/cdn/", 500, times=99)
    assert refusal(client.call(LOAD, "me/torn")).startswith("me/torn: the download broke off (500: Internal error")
    said = refusal(offline.call(LOAD, "me/torn"))
    assert said.startswith("me/torn: only a part of it is in the cache (") and "offline mode is on" in said
    hub.faults.clear()
    assert client.value(LOAD, "me/torn") and offline.value(LOAD, "me/torn")


def test_no_network(hub: Hub, client: Client, tmp_path: Path, files: dict) -> None:
    hub.repository("me/kept").put(files["timm"])
    loaded = client.value(LOAD, "me/kept")
    home = {"HF_HOME": str(client.cache), "HF_HUB_CACHE": str(client.cache / "hub")}
    with Client("http://127.0.0.1:9", tmp_path, **home) as lonely:
        assert lonely.value(LOAD, "me/kept") == loaded
        said = lonely.call(LOAD, "me/other")
    assert "me/other: neither in the cache (" in refusal(said) and "nor can the Hub be reached (Connect" in refusal(
        said
    )
    assert list(said.waits) == []  # a machine without network should hear so at once


@pytest.mark.parametrize("index", [{"weight_map": {"a": "../../secret.safetensors"}}, {"weight_map": {"a": "/x"}}, []])
def test_an_index_must_not_lead_elsewhere(hub: Hub, client: Client, files: dict, index: object) -> None:
    hub.repository("me/evil").put({**files["bert"], "model.safetensors.index.json": json.dumps(index)})
    assert refusal(client.call(LOAD, "me/evil")).startswith("me/evil/model.safetensors.index.json: n")
