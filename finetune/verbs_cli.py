"""The words after `finetune` on the command line go in; a model is pushed, used, scored, or written as ONNX. `--help`
costs no torch."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, subcommand

from finetune import verbs_runs, verbs_train
from finetune.commandline import cli
from finetune.errors import RunError


def push(
    folder: Positional[Path],
    name: Positional[str],
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Add model",
    create_pr: bool = False,
    examples: tuple[str, ...] = (),
    dry_run: bool = False,
    adapter: bool = False,
) -> None:
    """Upload a trained model to the Hugging Face Hub, with its card.

    Args:
        folder: Run folder, or the model folder in it.
        name: Repository, owner/name; made if it does not exist.
        private: Make a new repository private.
        revision: Branch to commit to; by default main.
        message: Title of the commit.
        create_pr: Propose the commit as a pull request.
        examples: Texts or images that everybody may see, to be shown on the card with the model's answers.
        dry_run: Only list what would be sent.
        adapter: Upload the adapter of a run with `lora`, in place of the merged model.
    """
    from finetune.output.hub import push_to_hub

    print(
        push_to_hub(
            folder, name, private=private, revision=revision, commit_message=message, create_pr=create_pr,
            examples=examples, dry_run=dry_run, adapter=adapter,
        )
    )  # fmt: skip


def predict(
    model: Positional[str],
    inputs: Positional[tuple[str, ...]],
    *,
    out: Path | None = None,
    column: str | None = None,
    batch_size: int = 32,
) -> None:
    """Predict for files, folders, tables or texts; write a row for each input, with a reason where it cannot be read.

    Args:
        model: Run folder, model folder, or the name of a model on the Hub.
        inputs: Images, folders of images, texts, .txt files, or tables (.csv, .tsv, .jsonl, .json, .parquet).
        out: CSV file to write, or .jsonl with all probabilities; by default CSV to the console.
        column: Column of the tables that holds the images or texts; by default found.
        batch_size: Inputs at once.
    """
    if not inputs:
        raise RunError("inputs: none; give files, a folder, a table or texts")
    refuse_input(out, inputs)
    from finetune.output.predict import load
    from finetune.output.verbs import predict_all, write_rows

    predictor = load(model)
    found = predict_all(predictor, inputs, column=column, batch_size=batch_size)
    write_rows(found, predictor.task, out)
    failed = [one for one in found if one.error is not None]
    said = f"{len(found)} inputs" + (f", {len(failed)} without a prediction ({failed[0].error})" if failed else "")
    print(said + (f" -> {out}" if out is not None else ""), file=sys.stderr)


def evaluate(
    model: Positional[str],
    data: Positional[str],
    *,
    label: tuple[str, ...] = (),
    text: str | None = None,
    text_pair: str | None = None,
    image: str | None = None,
    out: Path | None = None,
    batch_size: int = 32,
    flip: bool = False,
) -> None:
    """Score a model on labelled rows: the test part of the data, or its only one.

    Args:
        model: Run folder, model folder, or the name of a model on the Hub.
        data: Folder with one sub-folder a class, a table, a folder of tables, or the name of a Hub data set.
        label: Column of the label, or several; by default found.
        text: Column of the text; by default found.
        text_pair: Column of the second text of a pair.
        image: Column of the image path; by default found.
        out: JSON file to write the scores to, with the rows that were left out.
        batch_size: Rows at once.
        flip: Also score each picture together with its mirror image (test-time augmentation).
    """
    from finetune.output.predict import load
    from finetune.output.verbs import evaluate_on, trained_columns

    refuse_input(out, [data])
    given = {"text": text, "text_pair": text_pair, "image": image}
    columns = {role: column for role, column in given.items() if column is not None}
    found = evaluate_on(
        load(model),
        data,
        label=list(label) or None,
        columns=columns,
        usual=trained_columns(model),
        batch_size=batch_size,
        flip=flip,
    )
    print("\n".join(found.lines()))
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found.to_json(), indent=2, default=float) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RunError(f"{out}: cannot be written ({error}); give another file with --out") from None


def onnx(model: Positional[str], *, out: Path | None = None, overwrite: bool = False) -> None:
    """Write a model as ONNX, if onnxruntime then gives the same outputs as PyTorch.

    Args:
        model: Run folder, model folder, or the name of a model on the Hub.
        out: File to write; by default model.onnx in the folder.
        overwrite: Replace a file that is there.
    """
    if out is None and not Path(model).is_dir():
        raise RunError(f"{model}: no such folder; check the path, or name the file to write with --out")
    from finetune.output.onnx_export import export_onnx, refuse_early
    from finetune.output.predict import load

    path = out if out is not None else Path(model) / "model.onnx"
    refuse_early(path, overwrite)
    print(export_onnx(load(model, device="cpu"), path, run_folder=Path(model), overwrite=overwrite))


def refuse_input(out: Path | None, given: Sequence[str]) -> None:
    """Refuse to write over what is read. A text may be too long for a path, of which the methods of Path complain."""
    if out is not None and any(os.path.exists(one) and os.path.exists(out) and out.samefile(one) for one in given):
        raise RunError(f"{out}: is one of the inputs; give another file with --out")


Verbs = (
    Annotated[Any, subcommand(name="fit", constructor=verbs_train.fit)]
    | Annotated[Any, subcommand(name="plan", constructor=verbs_train.plan)]
    | Annotated[Any, subcommand(name="inspect", constructor=verbs_train.inspect)]
    | Annotated[Any, subcommand(name="range-test", constructor=verbs_train.range_test)]
    | Annotated[Any, subcommand(name="report", constructor=verbs_runs.report)]
    | Annotated[Any, subcommand(name="compare", constructor=verbs_runs.compare)]
    | Annotated[Any, subcommand(name="doctor", constructor=verbs_runs.doctor)]
    | Annotated[Any, subcommand(name="push", constructor=push)]
    | Annotated[Any, subcommand(name="predict", constructor=predict)]
    | Annotated[Any, subcommand(name="evaluate", constructor=evaluate)]
    | Annotated[Any, subcommand(name="onnx", constructor=onnx)]
)


def main() -> None:
    """Run the verb that the command line names."""
    cli(Verbs)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
