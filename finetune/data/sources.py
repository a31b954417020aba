"""Someone's own data goes in: a folder, a file of rows, a Hub data set, a Dataset; `Splits` come out."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import huggingface_hub

from finetune.data.shards import find_shards, is_shards, read_shards, split_shards
from finetune.data.splits import Splits, build
from finetune.data.tables import IMAGE_SUFFIXES, TABLE_SUFFIXES, Part, find_roles, listed, read_table
from finetune.errors import DataError

Source: TypeAlias = str | Path | datasets.Dataset | datasets.DatasetDict

SPLIT_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing"),
}
NOT_CLASSES = frozenset(("__macosx", "@eadir", "__pycache__"))  # left behind by archives, servers and Python
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?")


def load_images(
    data: Source,
    *,
    test: Source | None = None,
    valid: Source | None = None,
    label: str | Sequence[str] | None = None,
    task: str | None = None,
    image: str | None = None,
    group: str | None = None,
    seed: int = 0,
) -> Splits:
    """Load images with their labels, and check all of them.

    Args:
        data: Folder with one sub-folder a class; or with train/, valid/ and test/ of such folders; or with
            metadata.csv (file_name and label columns), or train.csv and test.csv with image paths; a table with image
            paths; a Dataset or DatasetDict, also saved to disk; the name of a Hub data set, "owner/name[:config]";
            WebDataset shards, which stay where they are: a folder of .tar files, a pattern or range of their paths
            or URLs ("hf://datasets/owner/name/train-{0000..0099}.tar").
        test: Data to test on, of the same kinds; by default what `data` holds under that name, if anything.
        valid: Data to validate on; by default what `data` holds, or else drawn from train.
        label: Column with the label, or several columns of 0/1 or of numbers; by default, found by its name.
        task: "single_label", "multi_label" or "regression"; by default, told from the labels.
        image: Column with the image; by default, found.
        group: Column of a table, such as a patient or a video: rows that agree in it are validated on, or trained on,
            together.
        seed: Of the drawn validation split.

    Processes that have joined (`accelerate launch`) read a share each, so all of them have to call this.

    Raises:
        DataError: The data cannot be trained on; the text names the file, row or column, and the mend.
    """
    return load(data, valid, test, task, seed, modality="image", group=group, image=image, label=label)


def load_table(
    data: Source,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    image: str | None = None,
    tokens: str | None = None,
    label: str | Sequence[str] | None = None,
    targets: str | Sequence[str] | None = None,
    test: Source | None = None,
    valid: Source | None = None,
    task: str | None = None,
    group: str | None = None,
    seed: int = 0,
) -> Splits:
    """Load rows with texts, pairs of texts, lists of words or image paths, and check all of them.

    Args:
        data: .csv, .tsv, .jsonl, .json or .parquet file; folder with train.csv, maybe valid.csv and test.csv (any of
            these suffixes); a Dataset or DatasetDict, also saved to disk; the name of a Hub data set.
        text: Column with the text; by default, found by its name, or the only column with words.
        text_pair: Column with the second text of a pair.
        image: Column with image paths, relative to the file's folder.
        tokens: Column with lists of words; the label is then a list, one a word.
        label: Column with the label, or several columns of 0/1 (multi-label) or of numbers (regression).
        targets: The same as `label`.
        test: Data to test on, of the same kinds; by default what `data` holds under that name, if anything.
        valid: Data to validate on; by default what `data` holds, or else drawn from train.
        task: "single_label", "multi_label", "regression" or "tokens"; by default, told from the labels.
        group: Column, such as an author or a patient: rows that agree in it are validated on, or trained on, together.
        seed: Of the drawn validation split.

    Raises:
        DataError: The data cannot be trained on; the text names the file, row or column, and the mend.
    """
    if label is not None and targets is not None:
        raise DataError("targets: the same as label; give one of them")
    label = targets if label is None else label
    modality = "text" if text or tokens else "image" if image else None
    return load(
        data,
        valid,
        test,
        task,
        seed,
        modality=modality,
        group=group,
        text=text,
        text_pair=text_pair,
        image=image,
        tokens=tokens,
        label=label,
    )


def load_dataset(data: Source, **options: Any) -> Splits:
    """Load images or rows, by what is found; the options are those of `load_images` or `load_table`."""
    return load_table(data, **options)


def load(
    data: Source,
    valid: Source | None,
    test: Source | None,
    task: str | None,
    seed: int,
    *,
    group: str | None = None,
    **roles: Any,
) -> Splits:
    """Read all parts, tell what their columns are, and build the splits."""
    if not 0 <= seed < 2**63:
        raise DataError(f"seed: {seed}; give a whole number from 0 to {2**63 - 1}")
    parts = read(data)
    if "train" not in parts:
        raise DataError(f"{shown(data)}: no train split, only {', '.join(parts)}; rename it, or give its files as data")
    own = set(parts)
    for name, source in (("valid", valid), ("test", test)):
        if source is not None:
            found = read(source, name)
            parts[name] = found.get(name) or found.get("train") or next(iter(found.values()))
            own.discard(name)
    if group is not None and group not in parts["train"].data.column_names:
        raise DataError(f"{parts['train'].where}: no column {group!r}; {listed(parts['train'])}; name one with group=")
    found_roles = find_roles(parts["train"], leave=group, **roles)
    if "test" in own and unlabelled(parts["test"], found_roles.labels):
        parts["train"] = noted(parts["train"], f"{parts.pop('test').where} has no labels, so it is not used.")
    if task is None and parts["train"].class_folders:
        task = "single_label"  # "0" and "1.5" are names when they are folders
    return build(parts, found_roles, task=task, seed=seed, source=shown(data), group=group)


def unlabelled(part: Part, labels: tuple[str, ...]) -> bool:
    """Whether a test split that came with the data has no labels at all, as those of contests have none."""
    columns = [part.data[name][:] for name in labels if name in part.data.column_names]
    hidden = [isinstance(part.data.features.get(name), datasets.ClassLabel) for name in labels]
    return len(columns) < len(labels) or all(
        cell in (None, "") or (cell == -1 and hides)
        for column, hides in zip(columns, hidden, strict=True)
        for cell in column
    )


def noted(part: Part, note: str) -> Part:
    """Add a note for the report."""
    return replace(part, notes=(*part.notes, note))


def shown(data: Source) -> str:
    """What the user gave, in words for run.json and errors."""
    if isinstance(data, datasets.Dataset | datasets.DatasetDict):
        return f"{type(data).__name__} of {data.num_rows} rows"
    return str(data)


# Reading


def read(data: Source, option: str = "data") -> dict[str, Part]:
    """Read any kind of source, given by this option, into parts named "train", "valid" and "test".

    Raises:
        DataError: There is nothing there, or nothing that can be read.
    """
    if isinstance(data, datasets.DatasetDict):
        return of_datasets(dict(data))
    if isinstance(data, datasets.Dataset):
        return of_datasets({"train": data})
    if not isinstance(data, str | Path):
        raise DataError(
            f"{option}: a {type(data).__name__} cannot be read; give a path, a Hub name, a Dataset or a DatasetDict"
            + ("; what streams can be kept as WebDataset shards" * isinstance(data, datasets.IterableDataset))
        )
    if not str(data).strip() or not is_utf8(str(data)):
        raise DataError(f"{option}: {str(data)!r} is no path that can be used; give one whose name is UTF-8")
    try:
        path = Path(os.path.expanduser(data))
        if is_shards(str(data)):
            return {"train": read_shards(find_shards(os.path.expanduser(str(data))), str(data))}
        if path.is_file():
            return {"train": read_table(path)}
        if path.is_dir():
            return read_folder(path)
    except OSError as error:  # no permission, or a name that is too long
        raise DataError(f"{str(data)[:200]}: cannot be read ({error.strerror}); check the path") from None
    return read_hub(str(data))


def of_datasets(splits: dict[str, Any], root: Path | None = None) -> dict[str, Part]:
    """Give the splits of a DatasetDict their names here; a row's id is "train[16]", as in Python."""
    parts: dict[str, Part] = {}
    named = {alias: name for name, aliases in SPLIT_NAMES.items() for alias in aliases}
    for key, data in splits.items():
        name = "train" if len(splits) == 1 else named.get(key.lower())
        if name is None or name in parts:
            continue  # "unsupervised", "validation_mismatched"
        if not len(data):
            raise DataError(f"{key}: no rows; give a data set with a row for each example")
        parts[name] = Part(data.with_format(None), [f"{key}[{row}]" for row in range(len(data))], key, root)
    if not parts:
        raise DataError(f"data: no train split among {', '.join(splits)}; rename one to train")
    return parts


