"""A model folder and a repository's name go in; its model card comes out, with the files that it shows.

The card's head is what the Hub reads (https://huggingface.co/docs/hub/model-cards). A last line, which no page shows,
holds a digest of each part as it was written, so that what somebody edited since survives when it is written again.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import yaml_dump

from finetune.output.card_facts import Facts
from finetune.output.card_sections import all_sections
from finetune.output.markdown import joined, sections, text
from finetune.output.report import readable

# Ids of licences that the Hub takes; others are "other", with a name (as its refusal lists them, huggingface_hub#4218).
LICENCES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr "
    "mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr "
    "deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "grok2-community gemma".split()
)
# Names of metrics on the Hub (https://huggingface.co/metrics).
METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "f1_macro": "f1",
    "f1_micro": "f1",
    "precision": "precision",
    "recall": "recall",
    "mae": "mae",
    "spearman": "spearmanr",
    "r2": "r_squared",
}
SOURCES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}  # `datasets`' names
_HEAD = re.compile(r"^\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.S)
_MARK = re.compile(r"<!-- finetune wrote this; what you edit survives: (\{.*?\}) -->\s*")


@dataclass(frozen=True)
class Card:
    """A card in its parts.

    Attributes:
        head: Metadata for the Hub.
        sections: Heading -> Markdown; "" is what stands above the first heading.
        marks: Part -> digest of it as it was written by this package.
        files: Path in the repository -> content, of pictures and examples.
    """

    head: dict[str, Any]
    sections: dict[str, str]
    marks: dict[str, str]
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The whole README.md."""
        mark = f"<!-- finetune wrote this; what you edit survives: {json.dumps(self.marks)} -->"
        return f"---\n{yaml_dump(self.head, sort_keys=False).strip()}\n---\n\n{joined(self.sections)}\n\n{mark}\n"

    @classmethod
    def read(cls, readme: str) -> "Card | None":
        """The parts of a card that this package wrote; None of one that it did not, or whose head is broken."""
        readme = "\n".join(readme.splitlines()) + "\n"
        head, mark = _HEAD.match(readme), _MARK.search(readme)
        if not head or not mark:
            return None
        try:
            metadata, marks = yaml.safe_load(head[1]), json.loads(mark[1])
        except (yaml.YAMLError, ValueError):
            return None
        body = readme[head.end() : mark.start()] + readme[mark.end() :]
        return cls(metadata, sections(body), marks) if isinstance(metadata, dict) else None

    def keeping(self, edited: "Card") -> tuple["Card", list[str]]:
        """This card with what somebody wrote into, changed in or took out of `edited`; and the names of these parts."""
        head, kept = _keep(self.head, edited.head, edited.marks, "head: ")
        body, more = _keep(self.sections, edited.sections, edited.marks, "")
        return Card(head, body, self.marks, self.files), kept + more


def _keep(
    new: Mapping[str, Any], old: Mapping[str, Any], marks: Mapping[str, str], prefix: str
) -> tuple[dict[str, Any], list[str]]:
    """Parts of `new`, and those of `old` that differ from their mark, in the order of `old`."""
    theirs = {name for name, part in old.items() if marks.get(prefix + name) != _digest(part)}
    gone = {name for name in new if name not in old and prefix + name in marks}
    order = [name for name in old if name in theirs or name in new]
    for place, name in enumerate(new):  # a new part follows the one that it follows in `new`
        if name not in order and name not in gone:
            before = next((other for other in reversed(list(new)[:place]) if other in order), None)
            order.insert(order.index(before) + 1 if before is not None else 0, name)
    names = [name for name in old if name in theirs] + sorted(gone)
    return {name: old[name] if name in theirs else new[name] for name in order}, [prefix + name for name in names]


def _digest(part: Any) -> str:
    return sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()[:12]


def make_card(
    facts: Facts,
    repo_id: str,
    *,
    base: Mapping[str, Any] | None = None,
    examples: Sequence[Any] = (),
    draw: bool = True,
) -> Card:
    """The card of a model.

    Args:
        facts: What is known of it.
        repo_id: Where it will be.
        base: Metadata of the backbone's card on the Hub, where it could be read: for its licence and language.
        examples: Texts, pairs of texts, or images that everybody may see; they are shown with the model's answers.
        draw: Whether it has pictures.

    Raises:
        RunError: An example cannot be read.
    """
    with readable(facts.folder.parent if facts.record else facts.folder):
        return _make_card(facts, repo_id, base or {}, examples, draw)


