import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from finetune.data.tables import Part, find_roles, read_table
from finetune.errors import DataError

Table = Callable[..., Path]


def read(path: Path) -> tuple[list[str], list[dict]]:
    part = read_table(path)
    return list(part.ids), list(part.data)


def test_ids_are_the_lines_of_an_editor(table: Table):
    ids, rows = read(table('text,label\n"two\nlines",a\n\nplain,b\n"a ""quoted"" word",c\n'))
    assert ids == ["reviews.csv:2", "reviews.csv:5", "reviews.csv:6"]
    assert [row["text"] for row in rows] == ["two\nlines", "plain", 'a "quoted" word']


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_every_newline_counts(table: Table, newline: str):
    assert read(table(newline.join(["text,label", "x,1", "y,2"])))[0] == ["reviews.csv:2", "reviews.csv:3"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_with_and_without_bom(table: Table, encoding: str):
    part = read_table(table("text,label\nçà va,1\n", encoding=encoding))
    assert part.data[0] == {"text": "çà va", "label": "1"} and part.notes == ()


def test_latin_1_is_read_with_a_note(table: Table):
    part = read_table(table("text,label\nfine,1\ndéjà vu,1\n", encoding="latin-1"))
    assert part.data[1]["text"] == "déjà vu"
    assert part.notes == (
        "reviews.csv:3: not UTF-8, so it was read as Windows-1252; save it as UTF-8 if letters are wrong.",
    )


@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
def test_delimiter_is_found(table: Table, sign: str):
    text = "\n".join(sign.join(cells) for cells in (["text", "label"], ["'one, two; three'", "a"], ["four", "b"]))
    quoted = text.replace("'", '"')
    assert read(table(quoted))[1] == [{"text": "one, two; three", "label": "a"}, {"text": "four", "label": "b"}]


def test_semicolons_with_commas_in_the_text(table: Table):
    rows = read(table("text;label\nYes, I do;a\nNo, no, no;b\n"))[1]
    assert rows == [{"text": "Yes, I do", "label": "a"}, {"text": "No, no, no", "label": "b"}]


def test_ragged_rows_are_left_out(table: Table):
    part = read_table(table("text,label\na,1\nb,1,2\nc\nd,2\n"))
    assert part.left_out == (
        ("reviews.csv:3", "3 fields where the header has 2"),
        ("reviews.csv:4", "1 fields where the header has 2"),
    )
    assert len(part.data) == len(part.ids) == 2


def test_a_quote_that_is_never_closed_is_an_error(table: Table):
    with pytest.raises(DataError, match=r"reviews.csv:3: a quote opened here is never closed; close it, or double it"):
        read_table(table('text,label\na,1\n"b,1\nc,1\nd,2\n'))


def test_quotes_in_tsv_may_mean_nothing(table: Table):
    ids, rows = read(table('text\tlabel\n"Oh, he said\t1\nsize 5" wide\t2\n', "reviews.tsv"))
    assert [row["text"] for row in rows] == ['"Oh, he said', 'size 5" wide'] and ids[1] == "reviews.tsv:3"


def test_long_documents(table: Table):
    assert len(read(table(f"text,label\n{'word ' * 50_000},1\n"))[1][0]["text"]) == 250_000


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "reviews.csv", r"reviews.csv: empty file; it needs a header line with column names and a line for each"),
        ("text,label\n", "reviews.csv", r"reviews.csv: no rows; it needs a header line"),
        ("text,text\na,b\n", "reviews.csv", r"reviews.csv:1: column 'text' is there twice; rename one$"),
        ("{}", "reviews.xlsx", r"reviews.xlsx: not a table that can be read; give one of .csv, .tsv, .jsonl, .json"),
        ("oops\n", "reviews.jsonl", r"reviews.jsonl: no rows \(first: reviews.jsonl:1: not a JSON object\)"),
        ("PAR0", "reviews.parquet", r"reviews.parquet: not a Parquet file"),
    ],
)
def test_files_that_are_no_tables(table: Table, text: str, name: str, message: str):
    with pytest.raises(DataError, match=message):
        read_table(table(text, name))