def read_hub(name: str) -> dict[str, Part]:
    """Load a data set from the Hugging Face Hub: "owner/name", with ":config" and "@revision" where there are such."""
    if not HUB_NAME.fullmatch(name):
        raise DataError(f"{name[:200]}: no such file or folder; check the path")
    place, _, revision = name.partition("@")
    repository, _, config = place.partition(":")
    try:
        loaded = datasets.load_dataset(repository, config or None, revision=revision or None)
    except Exception as error:  # datasets raises about everything, from network to format
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        advice = "check the name and the revision, or log in with `hf auth login`"
        if "gated" in reason:
            advice = f"ask for access on https://huggingface.co/datasets/{repository}, then log in with `hf auth login`"
        raise DataError(
            f"{name}: no such file or folder, and not to be had from the Hub ({reason}); {advice}"
        ) from None
    return of_datasets(dict(loaded), root=downloads())


def downloads() -> Path:
    """Folder around all that `datasets` has fetched: pictures of its data sets lie there, and nowhere else."""
    return Path(os.path.commonpath([huggingface_hub.constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE]))


def read_folder(folder: Path) -> dict[str, Part]:
    """Read a folder: a saved Dataset, tables named by split, folders named by split, metadata, or class folders."""
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return read_saved(folder)
    tables = split_tables(folder)
    if "train" in tables:
        return {name: read_table(path) for name, path in tables.items()}
    shards = split_shards(folder, SPLIT_NAMES)
    if shards and not class_folders(folder):
        return {name: read_shards(files, f"{folder} ({name})") for name, files in shards.items()}
    folders = split_folders(folder)
    if "train" in folders:
        parts = {"train": read_images(folders["train"], folder)}
        for name in sorted(folders.keys() - {"train"}):
            if not (metadata(folders[name]) or class_folders(folders[name])):
                parts["train"] = noted(parts["train"], f"{folders[name]} has no class folders, so it is not used.")
            else:
                parts[name] = read_images(folders[name], folder)
        return parts
    return {"train": read_images(folder, folder)}


