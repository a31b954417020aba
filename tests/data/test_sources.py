import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from PIL import Image

from finetune.data.sources import load_dataset, load_images, load_table
from finetune.data.splits import Splits
from finetune.errors import DataError

Make = Callable[..., Path]


def ids(splits: Splits) -> set[str]:
    return {row_id for data in splits.named.values() for row_id in data["id"]}


def test_class_folders(folder: Make):
    splits = load_images(folder(cat=6, dog=6, **{"[odd] Name, ñ": 6}))
    assert splits.task.kind == "single_label_classification" and splits.task.modality == "image"
    assert splits.task.labels == ("[odd] Name, ñ", "cat", "dog")
    assert splits.n == {"train": 14, "valid": 4} and splits.test is None
    assert {"cat/0.png", "[odd] Name, ñ/5.png"} < ids(splits)
    assert set(splits.train.column_names) == {"id", "image", "target"}
    cell = splits.train[0]["image"]
    assert cell["bytes"] is None and Path(cell["path"]).is_file()
    assert splits.report.columns == {"image": "image", "label": "label"}


def test_folders_of_splits(folder: Make):
    root = folder("data/train", cat=6, dog=6).parent
    folder("data/val", cat=2, dog=2)
    folder("data/test", cat=3, dog=3)
    splits = load_images(root)
    assert splits.n == {"train": 12, "valid": 4, "test": 6}
    assert "val/cat/1.png" in ids(splits)
    assert load_dataset(str(root)).fingerprint == splits.fingerprint


def test_a_class_may_be_called_train(folder: Make):
    assert load_images(folder(train=5, plane=5)).task.labels == ("plane", "train")


def test_test_folder_without_classes_is_not_used(folder: Make, picture: Callable[..., Image.Image]):
    root = folder("data/train", cat=6, dog=6).parent
    (root / "test").mkdir()
    picture(99).save(root / "test" / "0.png")
    splits = load_images(root)
    assert splits.test is None
    assert splits.report.warnings == (f"{root / 'test'} has no class folders, so it is not used.",)


def test_nested_folders_hidden_files_and_others_are_no_trouble(folder: Make, picture: Callable[..., Image.Image]):
    root = folder(cat=6, dog=6)
    (root / "cat" / "more").mkdir()
    picture(99).save(root / "cat" / "more" / "x.JPG")
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "._1.png"):
        (root / "cat" / name).write_text("no picture")
    (root / "__MACOSX" / "cat").mkdir(parents=True)
    shutil.copy(root / "cat" / "0.png", root / "__MACOSX" / "cat" / "0.png")
    (root / "bird").mkdir()
    picture(98).save(root / "loose.png")
    (root / "dog" / "loop").symlink_to(root / "dog")
    splits = load_images(root)
    assert sum(splits.n.values()) == 13 and "cat/more/x.JPG" in ids(splits)
    assert [(entry.id, entry.reason) for entry in splits.report.left_out] == [
        ("loose.png", "lies outside the class folders")
    ]
    assert splits.report.warnings == (f"{root / 'bird'} holds no images.",)


def test_metadata_table_in_the_folder(folder: Make):
    root = folder(a=4, b=4)
    rows = [f"{kind}/{i}.png,{'xy'[i % 2]}" for kind in "ab" for i in range(4)]
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    splits = load_images(root)
    assert splits.task.labels == ("x", "y") and "metadata.csv:2" in ids(splits)


def test_table_of_image_paths(folder: Make, tmp_path: Path):
    folder("pics", a=10)
    rows = [f"pics/a/{i}.png,{i % 2},{i * 0.5}" for i in range(10)]
    (tmp_path / "t.csv").write_text("\n".join(["photo,kind,size", *rows]))
    splits = load_table(tmp_path / "t.csv", image="photo", label="kind")
    assert splits.task.labels == ("0", "1")
    assert load_images(tmp_path / "t.csv", label="size").task.kind == "regression"
    assert load_dataset(tmp_path / "t.csv", label="size").task.modality == "image"
    both = load_table(tmp_path / "t.csv", targets=["kind", "size"])
    assert both.task.labels == ("kind", "size") and both.train[0]["target"][1] in [i * 0.5 for i in range(10)]


@pytest.mark.parametrize("path", ["../outside.png", "/etc/hostname.png", "pics/../../outside.png"])
def test_paths_that_lead_outside_are_left_out(folder: Make, tmp_path: Path, path: str):
    root = folder("in/pics", a=8).parent
    shutil.copy(root / "pics" / "a" / "0.png", tmp_path / "outside.png")
    inside = (root / "pics" / "a" / "7.png").absolute()  # absolute, but in the folder
    rows = [f"pics/a/{i}.png,{i % 2}" for i in range(7)]
    (root / "t.csv").write_text("\n".join(["file,label", *rows, f"{inside},1", f"{path},1"]))
    splits = load_images(root / "t.csv")
    assert sum(splits.n.values()) == 8
    assert [(entry.id, entry.reason) for entry in splits.report.left_out] == [
        ("t.csv:10", f"path leads outside the data folder: {path}")
    ]


