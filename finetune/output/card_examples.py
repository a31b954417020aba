"""Texts or images that may be shown to everybody go in; what the model says of each comes out, for its card.

Rows of somebody's own data are published only where they are given for it, or where the data set is public already.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
from PIL import Image

from finetune.data.images import BadImage, open_image
from finetune.errors import RunError
from finetune.output.card_facts import Facts
from finetune.output.inputs import image_cell
from finetune.output.predict import Prediction, load

SIDE = 384  # pixels, at most, of an image in the repository
MOST = 6  # examples, and labels of one, that are shown
LONGEST = 300  # characters of a text


@dataclass(frozen=True)
class Example:
    """An input and what the model says of it.

    Attributes:
        text: The text, or both of a pair; None for an image.
        path: Where the image is in the repository; None for a text.
        content: The image's file.
        answer: What the model says, in words.
        output: The same as the Hub's widget wants it: [{"label", "score"}]; None where it cannot show it.
        single: Whether it is a single text or image, which the widget can be asked about.
    """

    text: str | None
    path: str | None
    content: bytes | None
    answer: str
    output: list[dict[str, Any]] | None
    single: bool = True


def examples(facts: Facts, given: Sequence[Any]) -> list[Example]:
    """Predict for the examples `given`: texts, pairs of texts, paths of images.

    Raises:
        RunError: An image cannot be read; the model cannot be loaded without its own code.
    """
    if not given:
        return []
    if not facts.plain:
        raise RunError("examples: only for models that timm or transformers loads whole; leave them out")
    if not facts.whole.is_dir():
        raise RunError(f"examples: need the merged model, and {facts.whole} is not there; leave them out")
    files: list[bytes | None] = [None] * len(given)
    if facts.modality == "image":
        files = [_as_jpeg(source) for source in given]
        given = [Image.open(io.BytesIO(content)) for content in files if content is not None]
    found = []
    for i, (item, content, said) in enumerate(
        zip(given, files, load(facts.whole).predict(list(given)), strict=True), 1
    ):
        if said.error is not None:
            raise RunError(f"examples: {str(item)[:60]!r}: {said.error}; leave it out")
        text = None if content is not None else " / ".join(item) if isinstance(item, tuple | list) else str(item)
        path = f"examples/{i}.jpg" if content is not None else None
        output = _output(said) if facts.kind != "token_classification" else None
        found.append(
            Example(text, path, content, _answer(item, said), output, isinstance(item, str) or path is not None)
        )
    return found


def public_rows(facts: Facts) -> list[Any]:
    """A few rows, one a class, of the Hub's data set that the model was trained on: only for one that all may see."""
    if facts.kind == "token_classification":  # its rows are lists of words, from which the text cannot be had back
        return []
    try:
        from finetune.data.sources import read

        parts = read(str(facts.data["source"]))
    except Exception:  # an example is worth no failed upload
        return []
    part = parts.get(facts.split) or next(iter(parts.values()))
    columns = facts.data.get("columns", {})
    image = columns.get("image")
    if image in part.data.column_names:  # as it lies there: what its path names may be anything on this machine
        part = replace(part, data=part.data.cast_column(image, datasets.Image(decode=False)))
    roles = [columns[role] for role in ("image", "text", "text_pair") if columns.get(role) in part.data.column_names]
    rows: dict[Any, Any] = {}
    for row in part.data.select(range(min(500, len(part.data)))):
        key = str(row.get(columns.get("label"), len(rows)))
        if roles and len(rows) < MOST and key not in rows:
            value = row[roles[0]] if len(roles) == 1 else tuple(str(row[role]) for role in roles)
            if image in roles:
                cell = image_cell(row[image], part, 0)
                if cell.error is not None:
                    continue
                value = cell.item
            rows[key] = value
    return list(rows.values())


def _as_jpeg(source: Any) -> bytes:
    """A small copy without what the camera wrote into the file, such as the place."""
    try:
        image = source.convert("RGB") if isinstance(source, Image.Image) else open_image(source)
    except BadImage as error:
        raise RunError(f"examples: {source}: {error}; give another image") from None
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(content, "JPEG", quality=88)
    return content.getvalue()


def _output(said: Prediction) -> list[dict[str, Any]] | None:
    scores = said.probabilities or said.values or {}
    best = sorted(scores.items(), key=lambda item: -item[1])[:MOST] if said.probabilities else list(scores.items())
    return [{"label": label, "score": round(float(score), 4)} for label, score in best] or None


def _answer(item: Any, said: Prediction) -> str:
    if said.tags is not None:
        words = item.split() if isinstance(item, str) else list(item)
        tagged = [f"{word} ({tag})" for word, tag in zip(words, said.tags, strict=True) if tag not in (None, "O")]
        return ", ".join(tagged) or "nothing"
    if said.values is not None:
        return ", ".join(f"{name} {value:.4g}" for name, value in said.values.items())
    if said.labels is not None:
        return (
            ", ".join(f"{label} ({(said.probabilities or {})[label]:.2f})" for label in said.labels) or "none of them"
        )
    return f"{said.label} ({said.score:.2f})"