def read_saved(folder: Path) -> dict[str, Part]:
    """Read a Dataset or DatasetDict saved to disk; its files and pictures have to lie in the folder.

    Raises:
        DataError: They do not, or it is damaged.
    """
    try:
        parts = folder / "dataset_dict.json"
        names = json.loads(parts.read_text(encoding="utf-8"))["splits"] if parts.is_file() else [""]
        for name in names:
            state = json.loads((folder / name / "state.json").read_text(encoding="utf-8"))
            for file in [*filter(None, [name]), *(entry["filename"] for entry in state["_data_files"])]:
                if file in (".", "..") or re.search(r"[/\\]", file):
                    raise DataError(f"{folder}: names {file!r}, which lies elsewhere; do not use this data set")
        loaded = datasets.load_from_disk(str(folder))
    except DataError:
        raise
    except Exception as error:  # whatever `datasets` and what is below it raise at files that are damaged
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise DataError(
            f"{folder}: a saved Dataset that cannot be read ({type(error).__name__}: {reason}); save it again"
        ) from None
    return of_datasets(dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}, folder)


def split_tables(folder: Path) -> dict[str, Path]:
    """Tables in a folder that are named by split; the only table of a folder without class folders is train."""
    files = [path for path in visible(folder) if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES]
    tables: dict[str, Path] = {}
    for name, aliases in SPLIT_NAMES.items():
        found = [path for path in files if path.stem.lower() in aliases]
        if len(found) > 1:
            raise DataError(f"{folder}: both {found[0].name} and {found[1].name} are named {name}; keep one")
        if found:
            tables[name] = found[0]
    alone = len(files) == 1 and files[0].stem != "metadata" and len(class_folders(folder)) < 2
    return {"train": files[0]} if alone and not split_folders(folder).get("train") else tables


