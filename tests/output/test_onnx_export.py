"""An ONNX file answers as the model does, by itself; a file that does not is never there."""

import csv
import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

import finetune
from finetune import verbs_cli
from finetune.data.task import Task
from finetune.errors import RunError
from finetune.model.backbones import load_backbone
from finetune.model.pretrained import Preprocessing
from finetune.output import onnx_export, onnx_rows, onnx_ways
from finetune.output.export import save_pretrained
from finetune.output.onnx_export import difference, export_onnx
from finetune.output.onnx_ways import NotExported
from finetune.output.predict import Predictor, load
from tests.output.test_export import shaken
from tests.output.test_predict import SpeciesAndAge
from tests.tiny import tokenizer, vit_folder

SINGLE, MULTI, VALUE, TAGS = (
    "single_label_classification", "multi_label_classification", "regression", "token_classification",
)  # fmt: skip
TEXTS = ["a very good film", "bad", "dull and bad story of paris, and not a good one", "good", "the end of marie"]


def session(file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def told(file: Path) -> dict[str, Any]:
    """What the file says of itself."""
    found = session(file).get_modelmeta().custom_metadata_map
    return {key: json.loads(value) if value[0] == "{" and key != "tokenizer" else value for key, value in found.items()}


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def ask_texts(file: Path, texts: list[Any]) -> np.ndarray:
    """Logits, from nothing but the file."""
    tokenizer = Tokenizer.from_str(told(file)["tokenizer"])
    found = tokenizer.encode_batch(texts)
    columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    opened = session(file)
    feed = {one.name: np.array([getattr(row, columns[one.name]) for row in found]) for one in opened.get_inputs()}
    return opened.run(["logits"], feed)[0]


def ask_images(file: Path, images: list[Image.Image]) -> np.ndarray:
    """Logits, from nothing but the file; for crop_mode "center"."""
    how = told(file)["preprocessing"]
    height, width = how["size"]
    batch = []
    for image in images:
        scale = int(height / how["crop_pct"]) / min(image.size)
        resample = Image.Resampling[how["interpolation"].upper()]
        image = image.resize((round(image.width * scale), round(image.height * scale)), resample)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
        batch.append(((pixels - how["mean"]) / how["std"]).transpose(2, 0, 1))
    return session(file).run(["logits"], {"pixel_values": np.stack(batch).astype(np.float32)})[0]


@pytest.fixture(scope="module")
def text_run(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> finetune.Run:
    root = tmp_path_factory.mktemp("texts")
    words = {"good": ["good", "bright", "very good"], "bad": ["bad", "dull", "not very bright"]}
    rows = [
        [f"{a} {b} {'of paris' * (i % 3)}", label]
        for label, some in words.items() for i, a in enumerate(some) for b in ("film", "story", "story of marie")
    ]  # fmt: skip
    with (root / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["said", "verdict"], *rows])
    data = finetune.load_table(root / "reviews.csv", text="said", label="verdict")
    return finetune.fit(data, bert, out=root / "run", epochs=1, settings={"batch_size": 8})


def test_a_text_model_by_itself(text_run: finetune.Run) -> None:
    file = text_run.to_onnx()
    assert file == text_run.folder / "model.onnx" and [one.name for one in session(file).get_outputs()] == ["logits"]
    assert {one.name: one.shape for one in session(file).get_inputs()} == {
        name: ["batch", "sequence"] for name in ("input_ids", "attention_mask")
    }
    onnx.checker.check_model(file)
    for texts in (TEXTS, TEXTS[1:2], ["bad " * 100, "good"]):
        found = softmax(ask_texts(file, texts))
        labels = told(file)["id2label"]
        for row, said in zip(found, text_run.predict(texts), strict=True):
            assert {labels[str(i)]: p for i, p in enumerate(row)} == pytest.approx(said.probabilities, abs=1e-5)
    assert told(file)["task"] == SINGLE and "finetune-onecycle" in told(file)["producer"]


def test_an_image_model_by_itself(
    resnet: Path, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finetune.fit(squares, resnet, out=tmp_path / "run", epochs=1, settings={"batch_size": 12})
    capsys.readouterr()
    verbs_cli.onnx(str(run.folder))
    file = run.folder / "model.onnx"
    out, err = capsys.readouterr()
    assert out.startswith(f"{file}: ") and f" of PyTorch on rows of {squares / 'test'}" in out and err == ""
    assert session(file).get_inputs()[0].shape == ["batch", 3, 32, 32]
    images = [Image.open(path).resize((40, 56)) for path in sorted((squares / "test").rglob("*.png"))]
    for some in (images, images[:1]):
        found = softmax(ask_images(file, some))
        expected = [list(one.probabilities.values()) for one in run.predict(some)]  # type: ignore[union-attr]
        assert np.abs(found - expected).max() < 2e-3  # timm rounds the resized picture differently by a grey level
    assert told(file)["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    with pytest.raises(RunError, match=r"model.onnx: is there already; .* or replace it with --overwrite"):
        verbs_cli.onnx(str(run.folder))
    verbs_cli.onnx(str(run.folder / "model"), out=file, overwrite=True)
    assert "rows of" in capsys.readouterr().out
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".")]


class Reader(nn.Module):
    """Tokens [B, T] -> [B, T, 3], or their mean."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.embedding, self.linear, self.pooled = nn.Embedding(96, 8), nn.Linear(8, 3), pooled

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask_BT1 = attention_mask[..., None].float()
        x_BTF = self.linear(self.embedding(input_ids).cumsum(1))
        return (x_BTF * mask_BT1).sum(1) / mask_BT1.sum(1) if self.pooled else x_BTF


@pytest.mark.parametrize(("kind", "side"), [(VALUE, "right"), (TAGS, "left")])
def test_values_and_tags(tmp_path: Path, kind: str, side: str) -> None:
    of, words = Task(kind, "text", ("x", "y", "z")), tokenizer()
    words.padding_side, words.model_max_length = side, 12
    predictor = Predictor(load_backbone(Reader(kind == VALUE), of, processor=words), of)
    alone = Tokenizer.from_str(onnx_export.facts(predictor)["tokenizer"])
    assert alone.truncation["max_length"] == 12 and alone.padding["direction"] == side
    assert export_onnx(predictor, tmp_path / "m.onnx").rows == "made-up texts"
    found = ask_texts(tmp_path / "m.onnx", TEXTS)
    inputs = words(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = predictor.pretrained.forward(dict(inputs)).numpy()
    assert inputs["input_ids"].shape[1] == 12 and found.shape == expected.shape
    assert np.allclose(found, expected, atol=1e-5)


def test_transformers_images_and_heads_of_ones_own(resnet: Path, tmp_path: Path) -> None:
    of = Task(SINGLE, "image", ("cat", "dog"))
    predictor = Predictor(shaken(load_backbone(vit_folder(tmp_path / "vit"), of)), of)
    implementation = predictor.pretrained.model.config._attn_implementation  # type: ignore[union-attr]
    state = {name: tensor.clone() for name, tensor in predictor.pretrained.model.state_dict().items()}
    predictor.pretrained.model.train()
    export_onnx(predictor, tmp_path / "vit.onnx")
    how = told(tmp_path / "vit.onnx")["preprocessing"]
    assert how["mean"] == [0.4, 0.5, 0.6] and how["size"] == [32, 32] and how["crop_mode"] == "squash"
    model = predictor.pretrained.model
    assert model.training and model.config._attn_implementation == implementation  # type: ignore[union-attr]
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)

    own = load_backbone(resnet, head=SpeciesAndAge)
    own.model.train()
    export_onnx(Predictor(own, Task(VALUE, "image", ("species", "age"))), tmp_path / "own.onnx")
    shapes = {one.name: one.shape for one in session(tmp_path / "own.onnx").get_outputs()}
    assert shapes == {"species": ["batch", 3], "age": ["batch"]} and own.model.training
    x = torch.randn(5, 3, 32, 32)
    own.model.eval()
    with torch.no_grad():
        expected = own.forward({"pixel_values": x})
    found = session(tmp_path / "own.onnx").run(["species", "age"], {"pixel_values": x.numpy()})
    for name, answer in zip(("species", "age"), found, strict=True):
        assert np.allclose(answer, expected[name], atol=1e-5), name


# What is refused


class Small(nn.Module):
    """Images [B, 3, 8, 8] -> [B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


class NoOperator(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.special.bessel_j0(x))


class OneSize(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + len(x)  # for ONNX, the number of examples in the trace


class Epsilon(Small):
    def forward(self, x: Tensor) -> Tensor:
        mean = super().forward(x)
        return mean * 0 / (mean * 0 + 1e-8) + mean


class OneLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.stack([self.embedding(input_ids[:, i]) for i in range(input_ids.shape[1])]).mean(0)


class Branch(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > 0 else x.mean((2, 3))[:, :2]


def own(module: nn.Module) -> Predictor:
    of = Task(SINGLE, "image", ("a", "b"))
    return Predictor(load_backbone(module, of, processor=Preprocessing((8, 8))), of)


def changed(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """The exporter writes a model that is `by` off in one weight."""

    def exported(pretrained: Any, *rest: Any) -> Any:
        with torch.no_grad():
            pretrained.model.linear.bias[0] += by
        return onnx_ways.by_torch(pretrained, *rest)

    monkeypatch.setattr(onnx_export, "WAYS", (exported,))


def test_a_changed_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "m.onnx"
    predictor = own(Small())
    with monkeypatch.context() as patch:
        changed(patch, 3e-4)
        with pytest.raises(RunError) as caught:
            export_onnx(predictor, file)
        assert re.sub(r"[123]x3x8x8", "SIZE", str(caught.value)) == (
            f"{file}: not written, because under onnxruntime its outputs for inputs of SIZE are 0.0003 from PyTorch's, "
            "and 1e-04 is allowed; use the model in PyTorch"
        )
    assert list(file.parent.iterdir()) == []
    export_onnx(predictor, file)
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        changed(patch, 3e-4)
        with pytest.raises(RunError, match="not written"):
            export_onnx(predictor, file, overwrite=True)
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1
    changed(monkeypatch, 1e-5)
    assert export_onnx(predictor, file, overwrite=True).difference == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (
            NoOperator,
            r"not written, because torch.onnx cannot express it \(no ONNX operator for [\w.]+bessel_j0\); use",
        ),
        (Branch, r"torch.onnx cannot express it \(GuardOnDataDependentSymNode: "),
    ],
)
def test_why_it_cannot_be_written(
    tmp_path: Path, module: type[Small], why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match=why) as caught:
        export_onnx(own(module()), tmp_path / "m.onnx")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_why_it_cannot_be_written_for_texts_of_any_length(tmp_path: Path) -> None:
    of = Task(SINGLE, "text", ("a", "b"))
    predictor = Predictor(load_backbone(OneLength(), of, processor=tokenizer()), of)
    with pytest.raises(RunError, match=r"\(its code fixes a size that has to vary to the \d+ of the example\); use"):
        export_onnx(predictor, tmp_path / "m.onnx")


def test_an_epsilon_that_the_optimiser_takes_for_zero(tmp_path: Path) -> None:
    export_onnx(own(Epsilon()), tmp_path / "m.onnx")
    x = torch.rand(4, 3, 8, 8)
    found = session(tmp_path / "m.onnx").run(None, {"pixel_values": x.numpy()})[0]
    assert np.isfinite(found).all()


def test_a_file_for_one_size_of_batch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter may fix what it saw in the trace without a word."""
    original = torch.onnx.export

    def fixed(*given: Any, dynamic_shapes: Any, **options: Any) -> Any:
        return original(*given, **options)

    monkeypatch.setattr(torch.onnx, "export", fixed)
    with pytest.raises(RunError, match=r"onnxruntime fails on inputs of 1x3x8x8 \(InvalidArgument: "):
        export_onnx(own(Small()), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="is a folder; give the name of a file"):
        export_onnx(own(Small()), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"m.onnx: cannot be written \(.*\); give another file with --out"):
        export_onnx(own(Small()), tmp_path / "file" / "m.onnx")
    with pytest.raises(RunError, match="gone: no such folder; check the path, or name the file to write with --out"):
        verbs_cli.onnx("gone")
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if "script" in name else True)
    with pytest.raises(RunError) as caught:
        export_onnx(own(Small()), tmp_path / "m.onnx")
    assert str(caught.value) == 'onnx: needs onnxscript; install with: pip install "finetune-onecycle[onnx]"'


# The check


def far(a: list[Any], b: list[Any], kind: str = SINGLE, batch: dict[str, Tensor] | None = None) -> float:
    return difference([batch or {"x": torch.zeros(len(a))}], [{"logits": np.array(a)}], [{"logits": np.array(b)}], kind)


def test_units_of_the_difference() -> None:
    assert far([[0.5, -20.0]], [[0.5, -20.001]]) == pytest.approx(5e-5)
    assert far([[0.5, -20.0]], [[0.50006, -20.0]]) == pytest.approx(6e-5)
    with pytest.raises(NotExported, match="0.0002 from PyTorch's"):
        far([[0.5, -20.0]], [[0.5002, -20.0]])
    with pytest.raises(NotExported, match="inf from PyTorch's"):
        far([[0.5]], [[np.nan]])
    with pytest.raises(NotExported, match=r"logits are of shape \[1, 1\] instead of \[1, 2\]"):
        far([[0.5, 1.0]], [[0.5]])
    # Shares of a millionth and house prices: a thousandth of their spread is too much
    for scale in (1e-6, 1e6):
        values = np.array([[1.0], [2.0], [4.0]]) * scale
        assert far(list(values), list(values + 1e-4 * scale), VALUE) == pytest.approx(1e-4 / 3)
        with pytest.raises(NotExported, match="0.001 from"):
            far(list(values), list(values + 3e-3 * scale), VALUE)
    assert far([[2000.0], [2000.0]], [[2000.001], [2000.0]], VALUE) == pytest.approx(5e-5)  # no spread: of their size
    mask = {"input_ids": torch.zeros(1, 2), "attention_mask": torch.tensor([[1, 0]])}
    assert far([[[1.0], [1.0]]], [[[1.0], [9.0]]], TAGS, mask) == 0.0  # padding says nothing
    with pytest.raises(NotExported):
        far([[[1.0], [1.0]]], [[[9.0], [1.0]]], TAGS, mask)


def test_rows_of_the_check(text_run: finetune.Run, bert: Path) -> None:
    predictor = load(text_run.folder, device="cpu")
    for given in (text_run.folder, text_run.folder / "model"):
        batches, where = onnx_rows.example_batches(predictor, given)
        assert where.startswith("rows of ") and where.endswith("reviews.csv")
        sizes = [tuple(batch["input_ids"].shape) for batch in batches]
        assert [size[0] for size in sizes] == [2, 1, 3] and sizes[1][1] < sizes[2][1]
        assert batches[2]["attention_mask"].min() == 0  # padded
    items, _ = onnx_rows.own_rows(predictor.task, text_run.folder)
    assert "bad film" in {item.strip() for item in items}
    batches, where = onnx_rows.example_batches(predictor, None)
    assert where == "made-up texts" and len({batch["input_ids"].shape[1] for batch in batches}) >= 2
    # Rows of one length say nothing about others.
    alike = [{"text": "good"}] * 5
    with (text_run.folder.parent / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["said", "verdict"], *[[row["text"], "good"] for row in alike]])
    assert onnx_rows.example_batches(predictor, text_run.folder)[1] == "made-up texts"
    (text_run.folder.parent / "reviews.csv").write_text("other,columns\n1,2\n")
    assert onnx_rows.own_rows(predictor.task, text_run.folder) == ([], "")


def test_pairs_are_found_by_the_columns_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,why,b,label\ngood film,x,bad film,1\ndull,y,bright,0\n")
    columns = {"text": "b", "text_pair": "a", "label": "label"}
    told = {"source": str(tmp_path / "t.csv"), "columns": columns}
    (tmp_path / "run.json").write_text(json.dumps({"data": told}))
    items, where = onnx_rows.own_rows(Task(SINGLE, "text", ("0", "1")), tmp_path)
    assert items == [("bad film", "good film"), ("bright", "dull")] and where == f"rows of {tmp_path / 't.csv'}"


class Fused(Small):
    fused_attn = True


def test_a_second_way_where_the_first_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused attention that the exporter gets wrong is replaced by plain steps."""
    original, seen = onnx_ways.by_torch, []

    def exported(pretrained: Any, *rest: Any, **options: Any) -> Any:
        seen.append(pretrained.model.fused_attn)
        if seen[-1]:
            raise NotExported("no fused attention today")
        return original(pretrained, *rest, **options)

    monkeypatch.setattr(onnx_ways, "by_torch", exported)
    monkeypatch.setattr(onnx_export, "WAYS", (exported, *onnx_ways.WAYS[1:]))
    predictor = own(Fused())
    assert export_onnx(predictor, tmp_path / "m.onnx").difference < 1e-5
    assert seen == [True, False] and predictor.pretrained.model.fused_attn


def test_ways_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = Task(SINGLE, "image", ("cat", "dog"))
    predictor = Predictor(shaken(load_backbone(vit_folder(tmp_path / "vit"), of)), of)
    with monkeypatch.context() as patch:
        vit, asked = replace(predictor.pretrained, model=deepcopy(predictor.pretrained.model)), []
        patch.setattr(onnx_ways, "by_torch", lambda *given, **options: asked.append(options))
        onnx_ways.by_torch_plainly(vit, {}, [])
        assert asked == [{"optimize": False}]
        assert {m.config._attn_implementation for m in vit.model.modules() if hasattr(m, "config")} == {"eager"}

    pytest.importorskip("transformers.exporters.exporter_onnx", reason="this version of transformers has no exporter")
    monkeypatch.setattr(onnx_export, "WAYS", (onnx_ways.by_transformers,))
    export_onnx(predictor, tmp_path / "m.onnx")
    opened = session(tmp_path / "m.onnx")
    (given,), (answer,) = opened.get_inputs(), opened.get_outputs()
    assert (given.name, given.shape) == ("pixel_values", ["batch", 3, 32, 32])
    assert (answer.name, answer.shape) == ("logits", ["batch", 2])


def test_many_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "SINGLE_FILE", 10)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(192, 300), nn.Linear(300, 2))
    of = Task(SINGLE, "image", ("a", "b"))
    predictor = Predictor(load_backbone(wide, of, processor=Preprocessing((8, 8))), of)
    found = export_onnx(predictor, tmp_path / "m.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"} and "0.2 MB" in str(found)
    x = torch.randn(5, 3, 8, 8)
    assert np.allclose(session(found.path).run(None, {"pixel_values": x.numpy()})[0], wide(x).detach(), atol=1e-5)
    monkeypatch.undo()
    export_onnx(predictor, tmp_path / "m.onnx", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_saved_models_by_their_folder(resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = Task(MULTI, "image", ("round", "blue"))
    folder = save_pretrained(load_backbone(resnet, of), of, tmp_path / "m")
    verbs_cli.onnx(str(folder))
    assert "on made-up images" in capsys.readouterr().out and told(folder / "model.onnx")["task"] == MULTI
    assert load(folder, device="cpu").task == of  # the file beside the weights confuses no loader
