"""The model card: what it says of a run, what it leaves out, and that the Hub takes it and reads the same from it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from finetune.errors import RunError
from finetune.output.card import Card, make_card
from finetune.output.card_facts import Facts
from finetune.output.markdown import sections
from tests.hub_client import Client
from tests.hub_server import Hub

NOTES = {
    "schema": 1,
    "task": {"kind": "single_label_classification", "modality": "text", "labels": ["good", "bad"]},
    "family": "transformers",
    "architecture": "BertForSequenceClassification",
    "base_model": "sentence-transformers/all-MiniLM-L6-v2",
    "licence": "apache-2.0",
    "versions": {"torch": "2.14.1"},
}
RECORD: dict[str, Any] = {
    "data": {
        "source": "/home/someone/reviews.csv",
        "counts": {"train": 30, "valid": 8, "test": 10},
        "classes": {"good": 16, "bad": 14},
        "fingerprint": "cafe",
        "columns": {"text": "review", "label": "label"},
        "duplicates": 2,
        "leaks": 1,
        "conflicts": 0,
        "warnings": ["/home/someone/other has no labels, so it is not used."],
    },
    "metrics": {
        "valid": {"accuracy": 0.875, "f1_macro": 0.86, "loss": 0.4},
        "test": {"accuracy": 0.9, "f1_macro": 0.89, "confusion": [[4, 1], [0, 5]], "loss": 0.3},
    },
    "settings": {"lr": {"value": 1e-3, "reason": "BERT's | 2e-5", "by": "rule"}},
    "stages": [
        {"name": "head", "open_from": 1, "steps": 2, "peak_rates": [0.0, 5e-3], "seconds": 1.5},
        {"name": "all", "open_from": 0, "steps": 2, "peak_rates": [1e-4, 1e-3], "seconds": 61.0},
    ],
    "groups": ["stem", "head"],
    "history": [
        {"epoch": 1, "step": 2, "stage": "head", "train_loss": 1.5, "valid": {"accuracy": 0.5, "loss": 0.9}},
        {"epoch": 2, "step": 4, "stage": "all", "train_loss": 0.9, "valid": {"accuracy": 0.875, "loss": 0.4}},
    ],
    "kept": "last",
    "seed": 0,
    "seconds": {"total": 100.0},
    "device": "cpu",
    "versions": {"torch": "2.14.1"},
    "command": "/home/someone/recipes/text_classification.py --data /home/someone/reviews.csv --epochs 2",
}


def make_model(folder: Path, record: dict[str, Any] | None = RECORD, **notes: Any) -> Path:
    """A run folder with a model of nothing in it."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(bytes(range(250)) * 80)
    (folder / "model" / "finetune.json").write_text(json.dumps(NOTES | notes))
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "predictions").mkdir()
        rows = [("good", "good", 0.9)] * 4 + [("good", "bad", 0.6)] + [("bad", "bad", 0.8)] * 5
        lines = [f"test.csv:{i},{','.join(map(str, row))}\n" for i, row in enumerate(rows, 2)]
        (folder / "predictions" / "test.csv").write_text("id,target,prediction,probability\n" + "".join(lines))
        rates = [[0.0, 2e-3], [0.0, 4e-3], [5e-5, 5e-4], [1e-4, 1e-3]]
        steps = [
            {"step": i, "stage": i // 2, "loss": 1.0 - i / 10, "rates": rates[i], "momentum": 0.9} for i in range(4)
        ]
        (folder / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return folder


NASTY = [
    "<script>alert(1)</script>", "a | b", "**bold** _it_ `code`", "[link](https://evil.example)",
    "$$x^2$$ \\(y\\)", "| --- |",
    "https://evil.example", "www.evil.example", "&amp; & &lt;", "![x](y.png)", "日本語",
    "two\nlines", "~~gone~~", "# no heading",
]  # fmt: skip


def card_of(run: Path, repo_id: str = "me/reviews", **options: Any) -> Card:
    return make_card(Facts.of(run / "model"), repo_id, **options)


def html_of(card: Card) -> str:
    body = card.text.split("\n---\n", 1)[1]
    return MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(body)


def cells(html: str) -> list[str]:
    from html import unescape

    return [unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", html, re.S)]


# Run in the client's process


def validate(card: str) -> Any:
    """What the Hub says of a card: nothing, or a ValueError."""
    return ModelCard(card).validate()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Hub() as hub, Client(hub.url, tmp_path_factory.mktemp("client")) as client:
        yield client


def test_head(tmp_path: Path) -> None:
    head = card_of(make_model(tmp_path / "run"), base={"language": "en", "license": "mit"}).head
    index = head.pop("model-index")
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "base_model": NOTES["base_model"],
        "base_model_relation": "finetune",
        "language": ["en"],
        "license": "apache-2.0",
        "metrics": ["accuracy", "f1"],
        "tags": ["finetune-onecycle", "single-label-classification"],
    }
    assert index[0]["name"] == "reviews"
    assert index[0]["results"][0]["dataset"] == {"name": "reviews.csv", "type": "csv", "split": "test"}


def test_the_hub_takes_the_card_and_reads_the_same_results(tmp_path: Path, client: Client) -> None:
    text = card_of(make_model(tmp_path / "run")).text
    client.value("tests.output.test_card:validate", text)
    assert "must be one of" in str(
        client.call("tests.output.test_card:validate", text.replace("apache-2.0", "own")).error
    )
    card = ModelCard(text)  # which refuses a head that it cannot parse
    found = {(result.dataset_split, result.metric_name): result.metric_value for result in card.data.eval_results or []}
    assert found == {
        ({"valid": "validation"}.get(split, split), name): value
        for split, values in RECORD["metrics"].items()
        for name, value in values.items()
        if name not in ("loss", "confusion")
    }
    assert {result.metric_type for result in card.data.eval_results or []} == {"accuracy", "f1"}


def test_body(tmp_path: Path) -> None:
    card = card_of(make_model(tmp_path / "run"))
    assert list(card.sections) == [
        "", "Use it", "Labels", "Results", "Data", "Training", "Settings, and why", "Limits", "Licence",
        "How it was made",
    ]  # fmt: skip
    opening = card.sections[""]
    assert opening.startswith(
        "# reviews\n\n**Accuracy 90.0 %** (95 % interval 59.6 to 98.2 %) on 10 test texts; always giving the majority "
        "class would have 50.0 %."
    )
    assert "fine-tuned on 30 texts of reviews.csv" in opening and f"[{NOTES['base_model']}](https://" in opening
    assert 'pipeline("text-classification", model="me/reviews")' in card.sections["Use it"]
    assert "| 0 | good | 16 |" in card.sections["Labels"]
    assert "| accuracy | 90.0 % | 87.5 % | 50.0 % |" in card.sections["Results"]
    assert "| bad | 0.833 | 1.000 | 0.909 | 5 |" in card.sections["Results"]
    for line in (
        "30 training, 8 validation, 10 test rows",
        "2 training rows repeat",
        "1 training rows were in the held-out",
    ):
        assert line in card.sections["Data"]
    assert "| 1 | 2 | head | 1.5 | 0.9 | 50.0 % | 4.0e-03 | frozen |" in card.sections["Training"]
    assert "| 2 | 4 | all | 0.9 | 0.4 | 87.5 % | 1.0e-03 | 1.0e-04 |" in card.sections["Training"]
    assert "| lr | 0.001 | rule | BERT's \\| 2e-5 |" in card.sections["Settings, and why"]
    assert "Weakest: good, of which it finds 80 %, and takes most others for bad" in card.sections["Limits"]
    assert "2 of 2 have fewer than 10 test rows" in card.sections["Limits"]
    assert "python text_classification.py --data reviews.csv --epochs 2" in card.sections["How it was made"]
    assert "torch 2.14.1" in card.sections["How it was made"]
    assert card.files.keys() == {f"images/{name}.png" for name in ("confusion", "rates", "reliability")}
    assert "expected calibration error 20.0 %" in card.sections["Results"]


def test_nothing_of_the_machine_or_of_single_rows(tmp_path: Path) -> None:
    run = make_model(tmp_path / "run")
    (run / "left_out.csv").write_text("id,split,reason\nprivate_name.txt,train,not an image: private_name.txt\n")
    text = card_of(run).text
    assert "1 not an image" in text
    for secret in ("someone", "private_name", "test.csv:2", str(tmp_path)):
        assert secret not in text
    command = "/opt/x/recipe.py --data=/home/someone/a --out ~/runs/b --head hf_abcdefghij --test ../c/d.csv --lr 1e-3"
    (run / "run.json").write_text(json.dumps(RECORD | {"command": command}))
    assert "python recipe.py --data=a --out b --head '***' --test d.csv --lr 1e-3" in card_of(run).text
    notebook = {"command": "/usr/lib/python3/site-packages/ipykernel_launcher.py -f /root/kernel.json"}
    (run / "run.json").write_text(json.dumps(RECORD | notebook))
    assert "ipykernel" not in card_of(run).text


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
def test_only_what_is_known_is_said(tmp_path: Path, notes: dict, expected: dict, use: str) -> None:
    card = card_of(make_model(tmp_path / "run", record=None, **notes), "owner/m")
    keys = ("library_name", "pipeline_tag", "license", "license_name")
    assert {key: card.head[key] for key in keys if key in card.head} == expected
    assert use in card.text and "/home/someone" not in card.text and not card.files
    assert ("base_model" in card.head) == ("base_model" not in notes) == ("base_model_relation" in card.head)
    assert list(card.sections)[1:] == ["Use it", "Labels", "Limits", "Licence", "How it was made"]
    assert ("licence of the backbone is not known" in card.sections["Licence"]) == ("license" not in card.head)


def test_a_licence_of_its_own_is_named_and_linked(tmp_path: Path) -> None:
    run = make_model(tmp_path / "run", licence="other")
    base = {"license": "other", "license_name": "Gecko Licence", "license_link": "https://gecko.example/licence"}
    head = card_of(run, base=base).head
    assert (head["license"], head["license_name"], head["license_link"]) == (
        "other", "gecko-licence", "https://gecko.example/licence",
    )  # fmt: skip
    head = card_of(run, base={"license_link": "LICENSE"}).head
    assert head["license_link"] == f"https://huggingface.co/{NOTES['base_model']}"
    assert "license" not in card_of(make_model(tmp_path / "unknown", licence="unknown")).head


def test_data_is_named_only_where_it_is_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_model(tmp_path / "run", record=RECORD | {"data": RECORD["data"] | {"source": "owner/reviews:small@v2"}})
    card = card_of(run)
    assert card.head["datasets"] == ["owner/reviews"]
    dataset = card.head["model-index"][0]["results"][0]["dataset"]
    assert dataset == {
        "name": "owner/reviews", "type": "owner/reviews", "config": "small", "split": "test", "revision": "v2",
    }  # fmt: skip
    assert "[owner/reviews](https://huggingface.co/datasets/owner/reviews)" in card.sections[""]
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "reviews:small@v2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "datasets" not in card_of(run).head
    in_memory = RECORD["data"] | {"source": "DatasetDict of {'train': 30} rows"}
    (run / "run.json").write_text(json.dumps(RECORD | {"data": in_memory}))
    assert "DatasetDict" not in card_of(run).text


def test_without_test_rows_it_says_so(tmp_path: Path) -> None:
    valid = {"valid": {"accuracy": 0.875, "confusion": [[4, 0], [1, 3]]}}
    opening = card_of(make_model(tmp_path / "run", record=RECORD | {"metrics": valid})).sections[""]
    assert "**Accuracy 87.5 %** (95 % interval 52.9 to 97.8 %) on 8 validation texts" in opening
    assert "Weights were chosen on these rows: expect a little less elsewhere." in opening


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "token_classification"])
def test_names_are_shown_as_they_are(tmp_path: Path, client: Client, kind: str) -> None:
    """No name of anybody becomes a tag, a link, a picture, a formula or another cell."""
    task = {"kind": kind, "modality": "text", "labels": NASTY}
    record = RECORD | {
        "data": RECORD["data"] | {"source": "x/<b>a|b</b>.csv", "classes": dict.fromkeys(NASTY, 3)},
        "settings": {"<i>lr</i>": {"value": "a|b", "reason": "see https://evil.example", "by": "user"}},
        "kept": "**last**",
    }
    card = card_of(make_model(tmp_path / "run", record=record, task=task))
    html = html_of(card)
    assert [" ".join(name.split()) for name in NASTY] == cells(html)[3 : 3 + 3 * len(NASTY)][1::3]
    allowed = {
        "h1",
        "h2",
        "h3",
        "p",
        "strong",
        "a",
        "img",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "ul",
        "li",
        "pre",
    }
    assert set(re.findall(r"<(\w+)", re.sub(r"<!--.*?-->", "", html))) <= allowed | {"code", "details", "summary"}
    assert all("huggingface.co" in link for link in re.findall(r'href="([^"]*)"', html))
    assert all(source.startswith("images/") for source in re.findall(r'src="([^"]*)"', html))
    assert "$$" not in card.text.split("---\n")[2] and "\\\\(" not in card.text and "https://evil" not in card.text
    client.value("tests.output.test_card:validate", card.text)


