"""A model folder and a repository's name go in; the model goes to the Hugging Face Hub, the commit's URL comes out."""

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from finetune.errors import FinetuneError, RunError
from finetune.model.calls import PASSING, asked_to_wait, http_error, in_a_line, patiently, status
from finetune.model.fetch import PICKLES, read_notes
from finetune.output.card import Card, make_card
from finetune.output.card_facts import Facts

TRIES = 4  # of a commit, where others commit to the same place, or an answer is lost
CONFLICT = (409, 412)
# Files of a model that was in the repository before: beside another model's, loaders would take them for its own.
_OF_A_MODEL = re.compile(
    r"(model|head|adapter_model)[^/]*\.safetensors(\.index\.json)?"
    r"|(pytorch_model|tf_model|flax_model|adapter_model)[^/]*\.(bin|h5|msgpack)(\.index\.json)?"
    r"|(config|adapter_config|finetune|processor_config|preprocessor_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens"
    r"|vocab)\.json|(vocab|merges)\.txt|chat_template\.(jinja|json)|[^/]+\.model|backbone/.*"
)
_SETTLED = (FinetuneError, HFValidationError)

logger = logging.getLogger("finetune")


@dataclass(frozen=True)
class Parcel:
    """What is sent: files of the folder by their path in the repository, the card, and what stays behind."""

    folder: Path
    files: dict[str, Path]
    card: Card | None  # None where the folder has a card of its author's own
    kept_back: tuple[str, ...]

    def listed(self, repo_id: str) -> str:
        """A line a file, with its size."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        if self.card is not None:
            sizes |= {name: len(content) for name, content in self.card.files.items()}
            sizes["README.md"] = len(self.card.text.encode())
        lines = [f"{name:<40} {_size(sizes[name]):>9}" for name in sorted(sizes)]
        lines += [f"{name:<40} kept back: pickles can run code when they are loaded" for name in self.kept_back]
        total = f"{len(sizes)} files, {_size(sum(sizes.values()))}"
        return "\n".join([f"{repo_id}: would get {total}; nothing was sent", *lines])


def push_to_hub(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str = "Add model",
    create_pr: bool = False,
    examples: Sequence[Any] = (),
    dry_run: bool = False,
    adapter: bool = False,
) -> str:
    """Upload the plain checkpoint in `folder` (a model folder, or the run folder around it) with its card, in a commit.

    The token is that of `hf auth login`, or HF_TOKEN. What was broken off goes on where it was: files that arrived are
    not sent again. Of a card that this package wrote earlier, what somebody edited stays as it is; a card that somebody
    else wrote stays whole. Nothing is written to the folder.

    Args:
        folder: Where the model is.
        repo_id: "owner/name"; made if it does not exist. "name" alone is one of the account's own.
        private: Whether a new repository is private. An existing public one is refused.
        revision: Branch to commit to, made if it does not exist; by default main.
        commit_message: Title of the commit.
        create_pr: Propose the commit instead, which needs no right to write.
        examples: Texts, pairs of texts or images that everybody may see; the card shows them with the model's answers.
            Without them, it shows rows of the data only where these are public on the Hub.
        dry_run: Send nothing and ask nobody; only say what would be sent.
        adapter: Send the run's adapter in place of the merged model; who loads it fetches the backbone from the Hub.

    Returns:
        URL of the commit, or of the pull request; in a dry run, the list of files.

    Raises:
        RunError: No model in the folder, no token, no permission, or the Hub cannot be reached.
    """
    folder = Path(folder)
    if adapter and not (folder / "adapter_config.json").is_file():
        if not (folder / "adapter" / "adapter_config.json").is_file():
            raise RunError(f'{folder}: no adapter here; train with settings={{"lora": 8}}, or push the whole model')
        folder = folder / "adapter"
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not read_notes(folder):
        raise RunError(f"{folder}: no model here that finetune wrote; give a run folder, or the model/ in it")
    facts = Facts.of(folder)
    if facts.adapter and facts.adapter_base is None and facts.notes["family"] != "module":
        raise RunError(
            f"{folder / 'adapter_config.json'}: base_model_name_or_path names no repository of the Hub, and nobody "
            "else could load the adapter; write the id there of one with the same weights, or push the whole model"
        )
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise RunError(f"revision: {revision} is a commit, to which nothing can be added; give the name of a branch")
    if not commit_message.strip():
        raise RunError("commit_message: is empty; say in a few words what is sent")
    try:
        validate_repo_id(repo_id)
        if dry_run:
            return _pack(facts, repo_id, {}, examples).listed(repo_id)
        if get_token() is None:
            raise RunError(
                f"{repo_id}: no Hugging Face token; run `hf auth login`, or set HF_TOKEN to one that may write"
            )
        api = HfApi(library_name="finetune-onecycle")
        repo_id = _make_repository(api, repo_id, private, revision if not create_pr else None)
        facts, public = _data_on_hub(api, facts)
        if public and not examples and facts.plain and facts.whole.is_dir():
            from finetune.output.card_examples import public_rows

            examples = public_rows(facts)
        parcel = _pack(facts, repo_id, _about(api, facts.base_model), examples)
        return _send(api, repo_id, parcel, revision, commit_message.strip(), create_pr)
    except FinetuneError:
        raise
    except HFValidationError as error:
        said = in_a_line(error).partition(": ")[2]
        raise RunError(f"{repo_id}: not a name of a repository ({said}); give it as owner/name") from None
    except Exception as error:  # of which library, differs between the versions of huggingface_hub
        raise _explained(error, repo_id, folder, revision) from None


def _make_repository(api: HfApi, repo_id: str, private: bool, branch: str | None) -> str:
    """Make the repository and the branch, where they are not there; the repository's full name."""
    repo_id = patiently(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True)).repo_id
    if private and not patiently(lambda: api.model_info(repo_id)).private:
        raise RunError(f"{repo_id}: exists and is public; make it private on the Hub, or give another name")
    if branch is not None and not branch.startswith("refs/"):
        patiently(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
    return repo_id


def _about(api: HfApi, base_model: str | None) -> dict[str, Any]:
    """The head of the backbone's card; {} where it cannot be had, and the card says less."""
    if base_model is None:
        return {}
    try:
        card = api.model_info(base_model, timeout=5.0).card_data
        return card.to_dict() if card is not None else {}
    except Exception:
        return {}


def _data_on_hub(api: HfApi, facts: Facts) -> tuple[Facts, bool]:
    """The facts, without a data set that the Hub does not know (a folder can be called like one); and whether
    everybody may see it."""
    if facts.hub_data is None:
        return facts, False
    try:
        about = patiently(lambda: api.dataset_info(str(facts.hub_data), timeout=5.0))
        return facts, not about.private and not about.gated
    except RepositoryNotFoundError:
        return replace(facts, local_data=True), False
    except Exception:
        return facts, False


def _pack(facts: Facts, repo_id: str, base: dict[str, Any], examples: Sequence[Any]) -> Parcel:
    """Gather what is sent. Hidden files stay, and so do pickles: loaders might take them for the weights."""
    folder, files = facts.folder, dict[str, Path]()
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in inner.parts):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise RunError(
                f"{path}: a link to a file outside of the folder; put the file itself there, or remove the link"
            )
        files[inner.as_posix()] = path
    pickles = tuple(name for name in files if name.endswith(PICKLES))
    for name in pickles:
        del files[name]
    own = folder / "README.md"
    earlier = Card.read(own.read_text(encoding="utf-8")) if "README.md" in files else None
    if "README.md" in files and earlier is None:
        return Parcel(folder, files, None, pickles)
    card = make_card(facts, repo_id, base=base, examples=examples)
    if earlier is not None:
        del files["README.md"]
        card, _ = card.keeping(earlier)
    return Parcel(folder, files, card, pickles)


