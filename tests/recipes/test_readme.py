"""What the README shows can be run: its Python as it stands, its commands by name and option."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


@pytest.mark.recipe
def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for folder, number in (("photos/dark", 12), ("photos/light", 12), ("new_photos", 2)):
        (tmp_path / folder).mkdir(parents=True)
        for name in range(number):
            pixels = rng.integers(0, 128, (64, 64, 3)) + 127 * ("light" in folder)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    # The backbone of the example is on the Hub; the one in the package stands in for it.
    exec(block.replace("timm/convnext_nano.in12k_ft_in1k", "fractals"), {})
    assert (tmp_path / "runs" / "photos" / "model" / "model.safetensors").is_file()
    assert "'accuracy'" in capsys.readouterr().out


def test_commands_name_what_exists() -> None:
    commands = "\n".join(blocks(""))
    assert "make demo" in commands and "make test" in commands
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", commands, re.M):
        assert f"\n{target}: " in makefile, target
    used = re.findall(r"python (recipes/\w+\.py)((?: +--[\w-]+ [^\s#]+)*)", commands)
    assert len(used) >= 3
    for recipe, options in used:
        source = (ROOT / recipe).read_text()
        for option in re.findall(r"--([\w-]+)", options):
            assert re.search(rf"^ +{option.replace('-', '_')}: ", source, re.M), (recipe, option)


def test_figures_have_files() -> None:
    for path in re.findall(r"`((?:scripts|finetune|recipes)/[\w/]+\.\w+)`", README):
        assert (ROOT / path).exists(), path