def _make_card(facts: Facts, repo_id: str, base: Mapping[str, Any], examples: Sequence[Any], draw: bool) -> Card:
    shown: list[Any] = []
    if examples:
        from finetune.output.card_examples import examples as answered  # loads the model

        shown = answered(facts, examples)
    from finetune.output.card_pictures import pictures

    drawn = pictures(facts) if draw else {}
    licence = _licence(facts, base)
    head = metadata(facts, repo_id, licence, base, shown)
    body = all_sections(facts, repo_id, _licence_words(facts, licence), shown, drawn)
    marks = {f"head: {key}": _digest(value) for key, value in head.items()}
    marks |= {heading: _digest(section) for heading, section in sections(joined(body)).items()}
    files = {picture.path: picture.content for picture in drawn.values()}
    files |= {each.path: each.content for each in shown if each.path}
    return Card(head, sections(joined(body)), marks, files)


def metadata(
    facts: Facts, repo_id: str, licence: Mapping[str, str], base: Mapping[str, Any], shown: Sequence[Any]
) -> dict[str, Any]:
    """The head of the card."""
    names = [name for values in facts.metrics.values() for name in values]
    widget = []
    for i, each in enumerate(shown, 1):
        if each.single:
            entry = {"src": each.path} if each.path else {"text": each.text}
            widget.append(entry | {"example_title": f"Example {i}"} | ({"output": each.output} if each.output else {}))
    data = ModelCardData(
        library_name="peft" if facts.adapter else facts.notes["family"] if facts.plain else None,
        pipeline_tag=facts.pipeline,
        base_model=facts.base_model,
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
        language=_language(facts, base),
        datasets=[facts.hub_data] if facts.hub_data else None,
        metrics=sorted({METRICS[name] for name in names if name in METRICS}) or None,
        tags=["finetune-onecycle", facts.kind.replace("_", "-"), *(["lora"] if facts.adapter else [])],
        model_name=repo_id.rpartition("/")[2],
        eval_results=_eval_results(facts) or None,
        base_model_relation=("adapter" if facts.adapter else "finetune") if facts.base_model else None,
        widget=widget or None,
    )
    head = data.to_dict()
    head.pop("model_name", None)
    return json.loads(json.dumps(head))


def _eval_results(facts: Facts) -> list[EvalResult]:
    """Every number of the run; those of a data set that is not on the Hub, under the name of its file or folder."""
    source, config, revision = str(facts.data.get("source", "")), None, None
    if facts.hub_data:  # owner/name:config@revision
        name, _, revision = source.partition("@")
        config = name.partition(":")[2] or None
    of = (
        facts.hub_data
        or SOURCES.get(Path(source).suffix.lower())
        or ("imagefolder" if facts.modality == "image" else "text")
    )
    return [
        EvalResult(
            task_type=facts.pipeline or f"{facts.modality}-classification",
            dataset_type=of,
            dataset_name=facts.data_name or "data of its maker",
            dataset_config=config,
            dataset_revision=revision or None,
            dataset_split={"valid": "validation"}.get(split, split),
            metric_type=METRICS.get(name, name),
            metric_name=name,
            metric_value=value,
        )
        for split, values in facts.metrics.items()
        for name, value in values.items()
        if name != "loss" and abs(value) < float("inf")
    ]


def _language(facts: Facts, base: Mapping[str, Any]) -> list[str] | None:
    """The backbone's, if it has one only: which one of several the texts are in, is not known."""
    given = base.get("language")
    languages = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    return languages if facts.modality == "text" and len(languages) == 1 else None


def _licence(facts: Facts, base: Mapping[str, Any]) -> dict[str, str]:
    """The backbone's licence as the Hub wants it; {} where it is not known."""
    given = facts.notes.get("licence") or base.get("license")
    given = str(given[0] if isinstance(given, list) and given else given or "").strip().lower()
    if not given or given == "unknown":
        return {}
    if given in LICENCES:
        return {"license": given}
    name = str(base.get("license_name") or "") if given == "other" else given
    name = re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-") or "licence-of-the-base-model"
    page = f"https://huggingface.co/{facts.base_model}" if facts.base_model else None
    link = str(base.get("license_link") or "")
    link = link if link.startswith(("https://", "http://")) else page or ""
    return {"license": "other", "license_name": name} | ({"license_link": link} if link else {})


def _licence_words(facts: Facts, licence: Mapping[str, str]) -> str:
    if not licence:
        return "The licence of the backbone is not known, so none is stated here: ask its makers before you use it."
    name = licence.get("license_name") or licence["license"]
    whose = (
        f"of [{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "of its backbone"
    )
    return f"That {whose}: {text(name)}."