def _send(api: HfApi, repo_id: str, parcel: Parcel, revision: str | None, message: str, create_pr: bool) -> str:
    """Upload, then commit on top of what was read: whoever commits in between loses nothing."""
    for attempt in range(TRIES):
        info = patiently(lambda: api.model_info(repo_id, revision=revision))
        additions = [CommitOperationAdd(name, path) for name, path in parcel.files.items()]
        if parcel.card is not None:
            additions += _card_operations(api, repo_id, parcel.card, str(info.sha))
        names = {addition.path_in_repo for addition in additions}
        there = [file.rfilename for file in info.siblings or ()]
        stale = [CommitOperationDelete(name) for name in there if _OF_A_MODEL.fullmatch(name) and name not in names]
        api.preupload_lfs_files(
            repo_id, additions, revision=revision, create_pr=create_pr, free_memory=False
        )  # tries again by itself, and does not send what is there
        try:
            done = patiently(
                lambda operations=[*additions, *stale], parent=info.sha: api.create_commit(  # type: ignore[misc]
                    repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr,
                    parent_commit=parent,
                ),
                on=(429, 503) if create_pr else PASSING,  # after others, the pull request may be made twice
                cut=False,
            )  # fmt: skip
        except HfHubHTTPError as error:
            if status(error) not in CONFLICT or attempt == TRIES - 1:
                raise
        except _SETTLED:
            raise
        except Exception as error:  # No answer: what was asked is done, or not. The next round finds out.
            if create_pr:
                page = f"{api.endpoint}/{repo_id}/discussions"
                raise RunError(
                    f"{repo_id}: the connection broke off ({in_a_line(error)}) before it was known whether the pull "
                    f"request was made; look at {page}, and push again if it is not there"
                ) from None
            if "metadata in README.md" in str(error) or attempt == TRIES - 1:
                raise
        else:
            return str(done.pr_url if create_pr else done.commit_url)
        logger.warning("%s: somebody else committed, or the answer was lost; looking again", repo_id)
        time.sleep(attempt + 1)
    raise AssertionError("the last attempt returns or raises")