def test_a_card_is_read_back_whole(tmp_path: Path) -> None:
    card = card_of(make_model(tmp_path / "run"))
    again = Card.read(card.text)
    assert again is not None and (again.head, again.sections, again.marks) == (card.head, card.sections, card.marks)
    assert again.text == card.text
    assert card.keeping(again) == (card, [])
    windows = Card.read(card.text.replace("\n", "\r\n"))
    assert windows is not None and card.keeping(windows) == (card, [])
    for other in (
        "# By hand\n",
        "---\nlicense: mit\n---\n# By hand\n",
        card.text.replace("<!--", "<-"),
        "---\na: [\n---\n",
    ):
        assert Card.read(other) is None


def test_headings_in_code_divide_nothing() -> None:
    body = "top\n\n## A\n\n```python\n## not one\n```\n\n~~~\n```\n## nor this\n~~~\n\n## B ##x\ntext\n## A\nagain"
    found = sections(body)
    assert list(found) == ["", "A", "B ##x", "A "] and "## nor this" in found["A"] and found["A "] == "again"


def test_what_somebody_did_to_a_card_is_kept(tmp_path: Path) -> None:
    run = make_model(tmp_path / "run")
    old = card_of(run)
    changed = RECORD | {"metrics": {"test": {"accuracy": 0.8}}, "seed": 7}
    (run / "run.json").write_text(json.dumps(changed))
    new = card_of(run)
    text = old.text.replace("## Limits\n", "## Limits\n\n- Mind the gap.").replace(
        "license: apache-2.0", "license: mit"
    )
    text = text.replace("## Data", "## Our lab\n\nHello.\n\n## Data").replace("library_name: transformers\n", "")
    edited = Card.read(text)
    assert edited is not None
    merged, kept = new.keeping(edited)
    assert kept == ["head: license", "head: library_name", "Our lab", "Limits"]
    assert "Mind the gap." in merged.sections["Limits"] and merged.sections["Our lab"] == "Hello."
    assert merged.head["license"] == "mit" and "library_name" not in merged.head
    assert "Accuracy 80.0 %" in merged.sections[""] and "Seed 7" in merged.sections["Data"]
    assert list(merged.sections).index("Our lab") == list(merged.sections).index("Data") - 1
    third, still = new.keeping(Card.read(merged.text))  # type: ignore[arg-type]
    assert (third.text, still) == (merged.text, kept)


