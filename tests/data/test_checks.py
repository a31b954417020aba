import csv
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from PIL import Image

from finetune.data import checks
from finetune.data.checks import DataReport, LeftOut
from finetune.data.sources import load_images, load_table
from finetune.errors import DataError

Make = Callable[..., Path]


def reasons(report: DataReport) -> dict[str, str]:
    return {entry.id: entry.reason for entry in report.left_out}


def message(run: Callable[[], object]) -> str:
    with pytest.raises(DataError) as error:
        run()
    return str(error.value)


def test_bad_image_files_are_left_out(
    folder: Make, picture: Callable[..., Image.Image], monkeypatch: pytest.MonkeyPatch
):
    root = folder(cat=6, dog=6)
    whole = root / "cat" / "whole.jpg"
    picture(99, (64, 64)).save(whole)
    (root / "cat" / "cut.jpg").write_bytes(whole.read_bytes()[:-400])
    (root / "cat" / "cut.png").write_bytes((root / "cat" / "0.png").read_bytes()[:-1000])
    (root / "cat" / "text.jpg").write_text("not a picture at all")
    (root / "cat" / "empty.jpg").write_bytes(b"")
    (root / "dog" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "dog" / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    picture(98, (80, 80)).save(root / "dog" / "large.png")
    picture(97, (100, 100)).save(root / "dog" / "huge.png")
    splits = load_images(root)
    assert reasons(splits.report) == {
        "cat/cut.jpg": "truncated or damaged image",
        "cat/cut.png": "truncated or damaged image",
        "cat/text.jpg": "not an image",
        "cat/empty.jpg": "empty file",
        "dog/phone.heic": ".heic is not supported; convert it to JPEG",
        "dog/dangling.jpg": "file not found",
        "dog/large.png": "more pixels than can be read safely; make it smaller",
        "dog/huge.png": "more pixels than can be read safely; make it smaller",
    }
    assert sum(splits.n.values()) == 13 and all(entry.split == "train" for entry in splits.report.left_out)


def test_reason_names_the_image_of_a_table_row(folder: Make, tmp_path: Path):
    folder("pics", a=6)
    rows = [f"pics/a/{i}.png,{i % 2}" for i in range(6)]
    (tmp_path / "t.csv").write_text("\n".join(["file,label", *rows, "pics/a/none.png,1", ",0"]))
    report = load_images(tmp_path / "t.csv").report
    assert reasons(report) == {"t.csv:8": "file not found: pics/a/none.png", "t.csv:9": "no image"}


def test_all_images_unreadable(tmp_path: Path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_text("text")
    assert message(lambda: load_images(tmp_path)) == (
        f"{tmp_path}: none of the 2 images can be read (a/0.jpg: not an image); mend the files"
    )


def test_one_class(folder: Make):
    root = folder(cat=5)
    assert message(lambda: load_images(root)) == (
        f"{root}: only one class, 'cat', in 5 rows; add examples of another class"
    )


def test_label_column_missing(table: Make):
    path = table("id,text\n1,good\n2,bad\n")
    assert message(lambda: load_table(path)) == (
        f"{path}: no label column found; the columns are id ('1'), text ('good'); name it with label="
    )


def test_few_missing_labels_are_left_out(table: Make):
    rows = [f"text {i},{'ab'[i % 2]}" for i in range(10)]
    path = table("\n".join(["text,label", *rows, "eleven,", "twelve,NaN", "thirteen,None", "fourteen,None"]))
    splits = load_table(path)
    assert reasons(splits.report) == {"reviews.csv:12": "no label in 'label'", "reviews.csv:13": "no label in 'label'"}
    assert splits.task.labels == ("None", "a", "b")  # among words, None may well be a class


def test_missing_numbers_are_left_out(table: Make):
    rows = [f"text {i},{i + 0.5}" for i in range(10)]
    splits = load_table(table("\n".join(["text,score", *rows, "eleven,NA", "twelve,null"])))
    assert splits.task.kind == "regression"
    assert list(reasons(splits.report)) == ["reviews.csv:12", "reviews.csv:13"]


def test_mostly_missing_labels(table: Make):
    path = table("text,label\na,x\nb,\nc,nan\nd,\ne,\nf,y\n")
    assert message(lambda: load_table(path)) == (
        f"{path}: 4 of 6 rows have no label in column 'label' "
        "(reviews.csv:3, reviews.csv:4, reviews.csv:5 and 1 more); fill them in, or name another column with label="
    )


def test_label_in_test_that_train_lacks(reviews: Make):
    train, test = reviews(20, name="a.csv"), reviews(6, ("pos", "odd"), name="b.csv", word="test")
    assert message(lambda: load_table(train, test=test)) == (
        f"{test}: train lacks the labels 'odd' (b.csv:3, b.csv:5, b.csv:7); add examples to train, or remove these rows"
    )


def test_declared_label_in_test_that_train_lacks():
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )

    def make(word: str, labels: list[int]) -> datasets.Dataset:
        return datasets.Dataset.from_dict(
            {"text": [f"{word} {i}" for i in range(len(labels))], "label": labels}, features
        )

    assert message(lambda: load_table(make("x", [0, 1] * 5), test=make("y", [0, 2]))) == (
        "train: train lacks the labels 'c' (train[1]); add examples to train, or remove these rows"
    )
    splits = load_table(make("x", [0, 1] * 5))
    assert splits.report.warnings == ("Class 'c' has no example in train; it will never be predicted.",)
    assert splits.report.classes == {"a": 4, "b": 4, "c": 0}


def test_a_class_with_one_example(table: Make):
    rows = [f"text {i},{'ab'[i % 2]}" for i in range(10)]
    splits = load_table(table("\n".join(["text,label", *rows, "alone,c"])))
    assert splits.report.warnings == (
        "Class 'c' has one example (reviews.csv:12); it stays in train, so no score covers it.",
    )
    assert splits.report.classes["c"] == 1


def test_leaks_are_left_out_of_train(reviews: Make, table: Make):
    test = table("text,label\nROW  number 3,pos\nrow number 3,neg\nnew,neg\n", "test.csv")
    splits = load_table(reviews(20), test=test)
    assert (splits.report.leaks, splits.n["test"]) == (1, 3)
    assert splits.report.left_out == (LeftOut("reviews.csv:5", "train", "also in test: test.csv:2"),)
    assert "reviews.csv:5" not in splits.train["id"][:] + splits.valid["id"][:]
    assert splits.report.warnings == ("1 train rows are in valid or test too; they were left out of train.",)


def test_leaked_images_are_found_by_their_pixels(folder: Make):
    train, test = folder("train", cat=6, dog=6), folder("test", cat=2, dog=2)
    Image.open(train / "cat" / "3.png").save(test / "dog" / "copy.bmp")
    splits = load_images(train, test=test)
    assert reasons(splits.report) == {"cat/3.png": "also in test: dog/copy.bmp"}


def test_everything_leaked(reviews: Make):
    path = reviews()
    assert message(lambda: load_table(path, test=path)) == (
        f"{path}: every row is in test too; give other data to test on"
    )


def test_pairs_are_equal_only_as_pairs(table: Make):
    rows = ["a b,c,1", "a b,d,0", "a,b c,1", "A  B,C,1", *(f"x{i},y{i},{i % 2}" for i in range(8))]
    report = load_table(table("\n".join(["text_a,text_b,label", *rows]))).report
    assert (report.duplicates, report.conflicts) == (1, 0)


def test_duplicates_and_conflicts(table: Make):
    rows = ["same,a", "same,b", "Same,a", "twice,a", "twice,a", *(f"text {i},{'ab'[i % 2]}" for i in range(10))]
    splits = load_table(table("\n".join(["text,label", *rows])))
    assert (splits.report.duplicates, splits.report.conflicts) == (3, 1)
    assert splits.report.warnings == ("1 inputs have several labels, for instance reviews.csv:2 and reviews.csv:3.",)
    sides = [set(text.lower() for text in data["text"]) for data in (splits.train, splits.valid)]
    assert not sides[0] & sides[1]


def test_empty_texts_and_lists(table: Make):
    rows = [f"text {i},{'ab'[i % 2]}" for i in range(10)]
    splits = load_table(table("\n".join(["text,label", *rows, ",a", '"  ",b'])))
    assert reasons(splits.report) == {"reviews.csv:12": "empty text", "reviews.csv:13": "empty text"}
    words = [[f"a{i}", "b"] for i in range(9)]
    tokens = {"tokens": [*words[:2], [], *words[2:]], "tags": [*[["X", "O"]] * 2, [], ["O"], *[["O", "O"]] * 6]}
    splits = load_table(datasets.Dataset.from_dict(tokens))
    assert reasons(splits.report)["train[2]"] == "empty text"
    assert reasons(splits.report)["train[3]"] == "2 tokens but 1 labels"


def test_labels_of_another_kind_are_left_out(table: Make):
    rows = [f"text {i},{i + 0.5}" for i in range(10)]
    splits = load_table(table("\n".join(["text,label", *rows, "eleven,high"])), task="regression")
    assert reasons(splits.report) == {"reviews.csv:12": "label 'high' is not a number"}
    path = table("text,label\na,x\nb,y\n")
    assert message(lambda: load_table(path, task="regression")) == (
        f"{path}: no row has a usable label (reviews.csv:2: label 'x' is not a number); check label= and task="
    )


def test_constant_targets(table: Make):
    path = table("text,label\na,1.5\nb,1.5\n")
    assert message(lambda: load_table(path)) == (
        f"{path}: all 2 targets are [1.5]; there is nothing to learn, check label="
    )


def test_nothing_to_validate_on(table: Make):
    path = table("text,label\na,x\nb,y\n")
    assert message(lambda: load_table(path)) == (
        f"{path}: no row can be spared for validation, as no class has two different examples; "
        "add examples, or give valid="
    )


def test_report_in_words_and_as_csv(table: Make, tmp_path: Path):
    rows = [f"text {'word ' * i},{'ab'[i % 2]}" for i in range(20)]
    report = load_table(table("\n".join(["text,label", *rows, "text,a", "x,"]))).report
    assert report.counts == {"train": 17, "valid": 4}
    assert report.lines() == [
        "21 rows: 17 train, 4 valid",
        f"2 classes: a {report.classes['a']}, b {report.classes['b']}",
        "columns: text from 'text', label from 'label'",
        "words a text: median 10, 95 % at most 19, longest 20",
        "repeats: 1 rows of train repeat an earlier one",
        "left out: 1 rows (1 no label in 'label')",
    ]
    report.left_out_csv(tmp_path / "left_out.csv")
    with (tmp_path / "left_out.csv").open() as file:
        assert list(csv.reader(file)) == [["id", "split", "reason"], ["reviews.csv:23", "train", "no label in 'label'"]]


def test_joined_processes_read_a_share_each(folder: Make, monkeypatch: pytest.MonkeyPatch):
    root = folder(cat=6, dog=6)
    (root / "cat" / "empty.jpg").write_bytes(b"")
    alone = load_images(root)
    looks: list[list[tuple[int, str, str]]] = []
    real, opened = checks.open_image, []

    def counted(source: str) -> Image.Image:
        opened.append(source)
        return real(source)

    class Joined:
        def __init__(self, rank: int):
            self.get_rank, self.get_world_size = lambda: rank, lambda: 2
            self.is_available = self.is_initialized = lambda: True

        def all_gather_object(self, everyone: list[object], own: list[tuple[int, str, str]]) -> None:
            looks.append(own)
            everyone[:] = [looks[0], own]

    monkeypatch.setattr(checks, "CHUNK", 4)
    monkeypatch.setattr(checks, "open_image", counted)
    monkeypatch.setattr(checks, "dist", Joined(0))
    load_images(root)  # the other half has not been looked at
    monkeypatch.setattr(checks, "dist", Joined(1))
    both = load_images(root)
    assert [len(look) for look in looks] == [8, 5] and len(set(opened)) == 13
    assert both.fingerprint == alone.fingerprint and both.report == alone.report


def test_a_picture_that_a_parquet_file_leaves_out(folder: Make, tmp_path: Path):
    root = folder(cat=6, dog=6)
    files = sorted(root.rglob("*.png"))
    rows = {"image": [None, *(str(path) for path in files)], "label": ["cat", *(path.parent.name for path in files)]}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.to_parquet(root / "train.parquet")
    report = load_images(root / "train.parquet").report
    assert reasons(report) == {"train.parquet:1": "no image"}


def test_labels_that_look_like_quantities(table: Make):
    rows = "\n".join(["text,label", *(f"text {i},{i / 7:.3f}" for i in range(40)), "one,0.5", "two,0.5"])
    assert load_table(table(rows)).task.kind == "regression"
    splits = load_table(table(rows), task="single_label")
    assert splits.report.warnings[0] == (
        '41 different numbers in 42 rows look like quantities, not classes; task="regression" predicts them.'
    )
    assert sum("has one example" in warning for warning in splits.report.warnings) == 3
    assert "37 more classes have one example." in splits.report.warnings
    whole = load_table(table("\n".join(["text,label", *(f"text {i},{i * 3}" for i in range(40))])))
    assert whole.task.kind == "regression"
    assert whole.report.warnings == (
        "The labels are taken as quantities (regression); if they are classes, give task='single_label'.",
    )
    stars = load_table(table("\n".join(["text,label", *(f"text {i},{1 + i % 5}" for i in range(40))])))
    assert stars.task.kind == "single_label_classification" and stars.report.warnings == ()
