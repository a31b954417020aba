"""Runs a command on a terminal of its own, and draws what stands on it: once on the way, once at the end.

    pip install pyte
    python scripts/draw_terminal.py docs/pictures/terminal --at 0.6 -- finetune fit photos/ --out /tmp/run --overwrite

Needs Chromium, which turns the page of letters into a picture.
"""

import argparse
import os
import pty
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

import pyte

COLUMNS, LINES = 132, 34
PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #14181f; color: #e4e8ef; font: 14px/1.35 "DejaVu Sans Mono", monospace; }}
pre {{ margin: 0; padding: 16px 20px; font: inherit; }}
</style><pre>{}</pre>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stem", type=Path, help="pictures are STEM-running.png and STEM-finished.png")
    parser.add_argument("--at", type=float, default=0.6, help="share of the output after which the first is drawn")
    parser.add_argument("--shown", help="the command as the picture shows it")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    output = recorded(options.command)
    shown = options.shown or " ".join(options.command)
    for name, part in (("running", output[: int(options.at * len(output))]), ("finished", output)):
        draw(f"$ {shown}\r\n".encode() + part, options.stem.with_name(f"{options.stem.name}-{name}.png"))


def recorded(command: list[str]) -> bytes:
    """All that a command writes on a terminal of this size."""
    kept = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 65536)
        kept.extend(data)
        return data

    os.environ |= {"COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "xterm-256color"}
    if status := pty.spawn(command, read):
        raise SystemExit(f"{command[0]} ended with {os.waitstatus_to_exitcode(status)}")
    return bytes(kept)


def draw(output: bytes, path: Path) -> None:
    """A picture of the terminal after this output."""
    screen = pyte.Screen(COLUMNS, LINES)
    pyte.ByteStream(screen).feed(output)
    lines = [_line(screen.buffer[row]) for row in range(LINES)]
    while lines and not lines[-1].strip():
        lines.pop()
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "page.html"
        page.write_text(PAGE.format("\n".join(lines)), encoding="utf-8")
        size = f"--window-size={int(COLUMNS * 8.43) + 40},{int(len(lines) * 18.9) + 34}"
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size]
        subprocess.run([*command, f"--screenshot={path.resolve()}", page.as_uri()], check=True, capture_output=True)
    print(path, file=sys.stderr)


def _line(cells: dict[int, pyte.screens.Char]) -> str:
    """A line of the screen in HTML, with its colours."""
    parts = []
    for column in range(COLUMNS):
        cell = cells[column]
        text = escape(cell.data)
        colour = f"#{cell.fg}" if len(cell.fg) == 6 else cell.fg
        parts.append(text if cell.fg == "default" else f'<span style="color: {colour}">{text}</span>')
    return "".join(parts).rstrip()


if __name__ == "__main__":
    main()