def split_folders(folder: Path) -> dict[str, Path]:
    """Sub-folders named by split, if they hold class folders or metadata; a class may be called "train" too."""
    folders: dict[str, Path] = {}
    for path in visible(folder):
        for name, aliases in SPLIT_NAMES.items():
            if path.is_dir() and path.name.lower() in aliases and name not in folders:
                folders[name] = path
    train = folders.get("train")
    return folders if train is not None and (metadata(train) or class_folders(train)) else {}


def visible(folder: Path) -> list[Path]:
    """Files and folders in a folder, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def class_folders(folder: Path) -> list[Path]:
    """Sub-folders that may be classes."""
    return [path for path in visible(folder) if path.is_dir() and path.name.lower() not in NOT_CLASSES]


def metadata(folder: Path) -> Path | None:
    """The table beside the images that `datasets` calls metadata."""
    found = [folder / f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet")]
    return next((path for path in found if path.is_file()), None)


def images_in(folder: Path) -> Iterator[Path]:
    """Files below a folder that are named like images, in a fixed order; a link that leads back is followed once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name.lower() not in NOT_CLASSES)
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield Path(place, name)


def read_images(folder: Path, root: Path) -> Part:
    """Read metadata or class folders; an id is the path relative to `root`.

    Raises:
        DataError: No images, or images without class folders.
    """
    table = metadata(folder)
    if table is not None:
        return read_table(table)
    classes = class_folders(folder)
    loose = [path for path in visible(folder) if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES]
    found = {path.name: list(images_in(path)) for path in classes}
    if not any(found.values()):
        if loose:
            raise DataError(
                f"{folder}: {len(loose)} images but no class folders; put the images of each class in a folder "
                "with its name, or add metadata.csv with columns file_name and label"
            )
        raise DataError(f"{folder}: no images here; give a folder with one sub-folder of images for each class")
    files = [(path, name) for name, paths in found.items() for path in paths if is_utf8(str(path))]
    unnamed = [path for paths in found.values() for path in paths if not is_utf8(str(path))]
    if not files:
        raise DataError(f"{folder}: no image whose name is UTF-8; rename the files and folders")
    ids = [path.relative_to(root).as_posix() for path, _ in files]
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    cells = [{"path": str(path), "bytes": None} for path, _ in files]
    data = datasets.Dataset.from_dict({"image": cells, "label": [name for _, name in files]}, features=features)
    outside = tuple((in_utf8(path.relative_to(root).as_posix()), "lies outside the class folders") for path in loose)
    outside += tuple((in_utf8(path.relative_to(root).as_posix()), "its name is not UTF-8") for path in unnamed)
    notes = tuple(f"{in_utf8(str(folder / name))} holds no images." for name, paths in found.items() if not paths)
    return Part(data, ids, str(folder), root, outside, notes, class_folders=True)


def is_utf8(name: str) -> bool:
    """Whether a name is text: Linux takes any bytes for one, but neither Arrow nor JSON nor a web page does."""
    return in_utf8(name) == name


def in_utf8(name: str) -> str:
    """A name with escapes for the bytes that are no UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
