"""What somebody else made (weights, configs, tables, pictures) and what people type: none of it runs, leads outside its
folder, fills the memory, gives away a token, or becomes a page's markup."""

import io
import json
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from markupsafe import escape
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune
from finetune.data import sources
from finetune.data.images import BadImage, open_image
from finetune.data.task import Task
from finetune.errors import BackboneError, DataError, FinetuneError, RunError, without_secrets
from finetune.model.backbones import load_backbone
from finetune.output.card import make_card
from finetune.output.card_facts import Facts
from finetune.output.export import save_pretrained
from finetune.output.predict import load
from finetune.output.record import starting_record
from finetune.output.report import write_report
from finetune.train import checkpoint
from tests.tiny import bert_folder, timm_folder, vit_folder

PACKAGE = Path(finetune.__file__).parent
AB = ("cat", "dog")
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz01234567"
NASTY = ['<script>alert("x")</script>', '"><img src=x onerror=alert(1)>', "a | b ` c", "</td></table><b>"]


class Evil:
    """Leaves a trace when it is unpickled without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The file that is there once code of an input was run."""
    return tmp_path / "ran"


def backbone(folder: Path, modality: str, **options: Any) -> Any:
    return load_backbone(folder, Task("single_label_classification", modality, AB), **options)


# Pickles


def test_the_package_asks_for_no_code() -> None:
    """No pickle without `weights_only`, and nothing else that makes code of what is read. `locate` alone loads nothing;
    lines that say what to pass are the errors'."""
    code = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    forbidden = re.compile(
        r"weights_only=False|trust_remote_code=True(?! if)|\bpickle\.load|yaml\.(unsafe_|full_)?load\(|shell=True"
        r"|(?<![\w.])(eval|exec)\(|allow_pickle=True(?! if)|os\.system"
    )
    found = [f"{path.name}: {line.strip()}" for path, text in code.items() for line in text.splitlines()
             if forbidden.search(line) and "pass " not in line and "locate(" not in line]  # fmt: skip
    assert found == []
    loads = [line for text in code.values() for line in text.splitlines() if "torch.load(" in line]
    assert loads and all("weights_only=True" in line for line in loads)


@pytest.mark.parametrize("make", [lambda folder: timm_folder(folder, "test_resnet"), bert_folder, vit_folder])
@pytest.mark.parametrize("place", ["instead", "under the name of safetensors", "beside", "allowed"])
def test_no_pickle_is_run(tmp_path: Path, trace: Path, make: Callable[[Path], Path], place: str) -> None:
    folder = make(tmp_path / "m")
    modality = "text" if make is bert_folder else "image"
    if place != "beside":
        (folder / "model.safetensors").unlink()
    name = "model.safetensors" if place.startswith("under") else "pytorch_model.bin"
    torch.save({"weight": Evil(trace)}, folder / name)
    if place == "beside":
        assert backbone(folder, modality).new_parameters
    else:
        with pytest.raises(BackboneError, match=r"pickled weights can run code|cannot load it"):
            backbone(folder, modality, allow_pickle=place == "allowed")
    assert not trace.exists()


def test_no_pickle_is_run_when_a_run_goes_on(tmp_path: Path, trace: Path) -> None:
    model = torch.nn.Linear(2, 2)
    weights = {"model": checkpoint.snapshot(model)}
    path = checkpoint.save(tmp_path / "checkpoints", 1, weights=weights, optimizer={}, progress={})
    torch.save(Evil(trace), path / "optimizer.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        checkpoint.load(path)
    assert not trace.exists()


# Code beside the weights


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("make", [bert_folder, vit_folder])
def test_code_beside_the_weights_is_not_run(
    tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path], known: bool
) -> None:
    """Nor is anybody asked whether to run it: a question would wait for ever where nobody is there to answer."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = make(tmp_path / "m")
    bring_code(folder, trace, "config.json", "tokenizer_config.json", "preprocessor_config.json")
    if not known:
        change(folder / "config.json", model_type="homemade")
        with pytest.raises(BackboneError, match="auto_map in config.json"):
            backbone(folder, "text" if make is bert_folder else "image")
    else:
        try:
            backbone(folder, "text" if make is bert_folder else "image")
        except BackboneError as error:
            assert "trust_remote_code" in str(error)
    assert not trace.exists()


@pytest.mark.parametrize("modality", ["image", "text"])
def test_code_beside_a_module_of_ones_own_is_not_run(
    tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch, modality: str
) -> None:
    """Its processor is loaded by another way."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    made = backbone((vit_folder if modality == "image" else bert_folder)(tmp_path / "m"), modality)
    task = Task("single_label_classification", modality, AB)
    own = load_backbone(Wrapped(made.model), task, processor=made.processor)
    folder = save_pretrained(own, task, tmp_path / "saved")
    file = "preprocessor_config.json" if modality == "image" else "tokenizer_config.json"
    (folder / "config.json").write_text('{"model_type": "homemade"}')
    bring_code(folder, trace, file, "config.json")
    change(folder / file, image_processor_type="Homemade", tokenizer_class="Homemade")
    with pytest.raises((FinetuneError, ValueError)):
        load(folder, module=Wrapped(made.model))
    assert not trace.exists()


