"""A saved model predicts as it was evaluated, on whatever it is given; what cannot be read stops nothing."""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from finetune.data.images import eval_transform
from finetune.data.task import Task, predictions
from finetune.errors import BackboneError, DataError, RunError
from finetune.model.backbones import load_backbone
from finetune.model.pretrained import Preprocessing, Pretrained
from finetune.output.export import save_pretrained
from finetune.output.predict import Prediction, Predictor, load
from tests.tiny import bert_folder, timm_folder, vit_folder

SINGLE, MULTI, REGRESSION, TOKENS = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
    "token_classification",
)
TEXTS = ["a very good film", "bad", "dull and bad story of paris", "good"]


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    (folder / "deeper").mkdir()
    picture(3).save(folder / "deeper" / "3.png")
    (folder / "bad.jpg").write_text("no picture")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.md").write_text("no picture either")
    return folder


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    root = tmp_path_factory.mktemp("vision")
    task = Task(SINGLE, "image", ("cat", "dog", "eel"))
    loaded = load_backbone(timm_folder(root / "from", "test_resnet"), task, image_size=32)
    save_pretrained(loaded, task, root / "run" / "model")
    return load(root / "run", device="cpu")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert") / "m")


def reader(bert: Path, kind: str, *labels: str) -> Predictor:
    task = Task(kind, "text", labels)
    loaded = load_backbone(bert, task)
    torch.nn.init.normal_(loaded.model.classifier.weight, generator=torch.Generator().manual_seed(1))
    loaded.model.eval()
    return Predictor(loaded, task)


def logits(loaded: Pretrained, text: str) -> np.ndarray:
    with torch.no_grad():
        return loaded.forward(dict(loaded.processor([text], return_tensors="pt"))).numpy()  # type: ignore[operator]


# Images