def test_json_lines(table: Table):
    lines = [json.dumps({"text": "a", "label": 1}), "", "{broken", json.dumps({"text": "b", "label": "x", "more": [1]})]
    part = read_table(table("\n".join(lines), "reviews.jsonl"))
    assert part.ids == ["reviews.jsonl:1", "reviews.jsonl:4"]
    assert part.left_out == (("reviews.jsonl:3", "not a JSON object"),)
    assert part.data["label"][:] == ["1", "x"] and part.data["more"][:] == [None, [1]]


@pytest.mark.parametrize(
    "content",
    [
        [{"text": "a", "label": 1}, {"text": "b", "label": 2}],
        {"data": [{"text": "a", "label": 1}, {"text": "b", "label": 2}]},
        {"text": ["a", "b"], "label": [1, 2]},
    ],
)
def test_json(table: Table, content: object):
    ids, rows = read(table(json.dumps(content), "reviews.json"))
    assert ids == ["reviews.json:1", "reviews.json:2"]
    assert rows == [{"text": "a", "label": 1}, {"text": "b", "label": 2}]


def test_parquet_keeps_class_names(tmp_path: Path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    data = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
    data.to_parquet(str(tmp_path / "reviews.parquet"))
    part = read_table(tmp_path / "reviews.parquet")
    assert part.ids == ["reviews.parquet:1", "reviews.parquet:2"]
    assert part.data.features["label"].names == ["z", "a"]


def roles_of(columns: dict[str, list], **options: str | None) -> dict[str, str]:
    ids = [str(i) for i in range(len(next(iter(columns.values()))))]
    return find_roles(Part(datasets.Dataset.from_dict(columns), ids, "t.csv"), **options).columns


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"text": ["a"], "label": ["x"]}, {"text": "text", "label": "label"}),
        ({"id": ["1"], "Review": ["a b"], "Stars": ["5"]}, {"text": "Review", "label": "Stars"}),
        ({"words here": ["a b"], "n": ["5"]}, {"text": "words here", "label": "n"}),
        ({"kind": ["x"], "what": ["a long one"]}, {"text": "what", "label": "kind"}),
        (
            {"premise": ["a"], "hypothesis": ["b"], "y": [0]},
            {"text": "premise", "text_pair": "hypothesis", "label": "y"},
        ),
        ({"tokens": [["a"]], "ner_tags": [["O"]]}, {"tokens": "tokens", "label": "ner_tags"}),
        ({"tokens": ["['a']"], "tags": ["['O']"]}, {"tokens": "tokens", "label": "tags"}),
        ({"file": ["a/1.jpg"], "label": ["x"]}, {"image": "file", "label": "label"}),
        ({"odd": ["a/1.PNG"], "kind": ["x"]}, {"image": "odd", "label": "kind"}),
    ],
)
def test_columns_are_found(columns: dict[str, list], found: dict[str, str]):
    assert roles_of(columns) == found


def test_named_columns_win():
    columns = {"text": ["a"], "title": ["b"], "label": ["x"], "topic": ["y"]}
    assert roles_of(columns, text="title", label="topic") == {"text": "title", "label": "topic"}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"text": ["Great film"], "id": ["7"]},
            {},
            "t.csv: no label column found; the columns are text ('Great film'), id ('7'); name it with label=",
        ),
        (
            {"text": ["a"], "p": ["x"], "q": ["y"]},
            {},
            "t.csv: no label column found; the columns are text ('a'), p ('x'), q ('y'); name it with label=",
        ),
        (
            {"a": ["x y"], "b": ["z"], "label": ["w"]},
            {},
            "t.csv: no text column found; the columns are a ('x y'), b ('z'), label ('w'); name it with text=",
        ),
        (
            {"text": ["a"], "label": ["x"]},
            {"label": "stars"},
            "t.csv: no column 'stars'; the columns are text ('a'), label ('x'); name one with label=",
        ),
        (
            {"n": [1], "label": ["x"]},
            {"modality": "image"},
            "t.csv: no image column found; the columns are n (1), label ('x'); name it with image=",
        ),
    ],
)
def test_columns_that_cannot_be_told(columns: dict[str, list], options: dict[str, str], message: str):
    with pytest.raises(DataError) as error:
        roles_of(columns, **options)
    assert str(error.value) == message