class Wrapped(torch.nn.Module):
    """A module of somebody's own."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: Any = None, **inputs: Any) -> Any:
        named = inputs if pixel_values is None else {"pixel_values": pixel_values}
        return self.inner(**named).logits


def bring_code(folder: Path, trace: Path, *files: str) -> None:
    """Code beside the weights that the configs ask for."""
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    names = (
        "AutoConfig",
        "AutoModelForSequenceClassification",
        "AutoModelForImageClassification",
        "AutoImageProcessor",
    )
    told = {name: "evil.Evil" for name in names} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for file in files:
        change(folder / file, auto_map=told)


def change(file: Path, **values: Any) -> None:
    """Write values into a JSON file, where there is one."""
    if file.is_file():
        file.write_text(json.dumps(json.loads(file.read_text()) | values))


# Paths


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A picture that lies beside the data, and is none of it."""
    Image.new("RGB", (24, 24), "white").save(tmp_path / "secret.png")
    return tmp_path / "secret.png"


@pytest.fixture
def photos(tmp_path: Path, squares: Path) -> Path:
    return Path(shutil.copytree(squares / "train", tmp_path / "photos"))


def rows_of(photos: Path, secret: Path, *, absolute: bool = True) -> tuple[list[str], list[str]]:
    files = sorted(photos.rglob("*.png"))
    shown = [str(file if absolute else file.relative_to(photos)) for file in files]
    return [*shown, str(secret), "../secret.png"], [*(file.parent.name for file in files), "red", "red"]


def test_a_parquet_file_does_not_read_pictures_elsewhere(photos: Path, secret: Path) -> None:
    paths, labels = rows_of(photos, secret)
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    cells = [{"path": path, "bytes": None} for path in paths]
    data = datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)
    pq.write_table(data.data.table, photos / "photos.parquet")
    splits = finetune.load_images(photos / "photos.parquet")
    assert sum(splits.n.values()) == len(paths) - 2
    assert {entry.reason.partition(":")[0] for entry in splits.report.left_out} == {
        "path leads outside the data folder"
    }


