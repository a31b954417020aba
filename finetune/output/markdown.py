"""Names, texts and numbers of anybody go in; Markdown that shows them as they are comes out; and its sections."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 300  # characters of a cell
FOLDED = 30  # rows from which a table is folded away
# Entities where a backslash would not do: the Hub looks for formulas ($$, \\() before it reads Markdown.
_SPECIAL = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "&#92;", "$": "&#36;"}
_SPECIAL |= {sign: f"\\{sign}" for sign in "`*_[]|~#!"}
_LINK = re.compile(r"(?i)\b(https?|ftp)(:)(?=//)|\b(www)(\.)")  # a bare address becomes a link by itself


def text(value: Any, longest: int = LONGEST) -> str:
    """A value on one line, with nothing in it that Markdown, HTML or a formula would act upon, and no link."""
    line = " ".join(str(value).split())
    line = line if len(line) <= longest else line[: longest - 1] + "…"
    line = "".join(_SPECIAL.get(sign, sign) for sign in line)
    return _LINK.sub(lambda found: f"{found[1] or found[3]}&#{ord(found[2] or found[4])};", line)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; a column whose title begins with ">" is set to the right. Cells are taken as Markdown."""
    titles = [title.removeprefix(">") for title in header]
    lines = [titles, ["---:" if title.startswith(">") else "---" for title in header], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def folded(content: str, summary: str, rows: int, most: int = FOLDED) -> str:
    """Content under a line to click on, where it is long."""
    return f"<details><summary>{summary}</summary>\n\n{content}\n\n</details>" if rows > most else content


def sections(body: str) -> dict[str, str]:
    """Split at headings of the second level, outside of code: heading -> text below it; "" is what stands above."""
    found: dict[str, list[str]] = {"": []}
    heading, fence = "", ""
    for line in body.splitlines():
        mark = re.match(r"\s{0,3}(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
        elif fence and re.fullmatch(rf"\s{{0,3}}{re.escape(fence[0])}{{{len(fence)},}}\s*", line):
            fence = ""
        title = re.fullmatch(r"##\s+(.+?)\s*", line) if not fence else None
        if title:
            heading = title[1]
            while heading in found:  # somebody has written two of the same name
                heading += " "
            found[heading] = []
        else:
            found[heading].append(line)
    return {heading: "\n".join(lines).strip("\n") for heading, lines in found.items()}


def joined(parts: dict[str, str]) -> str:
    """The text of these sections."""
    return "\n\n".join(
        text for heading, body in parts.items() for text in (f"## {heading.rstrip()}" if heading else "", body) if text
    )
