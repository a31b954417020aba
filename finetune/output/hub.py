"""A model folder and a repository's name go in; the model goes to the Hugging Face Hub, the commit's URL comes out."""

import json
import re
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RemoteEntryNotFoundError

from finetune.errors import RunError
from finetune.model.fetch import read_notes

PIPELINES = {
    ("single_label_classification", "image"): "image-classification",
    ("multi_label_classification", "image"): "image-classification",
    ("single_label_classification", "text"): "text-classification",
    ("multi_label_classification", "text"): "text-classification",
    ("regression", "text"): "text-classification",
    ("token_classification", "text"): "token-classification",
}
METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "f1_macro": "f1",
    "mae": "mae",
    "spearman": "spearmanr",
}  # the Hub's names
# Others than these the Hub takes only as "other" with a name.
LICENCES = {
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "cc0-1.0",
    "gpl-3.0",
    *(f"cc-by-{kind}4.0" for kind in ("", "sa-", "nc-")),
}
_MARK = "<!-- finetune wrote this card ({digest}); edit it, and later uploads leave it alone -->\n"


def push_to_hub(folder: Path, repo_id: str, *, private: bool = False, commit_message: str = "Add model") -> str:
    """Upload the plain checkpoint in `folder` (a model folder, or the run folder around it), in one commit.

    A card is added, unless the folder has a README.md of its own, or somebody wrote or edited the one on the Hub.
    Nothing is written to the folder.

    Args:
        folder: Where the model is.
        repo_id: "owner/name"; made if it does not exist. "name" alone is one of the account's own.
        private: Whether a new repository is private. An existing public one is refused.
        commit_message: Title of the commit.

    Returns:
        URL of the commit.

    Raises:
        RunError: No model in the folder, no token, no permission, or the Hub cannot be reached.
    """
    folder = Path(folder)
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not read_notes(folder):
        raise RunError(f"{folder}: no model here that finetune wrote; give a run folder, or the model/ in it")
    if get_token() is None:
        raise RunError(f"{repo_id}: no Hugging Face token; run `hf auth login`, or set HF_TOKEN to one that may write")
    safe = f"the model is whole in {folder}"
    api = HfApi(library_name="finetune-onecycle")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise RunError(f"{repo_id}: exists and is public; make it private on the Hub, or give another name")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = {file.relative_to(folder).as_posix(): file for file in files}
        additions = [CommitOperationAdd(name, file) for name, file in names.items() if not name.startswith(".")]
        if "README.md" not in names and _is_ours(_card_on_hub(api, repo_id)):
            additions.append(CommitOperationAdd("README.md", model_card(folder, repo_id).encode()))
        return str(api.create_commit(repo_id, additions, commit_message=commit_message).commit_url)
    except HFValidationError as error:
        raise RunError(f"{repo_id}: not a name of a repository ({_line(error)}); give it as owner/name") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise RunError(
                f"{repo_id}: the Hub refused the upload ({status}); check that the token is valid and may write to "
                f"this repository (https://huggingface.co/settings/tokens); {safe}"
            ) from None
        raise RunError(f"{repo_id}: the Hub answered {status} ({_line(error)}); try again; {safe}") from None
    except RunError:
        raise
    except Exception as error:  # Of which library, differs between the versions of huggingface_hub.
        if "metadata in README.md" in str(error):  # The Hub checks the head of a card before it takes anything.
            said = " ".join(str(error).split())
            raise RunError(f"{folder / 'README.md'}: {said}; mend the head of this card, or write one") from None
        raise RunError(f"{repo_id}: the Hub cannot be reached ({_line(error)}); upload it later; {safe}") from None


def model_card(folder: Path, repo_id: str) -> str:
    """The card of the model in `folder`: what is known of it, from its `finetune.json` and the `run.json` beside it."""
    notes = read_notes(folder)
    record_file = folder.parent / "run.json"
    record = json.loads(record_file.read_text(encoding="utf-8")) if record_file.is_file() else {}
    task, base = notes["task"], notes.get("base_model")
    base = base if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None
    plain = "head" not in notes and notes["family"] in ("timm", "transformers")
    metrics = {
        split: {name: value for name, value in record["metrics"][split].items() if isinstance(value, int | float)}
        for split in ("test", "valid")
        if split in record.get("metrics", {})
    }
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    licence = (notes.get("licence") or "").lower()
    data = ModelCardData(
        library_name=notes["family"] if plain else None,
        pipeline_tag=PIPELINES.get((task["kind"], task["modality"])) if plain else None,
        base_model=base,
        license=(licence if licence in LICENCES else "other") if licence else None,
        license_name=re.sub(r"[^a-z0-9.-]+", "-", licence) if licence and licence not in LICENCES else None,
        metrics=sorted({METRICS[name] for name in names if name in METRICS}) or None,
        tags=["finetune-onecycle", task["kind"].replace("_", "-")],
    )
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"A {notes.get('architecture') or 'model'}"
    lines = [
        f"# {repo_id.rpartition('/')[2]}",
        f"{origin}, fine-tuned for {task['kind'].replace('_', ' ')} of {task['modality']}s with `finetune-onecycle`.",
        "## Use\n\n```python\n" + _usage(notes, plain, repo_id) + "\n```",
    ]
    if names:
        columns = [{"test": "test", "valid": "validation"}[split] for split in metrics]
        table = [f"| metric | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name in names:
            cells = [f"{values[name]:.4g}" if name in values else "" for values in metrics.values()]
            table.append(f"| {name} | {' | '.join(cells)} |")
        counts = ", ".join(f"{split} {rows}" for split, rows in record["data"]["counts"].items())
        note = (
            ""
            if "test" in metrics
            else " The weights were chosen on the validation rows: expect a little less elsewhere."
        )
        lines.append("## Results\n\n" + "\n".join(table) + f"\n\nRows: {counts}.{note}")
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n\n"
    return text + _MARK.format(digest=_digest(text))


def _usage(notes: dict[str, Any], plain: bool, repo_id: str) -> str:
    task = notes["task"]
    if not plain:
        own = {"head": f"head={notes['head']['class']}"} if "head" in notes and not notes["head"].get("linear") else {}
        own |= {"module": "module=..."} if notes["family"] == "module" else {}
        arguments = "".join(f", {argument}" for argument in own.values())
        return (
            "import finetune\nfrom huggingface_hub import snapshot_download\n\n"
            f'model = finetune.load(snapshot_download("{repo_id}"){arguments})'
        )
    if notes["family"] == "timm":
        return f'import timm\n\nmodel = timm.create_model("hf-hub:{repo_id}", pretrained=True)'
    pipeline = PIPELINES.get((task["kind"], task["modality"]), "image-feature-extraction")
    return f'from transformers import pipeline\n\nmodel = pipeline("{pipeline}", model="{repo_id}")'


def _card_on_hub(api: HfApi, repo_id: str) -> str | None:
    with TemporaryDirectory() as folder:
        try:
            return Path(api.hf_hub_download(repo_id, "README.md", local_dir=folder)).read_text(encoding="utf-8")
        except RemoteEntryNotFoundError:
            return None


def _is_ours(card: str | None) -> bool:
    """Whether nobody has written or edited the card that is there."""
    if card is None:
        return True
    text, mark, _ = card.rpartition(_MARK.partition("{")[0])
    return bool(mark) and card == text + _MARK.format(digest=_digest(text))


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:12]


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