def test_a_folder_of_images(vision: Predictor, photos: Path) -> None:
    got = vision.predict(photos, batch_size=2)
    names = ["0.png", "1.png", "2.png", "bad.jpg", "deeper/3.png", "empty.jpg"]
    assert [one.input for one in got] == [str(photos / name) for name in names]
    assert [one.error for one in got] == [None, None, None, "not an image", None, "empty file"]
    transform = eval_transform(vision.pretrained.processor)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = vision.pretrained.model(transform(picture(1))[None]).softmax(-1)[0]
    assert list(got[1].probabilities or ()) == ["cat", "dog", "eel"]
    assert list((got[1].probabilities or {}).values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert got[1].label == vision.task.labels[int(expected.argmax())] and got[1].score == pytest.approx(
        float(expected.max())
    )


def test_images_of_every_kind(vision: Predictor, photos: Path) -> None:
    path = photos / "0.png"
    one = vision.predict(path)[0].probabilities
    for given in (str(path), [path], [str(path)], Image.open(path), [Image.open(path)], picture(0)):
        got = vision.predict(given)
        assert len(got) == 1 and got[0].probabilities == pytest.approx(one, abs=1e-6)
    assert vision.predict([picture(0), picture(1)])[1].input == "image 1"
    clear = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
    white = Image.new("RGB", (40, 30), "white")
    assert vision.predict(clear)[0].probabilities == vision.predict(white)[0].probabilities


def test_unreadable_images(vision: Predictor, photos: Path, tmp_path: Path) -> None:
    got = vision.predict([photos / "0.png", photos / "gone.png", 17, None, photos / "bad.jpg"])
    assert got[0].error is None
    assert [one.error for one in got[1:]] == [
        "file not found",
        "neither a path nor an image",
        "nothing given",
        "not an image",
    ]
    assert dict(got[1]) == {"input": str(photos / "gone.png"), "error": "file not found"}
    with pytest.raises(DataError, match="no images in this folder; give a folder with .jpg or .png files"):
        vision.predict(tmp_path)


def test_a_table_of_images(vision: Predictor, photos: Path) -> None:
    table = photos / "list.csv"
    table.write_text("photo,label\n0.png,cat\ndeeper/3.png,dog\ngone.png,dog\n,eel\n0.png,cat,surplus\n")
    got = vision.predict(table)
    assert [one.input for one in got] == ["0.png", "deeper/3.png", "gone.png", "list.csv:5", "list.csv:6"]
    assert [one.error for one in got[:4]] == [None, None, "file not found", "nothing given"] and got[4].error
    assert got[0].probabilities == pytest.approx(vision.predict(photos / "0.png")[0].probabilities)
    pictures = datasets.Dataset.from_dict({"image": [str(photos / "0.png")]}).cast_column("image", datasets.Image())
    assert vision.predict(pictures)[0].label == got[0].label
    table.unlink()


def test_predicting_leaves_the_mode_of_the_model(vision: Predictor, photos: Path) -> None:
    vision.pretrained.model.train()
    before = vision.predict(photos / "0.png")
    assert vision.pretrained.model.training
    vision.pretrained.model.eval()
    assert vision.predict(photos / "0.png") == before


# Texts


def test_texts_in_order_whatever_their_length(bert: Path) -> None:
    predictor = reader(bert, SINGLE, "bad", "good")
    got = predictor.predict([*TEXTS, "  ", None], batch_size=2)
    assert [one.input for one in got] == [*TEXTS, "  ", None]
    for text, one in zip(TEXTS, got[:4], strict=True):
        expected = predictions(predictor.task, logits(predictor.pretrained, text))[0]
        assert list((one.probabilities or {}).values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert dict(one).keys() == {"input", "label", "score", "probabilities"}
        assert one["label"] == one.label and pytest.raises(KeyError, one.__getitem__, "value")
    assert [one.error for one in got[4:]] == ["empty text", "nothing given"]
    assert predictor.predict("good")[0].probabilities == pytest.approx(got[3].probabilities, abs=1e-5)
    assert predictor.predict([]) == []


def test_several_labels_and_numbers(bert: Path) -> None:
    predictor = reader(bert, MULTI, "x", "y", "z")
    one = predictor.predict("a good film")[0]
    expected = 1 / (1 + np.exp(-logits(predictor.pretrained, "a good film")[0]))
    assert one.labels == tuple(name for name, p in zip("xyz", expected, strict=True) if p >= 0.5)
    assert one.score == pytest.approx(expected.max(), abs=1e-5)
    predictor = reader(bert, REGRESSION, "rating")
    one = predictor.predict("a good film")[0]
    assert one.value == pytest.approx(logits(predictor.pretrained, "a good film").item(), abs=1e-5)
    assert one.values == {"rating": one.value} and one.label is None
    two = reader(bert, REGRESSION, "rating", "length").predict("a good film")[0]
    assert two.value is None and list(two.values or {}) == ["rating", "length"]


def test_pairs(bert: Path, tmp_path: Path) -> None:
    predictor = reader(bert, SINGLE, "same", "other")
    expected = predictor.predict(("good film", "bad film"))[0]
    other = predictor.predict(("bad film", "good film"))[0]
    assert expected.probabilities != other.probabilities
    assert (
        predictor.predict([("good film", "bad film"), {"text": "bad film", "text_pair": "good film"}])[1].label
        == other.label
    )
    (tmp_path / "pairs.csv").write_text("text_a,text_b\ngood film,bad film\n")
    assert predictor.predict(tmp_path / "pairs.csv")[0].probabilities == pytest.approx(expected.probabilities)


def test_tables_of_texts(bert: Path, tmp_path: Path) -> None:
    predictor = reader(bert, SINGLE, "bad", "good")
    table = tmp_path / "texts.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "review", "stars"], *([i, text, 3] for i, text in enumerate([*TEXTS, ""]))])
    got = predictor.predict(table)
    assert [one.input for one in got] == [*TEXTS, ""] and [one.error for one in got] == [None] * 4 + ["empty text"]
    assert [one.label for one in got[:4]] == [one.label for one in predictor.predict(TEXTS)]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"what": text, "why": text, "how": text}) + "\n" for text in TEXTS)
    )
    with pytest.raises(DataError, match=r"no text column found; the columns are .*; name it with column="):
        predictor.predict(tmp_path / "texts.jsonl")
    assert [one.label for one in predictor.predict(tmp_path / "texts.jsonl", column="why")] == [
        one.label for one in got[:4]
    ]
    with pytest.raises(DataError, match=r"no column 'who'; the columns are .*; name one with column="):
        predictor.predict(tmp_path / "texts.jsonl", column="who")
    assert predictor.predict(datasets.Dataset.from_dict({"text": TEXTS}))[0].label == got[0].label
    assert predictor.predict("no.csv")[0].input == "no.csv"  # no such file: a text


def test_tags(bert: Path) -> None:
    predictor = reader(bert, TOKENS, "O", "B-place", "B-person")
    words = "marie visited paris".split()
    one, same, joined = (
        predictor.predict(given)[0] for given in ([words], ["marie visited paris"], "marie visited paris")
    )
    assert one.tags == same.tags == joined.tags and len(one.tags or ()) == 3
    encoded = predictor.pretrained.processor([words], is_split_into_words=True, return_tensors="pt")  # type: ignore[operator]
    with torch.no_grad():
        output = predictor.pretrained.forward(dict(encoded))[0].softmax(-1)
    first = [encoded.word_ids(0).index(i) for i in range(3)]
    assert list(one.tags or ()) == [predictor.task.labels[int(output[i].argmax())] for i in first]
    assert one.score == pytest.approx(float(output[first].max(-1).values.mean()), abs=1e-5)
    long, odd = predictor.predict([["paris"] * 100, ["a", "\u200b", "film"]])
    assert len(long.tags or ()) == 100 and (long.tags or ())[61] and (long.tags or ())[62] is None  # 64 less two
    assert (odd.tags or ())[1] is None and (odd.tags or ())[2] is not None  # a word without a piece