def _card_operations(api: HfApi, repo_id: str, card: Card, sha: str) -> list[CommitOperationAdd]:
    """The card on top of the one that is there, with its pictures; nothing where that one is somebody else's."""
    readme = _read(api, repo_id, "README.md", sha)
    if readme is not None and readme.strip():
        there = Card.read(readme)
        if there is None:
            logger.warning("%s: its README.md was not written by finetune, so it stays as it is", repo_id)
            return []
        card, kept = card.keeping(there)
        if kept:
            logger.warning("%s: parts of the card that were edited stay: %s", repo_id, ", ".join(kept))
    pictures = [CommitOperationAdd(name, content) for name, content in card.files.items()]
    return [CommitOperationAdd("README.md", card.text.encode()), *pictures]


def _read(api: HfApi, repo_id: str, name: str, sha: str) -> str | None:
    """A small file of the repository; None where it is not there."""
    with TemporaryDirectory() as folder:
        try:
            path = patiently(lambda: api.hf_hub_download(repo_id, name, revision=sha, local_dir=folder))
            return Path(path).read_text(encoding="utf-8")
        except RemoteEntryNotFoundError:
            return None


def _explained(error: Exception, repo_id: str, folder: Path, revision: str | None) -> RunError:
    """The error as a person needs it: what is wrong, what to do, and that nothing is lost."""
    answer, code, safe = http_error(error), status(error), f"the model is whole in {folder}"
    if "metadata in README.md" in str(error):  # the Hub checks the head of a card before it takes anything
        said = " ".join(str(error).split())
        return RunError(f"{folder / 'README.md'}: {said}; mend the head of this card, or write one")
    if isinstance(answer, GatedRepoError):
        todo = f"accept its terms on https://huggingface.co/{repo_id}, then push again"
        return RunError(f"{repo_id}: access to it must be asked for; {todo}; {safe}")
    if isinstance(answer, RevisionNotFoundError):
        return RunError(f"{repo_id}: has no branch {revision!r}; make it first, or leave revision out; {safe}")
    if code in (401, 403):
        return RunError(
            f"{repo_id}: the Hub refused the upload ({code}); check that the token is valid and may write to "
            f"this repository (https://huggingface.co/settings/tokens); {safe}"
        )
    if isinstance(answer, RepositoryNotFoundError):
        return RunError(f"{repo_id}: no such repository, or the token may not see it; check the name; {safe}")
    if code in CONFLICT:
        return RunError(f"{repo_id}: others keep committing there ({code}); push again when they are done; {safe}")
    if code == 429:
        seconds = asked_to_wait(error)
        wait = f"in {seconds / 60:.0f} minutes" if seconds and seconds >= 60 else "later"
        return RunError(f"{repo_id}: too many requests, the Hub says; push again {wait}; {safe}")
    if code is not None:
        return RunError(f"{repo_id}: the Hub answered {in_a_line(error)}; try again; {safe}")
    if isinstance(error, OSError) and error.filename:
        return RunError(f"{error.filename}: {error.strerror}; mend that, and push again")
    return RunError(f"{repo_id}: the Hub cannot be reached ({in_a_line(error)}); upload it later; {safe}")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
