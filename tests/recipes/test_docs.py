"""The tutorials can be followed: their blocks are run in order, in a folder with the data that they name; commands for
several GPUs are read, options and all. And the table of features links to tests that are there."""

import ast
import os
import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune import verbs_cli, verbs_train
from tests.tiny import WORDS, bert_folder

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
TUTORIALS = ["my_photos", "my_csv", "my_own_head", "my_own_loop", "several_gpus", "the_hub", "reading_the_report"]


def blocks(name: str) -> list[tuple[str, str]]:
    """(language, text) of each block of a tutorial that has a language; the others show files."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / f"{name}.md").read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, new_photos/, reviews.csv, reviews_test.csv, pets.csv, and a backbone for texts."""
    root, rng = tmp_path_factory.mktemp("docs"), np.random.default_rng(0)

    def picture(path: str, bright: int) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((rng.integers(0, 128, (64, 64, 3)) + 60 * bright).astype(np.uint8)).save(root / path)

    for number in range(16):
        picture(f"photos/cat/{number}.png", 0)
        picture(f"photos/dog/{number}.png", 2)
        picture(f"pets/{number}.png", number % 3)
    picture("new_photos/1.png", 0)
    picture("new_photos/2.png", 2)
    pets = [f"pets/{number}.png,{number % 3},{number % 5 + 0.5}" for number in range(16)]
    (root / "pets.csv").write_text("\n".join(["file,species,age", *pets]))
    for name, rows in (("reviews", range(40)), ("reviews_test", range(40, 52))):
        lines = [
            f"{i},the film was {' '.join(rng.permutation(WORDS[:15])[:3])} {('bad', 'good')[i % 2]} {i},"
            f"{('bad', 'good')[i % 2]},c{i // 3}"
            for i in rows
        ]
        (root / f"{name}.csv").write_text("\n".join(["id,text,label,customer", *lines]))
    bert_folder(root / "bert")
    return root


def run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of a shell block, in this process; lines for launchers are only read."""
    words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] in ("accelerate", "sbatch"):
        return read_launch(words)
    if words[1] == "onnx" and not find_spec("onnxruntime"):
        return
    if words[1] == "push" and "--dry-run" not in words:  # there is no Hub here
        words.append("--dry-run")
    script = words[0] == "python"
    monkeypatch.setattr(sys, "argv", words[1:] if script else words)
    allowed = (0, 1) if words[1] == "doctor" else (0,)  # it may find something to mend
    try:
        runpy.run_path(str(ROOT / words[1]), run_name="__main__") if script else verbs_cli.main()
    except SystemExit as end:
        assert (end.code or 0) in allowed, line


def read_launch(words: list[str]) -> None:
    """What accelerate, and the recipe behind it, would be given: files that exist, options that they have."""
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        asked = launch_command_parser().parse_args(words[2:])
        assert asked.config_file is None or (ROOT / asked.config_file).is_file(), words
        script, options = asked.training_script, asked.training_script_args
    else:
        assert (ROOT / words[1]).is_file(), words
        script, options = "recipes/image_classification.py", words[2:]
    tree = ast.parse((ROOT / script).read_text())
    (main,) = [node.args for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    known = {argument.arg.replace("_", "-") for argument in [*main.args, *main.kwonlyargs]}
    for option in (word[2:] for word in options if word.startswith("--")):
        assert option in known, (script, option)


@pytest.mark.recipe
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_can_be_followed(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for entry in data.iterdir():
        os.symlink(entry, tmp_path / entry.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(verbs_train, "BACKBONES", {"image": "fractals", "text": "bert"})
    names: dict[str, Any] = {"__name__": "docs"}
    found = blocks(name)
    assert found and {language for language, _ in found} <= {"bash", "python"}
    for language, text in found:
        # What the defaults and the examples name is on the Hub; small ones stand in, and a push is a dry run.
        text = text.replace("answerdotai/ModernBERT-base", "bert").replace(
            "private=True)", "private=True, dry_run=True)"
        )
        if language == "python":
            exec(compile(text, f"{name}.md", "exec"), names)
        for line in text.splitlines() if language == "bash" else ():
            run_line(line, monkeypatch)
    assert "error: " not in capsys.readouterr().err


def test_the_tutorials_are_these() -> None:
    assert sorted(path.stem for path in DOCS.glob("*.md")) == sorted([*TUTORIALS, "features", "super_convergence"])
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (DOCS / target).exists(), (path.name, target)
        for file in re.findall(r"`(recipes/[\w/]*\w+\.\w+)`", path.read_text()):
            assert (ROOT / file).is_file(), (path.name, file)


def test_what_we_say_we_have_is_tested() -> None:
    """Each of our cells but a "no" links to a test function, by its file and name."""
    lines = [line for line in (DOCS / "features.md").read_text().splitlines() if line.startswith("|")]
    head, rows = lines[0], [line.strip("|").split("|") for line in lines if not re.match(r"\|( \*\*|-)", line)][1:]
    assert head.split("|")[2].strip() == "finetune" and len(rows) >= 40
    for feature, ours, *peers in rows:
        assert len(peers) == 6 and {peer.strip() for peer in peers} <= {"yes", "no", "partly", "?"}, feature
        if ours.strip() == "no":
            continue
        said, test, target = re.fullmatch(r" (yes|partly), \[(\w+)\]\(\.\./([\w/.]+)\) ", ours).groups()  # type: ignore[union-attr]
        tree = ast.parse((ROOT / target).read_text())
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (feature, test)