def test_folder_of_tables(reviews: Make):
    root = reviews(20, name="set/train.csv").parent
    reviews(4, name="set/test.csv", word="test")
    splits = load_table(root)
    assert splits.n == {"train": 16, "valid": 4, "test": 4}
    assert "test.csv:2" in splits.test["id"][:]  # type: ignore[index]
    (root / "dev.tsv").write_text("text\tclass\nx\tpos\n")
    with pytest.raises(DataError, match=r"set/dev.tsv: no column 'label', which train has; add it$"):
        load_table(root)
    (root / "test.csv").write_text("id,text\n1,x\n")
    reviews(4, name="set/dev.tsv", word="dev")  # commas in spite of the name
    splits = load_table(root)
    assert splits.n == {"train": 20, "valid": 4}
    assert splits.report.warnings == (f"{root / 'test.csv'} has no labels, so it is not used.",)


def test_the_only_table_of_a_folder(reviews: Make):
    assert load_dataset(reviews(name="set/all.csv").parent).n == {"train": 16, "valid": 4}


def test_two_files_for_one_split(reviews: Make):
    root = reviews(name="set/train.csv").parent
    reviews(name="set/train.jsonl")
    with pytest.raises(DataError, match=r"set: both train.csv and train.jsonl are named train; keep one$"):
        load_table(root)


def test_given_test_and_valid(reviews: Make):
    splits = load_table(
        reviews(20, name="a.csv"),
        test=reviews(6, name="b.csv", word="test"),
        valid=str(reviews(4, name="c.csv", word="valid")),
    )
    assert splits.n == {"train": 20, "valid": 4, "test": 6}


def test_given_test_folder_of_images(folder: Make):
    assert load_images(folder("a", cat=5, dog=5), test=folder("b", cat=2, dog=2)).n["test"] == 4


def test_datasets_in_memory_and_on_disk(tmp_path: Path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    data = datasets.Dataset.from_dict(
        {"text": [f"text {i}" for i in range(20)], "label": [0, 1] * 10}, features=features
    )
    splits = load_table(data)
    assert splits.task.labels == ("z", "a") and "train[3]" in ids(splits) and splits.source == "Dataset of 20 rows"
    data.save_to_disk(str(tmp_path / "one"))
    assert load_dataset(tmp_path / "one").fingerprint == splits.fingerprint
    hidden = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [-1, -1]}, features=features)
    many = datasets.DatasetDict(train=data, validation=data.select([0, 1]), test=hidden, unsupervised=hidden)
    splits = load_dataset(many)
    assert splits.n == {"train": 18, "valid": 2}  # test has no labels; two train rows are in valid
    assert splits.report.warnings[0] == "test has no labels, so it is not used."
    many.save_to_disk(str(tmp_path / "many"))
    assert load_dataset(str(tmp_path / "many")).n == splits.n


def test_shuffled_images_and_a_label_and_no_other_column(picture: Callable[..., Image.Image]):
    data = datasets.Dataset.from_dict({"image": [picture(index) for index in range(12)], "label": ["a", "b"] * 6})
    splits = load_dataset(data.shuffle(seed=0).select(range(2, 12)))
    assert len(splits.train) + len(splits.valid) == 10 and splits.task.labels == ("a", "b")


def test_dataset_with_image_bytes(picture: Callable[..., Image.Image]):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("string")})
    rows = {"img": [picture(i) for i in range(10)], "label": ["a", "b"] * 5}
    splits = load_images(datasets.Dataset.from_dict(rows, features=features))
    assert splits.task.modality == "image" and splits.train[0]["image"]["bytes"] is not None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("no such", "no such: no such file or folder; check the path"),
        (["a"], "data: a list cannot be read; give a path, a Hub name, a Dataset or a DatasetDict"),
        (
            datasets.DatasetDict(a=datasets.Dataset.from_dict({"text": ["x"]}), b=datasets.Dataset.from_dict({})),
            "data: no train split among a, b; rename one to train",
        ),
    ],
)
def test_sources_that_are_not_there(data: object, message: str):
    with pytest.raises(DataError) as error:
        load_table(data)  # type: ignore[arg-type]
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "asked", "reason", "advice"),
    [
        ("owner/name:part", ("owner/name", "part", None), "offline",
         "check the name and the revision, or log in with `hf auth login`"),
        ("owner/name@v1/x", ("owner/name", None, "v1/x"), "is a gated dataset",
         "ask for access on https://huggingface.co/datasets/owner/name, then log in with `hf auth login`"),
        ("owner/name:part@main", ("owner/name", "part", "main"), "offline",
         "check the name and the revision, or log in with `hf auth login`"),
    ],
)  # fmt: skip
def test_hub_name_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[object, ...], reason: str, advice: str
):
    found = []

    def refuse(repository: str, config: str | None, revision: str | None) -> None:
        found.append((repository, config, revision))
        raise ConnectionError(reason)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError) as error:
        load_table(name)
    assert str(error.value) == f"{name}: no such file or folder, and not to be had from the Hub ({reason}); {advice}"
    assert found == [asked]


def test_empty_folder(tmp_path: Path):
    with pytest.raises(DataError) as error:
        load_images(tmp_path)
    assert str(error.value) == f"{tmp_path}: no images here; give a folder with one sub-folder of images for each class"


def test_images_without_class_folders(tmp_path: Path, picture: Callable[..., Image.Image]):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.jpg")
    with pytest.raises(DataError) as error:
        load_images(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: 3 images but no class folders; put the images of each class in a folder "
        "with its name, or add metadata.csv with columns file_name and label"
    )


def test_label_and_targets_are_one(reviews: Make):
    with pytest.raises(DataError, match="^targets: the same as label; give one of them$"):
        load_table(reviews(), label="label", targets="label")