def test_a_data_set_of_the_hub_does_not_read_pictures_elsewhere(
    photos: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pictures lie where `datasets` keeps what it fetched: here, that is the folder of the photos."""
    paths, labels = rows_of(photos, secret)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)
    monkeypatch.setattr(sources, "downloads", lambda: photos)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=data))
    assert len(finetune.load_images("owner/name").report.left_out) == 2
    facts = Facts(photos, {"task": {"kind": "single_label_classification"}}, {
        "data": {"source": "owner/name", "columns": {"image": "image", "label": "label"}}
    })  # fmt: skip
    from finetune.output.card_examples import public_rows

    data = data.select([len(paths) - 2, 0])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=data))
    assert list(map(str, public_rows(facts))) == [paths[0]]  # what a card would show to everybody


@pytest.mark.parametrize("change_", ["rows", "splits"])
def test_a_saved_data_set_does_not_read_rows_elsewhere(tmp_path: Path, change_: str) -> None:
    rows = [{"text": f"film {i}", "label": "ab"[i % 2]} for i in range(20)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    if change_ == "rows":
        next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "other.arrow")
        change(tmp_path / "saved" / "state.json", _data_files=[{"filename": "../other.arrow"}])
    else:
        (tmp_path / "saved").rename(tmp_path / "other")
        (tmp_path / "saved").mkdir()
        (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["../other"]}))
    with pytest.raises(DataError, match="which lies elsewhere; do not use this data set"):
        finetune.load_table(tmp_path / "saved")


def test_a_table_to_predict_for_does_not_read_pictures_elsewhere(tmp_path: Path, photos: Path, secret: Path) -> None:
    task = Task("single_label_classification", "image", AB)
    folder = timm_folder(tmp_path / "timm", "test_resnet", cfg={"input_size": [3, 32, 32]})
    model = load(save_pretrained(load_backbone(folder, task), task, tmp_path / "model"))
    (photos / "table.csv").write_text("image\nred/0.png\n../secret.png\n" + f"{secret}\n")
    found = model.predict(photos / "table.csv")
    assert [one.error and one.error.partition(":")[0] for one in found] == [
        None, "path leads outside the data folder", "path leads outside the data folder",
    ]  # fmt: skip


@pytest.mark.parametrize("argument", ["checkpoint_path", "cache_dir", "pretrained_cfg"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_config_names_no_file_elsewhere(tmp_path: Path, trace: Path, argument: str, wrapped: bool) -> None:
    """timm would load such a file into the model; transformers hands these arguments on to it."""
    folder = timm_folder(tmp_path / "m", "test_resnet")
    torch.save({"weight": Evil(trace)}, tmp_path / "evil.pth")
    change(folder / "config.json", model_args={argument: str(tmp_path / "evil.pth")})
    if wrapped:
        change(folder / "config.json", model_type="timm_wrapper")
    with pytest.raises(BackboneError, match=f"model_args names a {argument}; do not use this model"):
        backbone(folder, "image")


def test_a_config_names_no_architecture_elsewhere(tmp_path: Path) -> None:
    other = timm_folder(tmp_path / "other", "test_resnet")
    folder = timm_folder(tmp_path / "m", "test_resnet")
    change(folder / "config.json", model_type="timm_wrapper", architecture=f"local-dir:{other}")
    with pytest.raises(BackboneError, match="lies elsewhere; do not use this model"):
        backbone(folder, "image")


def test_an_adapter_beside_a_model_does_not_lead_to_another_one(tmp_path: Path) -> None:
    other, folder = bert_folder(tmp_path / "other"), bert_folder(tmp_path / "m")
    told = {"peft_type": "LORA", "base_model_name_or_path": str(other), "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(BackboneError, match="beside the model lies an adapter"):
        backbone(folder, "text")


# Bombs


def packed(width: int, height: int, claimed: tuple[int, int] | None = None) -> bytes:
    """A black PNG of one bit a pixel."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer, line = zlib.compressobj(1), b"\0" * (1 + (width + 7) // 8)
    body = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", *(claimed or (width, height)), 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (packed(8, 8, (100_000, 100_000)), "more pixels than can be read safely"),
        (packed(1, 60_000), "more than 300 times as long as wide"),
        (packed(2_000_000, 1), "more than 300 times as long as wide"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n%%EndComments\nshowpage\n%%EOF\n",
            "EPS is not supported",
        ),
    ],
    ids=["huge", "tall", "wide", "program"],
)
def test_bombs_among_pictures(tmp_path: Path, photos: Path, content: bytes, reason: str) -> None:
    """A small file that would become gigabytes, decoded or made as high as the backbone wants it; a program."""
    with pytest.raises(BadImage, match=reason):
        open_image(content)
    (photos / "red" / "bomb.png").write_bytes(content)
    assert [entry.id for entry in finetune.load_images(photos).report.left_out] == ["red/bomb.png"]


def test_a_picture_is_no_pipe(photos: Path) -> None:
    """Opening one waits until somebody writes to it."""
    import os

    os.mkfifo(photos / "red" / "pipe.png")
    (photos / "red" / "zero.png").symlink_to("/dev/zero")
    reasons = {entry.id: entry.reason for entry in finetune.load_images(photos).report.left_out}
    assert reasons == {"red/pipe.png": "file not found", "red/zero.png": "file not found"}


def bert_like(folder: Path, **config: Any) -> Path:
    bert_folder(folder)
    change(folder / "config.json", **config)
    return folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"vocab_size": 40_000_000}, "describes 1.28e\\+03 M parameters, but its weights are of"),
        ({"num_hidden_layers": 10_000}, "10000 layers are more than its weights hold"),
        ({"num_labels": 10**8}, "num_labels is 100000000"),
    ],
)
def test_a_config_out_of_all_proportion_takes_no_memory(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(BackboneError, match=said):
        backbone(bert_like(tmp_path / "m", **config), "text")


def test_a_config_of_timm_out_of_all_proportion_takes_no_memory(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "m", "test_resnet")
    change(folder / "config.json", num_classes=10**8)
    with pytest.raises(BackboneError, match="num_classes is 100000000"):
        load_backbone(folder)
    change(folder / "config.json", num_classes=5, model_args={"channels": [8, 8, 8, 200_000]})
    with pytest.raises(BackboneError, match="M parameters, but its weights are of"):
        load_backbone(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    folder = bert_folder(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][0, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"no numbers \(bert.encoder.layer.1.output.dense.weight\)"):
        backbone(folder, "text")


# Tokens


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"--token {TOKEN} --lr 1", "--token *** --lr 1"),
        (f"--token={TOKEN} https://me:pass@host/x", "--token=*** https://***@host/x"),
        ("a shelf_life of 3, hf_short", "a shelf_life of 3, hf_short"),
        ("hf_hub_id of hf-internal-testing/tiny", "hf_hub_id of hf-internal-testing/tiny"),
        ("a name at https://host/a@b", "a name at https://host/a@b"),
    ],
)
def test_secrets_are_taken_out_and_nothing_else(text: str, kept: str) -> None:
    assert without_secrets(text) == kept
    assert str(RunError(f"{text}; try again")) == f"{kept}; try again"