def test_a_new_part_comes_to_its_place(tmp_path: Path) -> None:
    run = make_model(tmp_path / "run", record={key: value for key, value in RECORD.items() if key != "settings"})
    text = card_of(run).text.replace("# reviews\n", "# Our reviews\n")
    (run / "run.json").write_text(json.dumps(RECORD))
    new = card_of(run)
    merged, kept = new.keeping(Card.read(text))  # type: ignore[arg-type]
    assert kept == [""] and list(merged.sections) == list(new.sections) and "Settings, and why" in merged.sections


def test_examples_are_shown_with_what_the_model_says(tmp_path: Path) -> None:
    from finetune.data.task import Task
    from finetune.model.backbones import load_backbone
    from finetune.output.export import save_pretrained
    from finetune.output.predict import load
    from tests.tiny import bert_folder, timm_folder

    of = Task("single_label_classification", "text", ("bad", "good"))
    folder = save_pretrained(load_backbone(bert_folder(tmp_path / "bert"), of), of, tmp_path / "run" / "model")
    texts = ["a very good film", "dull | and bad"]
    card = make_card(Facts.of(folder), "me/m", examples=texts)
    said = load(folder).predict(texts)
    for entry, text, one in zip(card.head["widget"], texts, said, strict=True):
        assert entry["text"] == text and entry["example_title"].startswith("Example ")
        assert entry["output"][0] == {"label": one.label, "score": pytest.approx(one.score, abs=1e-4)}
        assert sum(output["score"] for output in entry["output"]) == pytest.approx(1, abs=1e-3)
    assert "| dull \\| and bad |" in card.sections["Use it"] and json.dumps(texts[0]) in card.sections["Use it"]

    seen = Task("single_label_classification", "image", ("cat", "dog"))
    timm = timm_folder(tmp_path / "timm", "test_resnet", cfg={"input_size": [3, 32, 32]})
    folder = save_pretrained(load_backbone(timm, seen), seen, tmp_path / "other" / "model")
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    Image.new("RGB", (800, 600), "red").save(tmp_path / "photo.jpg", exif=exif)
    card = make_card(Facts.of(folder), "me/m", examples=[str(tmp_path / "photo.jpg")])
    assert (
        card.head["widget"][0]["src"] == "examples/1.jpg" and "![example 1](examples/1.jpg)" in card.sections["Use it"]
    )
    assert b"taken at home" not in card.files["examples/1.jpg"] and str(tmp_path) not in card.text
    (tmp_path / "copy.jpg").write_bytes(card.files["examples/1.jpg"])
    with Image.open(tmp_path / "copy.jpg") as copy:
        assert max(copy.size) == 384 and not copy.getexif()
    one = load(folder).predict(tmp_path / "copy.jpg")[0]
    assert card.head["widget"][0]["output"][0]["score"] == pytest.approx(one.score, abs=1e-4)
    with pytest.raises(RunError, match="examples: .*gone.jpg: file not found"):
        make_card(Facts.of(folder), "me/m", examples=[str(tmp_path / "gone.jpg")])