# Loading


def test_load_needs_no_notes(tmp_path: Path, bert: Path) -> None:
    cases = [
        (Task(SINGLE, "image", ("cat", "dog")), timm_folder(tmp_path / "timm", "test_resnet")),
        (Task(MULTI, "image", ("cat", "dog")), timm_folder(tmp_path / "timm2", "test_resnet")),
        (Task(REGRESSION, "image", ("age",)), timm_folder(tmp_path / "timm3", "test_resnet")),
        (Task(SINGLE, "image", ("cat", "dog")), vit_folder(tmp_path / "vit")),
        (Task(MULTI, "text", ("x", "y")), bert),
        (Task(REGRESSION, "text", ("rating",)), bert),
        (Task(TOKENS, "text", ("O", "B-x", "I-x")), bert),
    ]
    for i, (task, folder) in enumerate(cases):
        saved = save_pretrained(load_backbone(folder, task), task, tmp_path / f"saved{i}")
        assert load(saved, device="cpu").task == task
        (saved / "finetune.json").unlink()
        assert load(saved, device="cpu").task == task
    with pytest.raises(BackboneError, match="BertModel has no classifier; give the folder of a trained model"):
        load(bert)
    bare = timm_folder(tmp_path / "bare", "test_resnet", num_classes=0)
    with pytest.raises(BackboneError, match="a backbone without a classifier; give the folder of a trained model"):
        load(bare)
    with pytest.raises(
        RunError, match=f"^{tmp_path}/gone: no such folder, and no model of this name on the Hub; check the path$"
    ):
        load(tmp_path / "gone")


class SpeciesAndAge(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.species, self.age = nn.Linear(features, 3), nn.Linear(features, 1)

    def forward(self, x_BF: Tensor) -> dict[str, Tensor]:
        return {"species": self.species(x_BF), "age": self.age(x_BF).squeeze(-1)}


def test_custom_heads(tmp_path: Path, bert: Path, photos: Path) -> None:
    for task, backbone, given in (
        (
            Task(REGRESSION, "image", ("species", "age")),
            timm_folder(tmp_path / "timm", "test_resnet"),
            photos / "0.png",
        ),
        (Task(REGRESSION, "text", ("species", "age")), bert, "a good film"),
    ):
        loaded = load_backbone(backbone, task, head=SpeciesAndAge)
        folder = save_pretrained(loaded, task, tmp_path / task.modality)
        expected = Predictor(loaded, task).predict(given)[0]
        assert len((expected.values or {})["species"]) == 3 and isinstance((expected.values or {})["age"], float)
        assert load(folder, head=SpeciesAndAge, device="cpu").predict(given) == [expected]
        with pytest.raises(RunError) as caught:
            load(folder)
        told = f"{folder}: was trained with a head of your own; give it: load(folder, head=SpeciesAndAge)"
        assert str(caught.value) == told
        with pytest.raises(RunError, match="does not fit Linear .*; give the module that was trained"):
            load(folder, head=lambda features: nn.Linear(features, 2))


class Convolutions(nn.Module):
    def __init__(self, width: int = 5):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("width", [5, 3])  # with the linear head that a module gets, and with its own outputs
def test_modules(tmp_path: Path, photos: Path, width: int) -> None:
    task = Task(SINGLE, "image", ("cat", "dog", "eel"))
    given = Preprocessing((16, 16), (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "bilinear", 0.9)
    loaded = load_backbone(Convolutions(width), task, processor=given)
    folder = save_pretrained(loaded, task, tmp_path / "m")
    expected = Predictor(loaded, task).predict(photos / "0.png")
    again = load(folder, module=Convolutions(width), device="cpu")
    assert again.pretrained.processor == given and again.predict(photos / "0.png") == expected
    with pytest.raises(RunError) as caught:
        load(folder)
    told = f"{folder}: holds weights of a module of your own; give it: load(folder, module=Convolutions())"
    assert str(caught.value) == told


def test_a_prediction_reads_like_a_dictionary() -> None:
    assert dict(Prediction("x", value=0.0, values={"y": 0.0})) == {"input": "x", "value": 0.0, "values": {"y": 0.0}}