def test_no_token_in_an_error() -> None:
    with pytest.raises(BackboneError) as raised:
        load_backbone(f"https://me:{TOKEN}@huggingface.co/owner/name")
    assert TOKEN not in str(raised.value) + repr(raised.value) and "***" in str(raised.value)


def test_no_token_in_a_command_line_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(data: str) -> None:
        """Do nothing."""

    monkeypatch.setattr(sys, "argv", ["x.py", "--data", "a", "--token", TOKEN])
    with pytest.raises(SystemExit) as ended:
        finetune.cli(main)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and "leave the token out" in said.err
    assert TOKEN[:10] not in said.err


# A run with the names that people give


def test_a_run_keeps_no_token_and_no_markup(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of classes and files, and texts, go into a report and a card as they are, and as nothing else."""
    labels = [NASTY[i % 4] for i in range(32)]
    table = tmp_path / "<i>reviews.jsonl"
    rows = [{"text": f"film {i} {NASTY[0]}", "label": label} for i, label in enumerate(labels)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test = tmp_path / "<b>test.jsonl"
    test.write_text("".join(json.dumps({**row, "text": "a " + row["text"]}) + "\n" for row in rows[:8]))
    monkeypatch.setattr(sys, "argv", ["x.py", "--data", str(table), f"--hf-token={TOKEN}", "<u>"])
    splits = finetune.load_table(table, test=test)
    run = finetune.fit(splits, bert, out=tmp_path / "run", epochs=1, batch_size=16, settings={"replay": "off"})
    page = write_report(run.folder, run.folder / "report.html").read_text()
    card = make_card(Facts.of(run.folder / "model"), "me/reviews", examples=[f"good {NASTY[0]}"])
    for tag in ("<script>", "<img src=x", "<i>reviews", "<b>test", "</table><b>", "<u>"):
        assert tag not in page, tag
        shown = card.text.split("\n---\n", 1)[1]
        assert tag not in re.sub(r"```.*?```", "", shown, flags=re.S), tag  # code blocks show what is in them
    assert str(escape(NASTY[0])) in page and str(escape("<b>test.jsonl:")) in page
    for file in (path for path in tmp_path.rglob("*") if path.is_file() and "run" in path.parts):
        assert TOKEN.encode() not in file.read_bytes(), file
    assert "--hf-token=***" in json.loads((run.folder / "run.json").read_text())["command"]
    assert TOKEN not in card.text + run.push_to_hub("me/reviews", dry_run=True)


def test_no_token_in_the_record(tmp_path: Path, square_splits: Any, resnet: Path) -> None:
    """Not in the name of the data or the backbone either; and the same request is still the same."""
    from dataclasses import replace

    from finetune.output.record import identity_of
    from finetune.plan.settings import choose_settings

    pretrained = replace(load_backbone(resnet, square_splits.task), name=f"https://x:{TOKEN}@h/m")
    splits = replace(square_splits, source=f"https://x:{TOKEN}@h/d")
    identity = identity_of(splits, pretrained.name, {}, None, 0)
    record = starting_record(splits, pretrained, choose_settings("image", 10), identity, 1, 0)
    assert TOKEN not in json.dumps(record, default=str)
    assert identity == identity_of(splits, pretrained.name, {}, None, 0)


def test_a_run_that_is_damaged_is_said_to_be(tmp_path: Path) -> None:
    for content in ("[]", "{}", "{", '{"task": 1}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(RunError, match=re.escape(str(tmp_path))):
            write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_jpeg_of_the_card_has_no_place(tmp_path: Path) -> None:
    """What a camera wrote into a picture stays out of the repository."""
    from finetune.output.card_examples import _as_jpeg

    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert b"home" in (tmp_path / "a.jpg").read_bytes()
    assert b"home" not in _as_jpeg(tmp_path / "a.jpg")
    assert not Image.open(io.BytesIO(_as_jpeg(tmp_path / "a.jpg"))).getexif()
