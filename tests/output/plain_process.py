"""Loads models with timm and transformers alone. Run as a program: `python -I plain_process.py JOBS RESULTS`.

JOBS is JSON: a list of {"folder", "how": "timm" | an Auto class | "pipeline:TASK" | "program", "input"}. The folder may
also be the name of a repository on the Hub. The input is a file of pixel values for the first two, a path or text for
pipelines, token ids for text models, and for a program the program itself. RESULTS gets what came out.
"""

import contextlib
import io
import json
import os
import sys

sys.modules["finetune"] = None  # type: ignore[assignment]  # any import of it fails from here on

import timm  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


def run(job: dict) -> object:
    folder, how = job["folder"], job["how"]
    if how == "program":
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(job["input"], {})
        return printed.getvalue()
    if how.startswith("pipeline:"):
        pipe = transformers.pipeline(how.removeprefix("pipeline:"), model=folder, device="cpu")
        return pipe(job["input"], **job.get("options", {}))
    inputs = load_file(job["input"])
    with torch.no_grad():
        if how == "timm":
            place = "local-dir" if os.path.isdir(folder) else "hf-hub"
            model = timm.create_model(f"{place}:{folder}", pretrained=True).eval()
            return {"logits": model(inputs["pixel_values"]).tolist(), "labels": model.pretrained_cfg.get("label_names")}
        model = getattr(transformers, how).from_pretrained(folder).eval()
        output = model(**inputs)
        if how == "AutoModel":
            return {"features": output.last_hidden_state.flatten(1).tolist()}
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        return {"logits": output.logits.tolist(), "labels": labels, "problem_type": model.config.problem_type}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    results = [run(job) for job in jobs]
    with open(sys.argv[2], "w") as file:
        json.dump(results, file, default=str)
