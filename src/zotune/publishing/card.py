"""The model card of a run: :func:`model_card`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from zotune.io.version import VERSION
from zotune.publishing.files import PublishedFiles, command_of
from zotune.tasks.model_kind import kind_of_record
from zotune.training import run_folder

#: Schemes whose trained model is an adapter of PEFT.
_OF_PEFT = ("lora", "prefix", "prompt")
#: The hub's names of what models do, by kind.
_TASKS = {
    "causal": "text-generation",
    "masked": "fill-mask",
    "classifier": "text-classification",
    "seq2seq": "text2text-generation",
    "tokens": "token-classification",
    "embedding": "sentence-similarity",
    "image-text": "image-text-to-text",
    "image-classifier": "image-classification",
    "audio-classifier": "audio-classification",
}
#: Metrics of `summary.json` that describe an evaluation, not a model.
_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second")


def model_card(files: PublishedFiles, repo: str, *, license: str | None = None, dataset: str | None = None) -> str:
    """The text of `README.md`: metadata with the metrics before and after as `model-index`, then what, how, and how to replay.

    Args:
        repo: `user/name` of the repository.
        license: identifier of a license, such as apache-2.0; None: not stated.
        dataset: name of the data set on the hub; None: not stated.
    """
    summary = files.summary
    data = ModelCardData(
        base_model=files.base,
        datasets=dataset,
        license=license,
        library_name="peft" if summary["scheme"] in _OF_PEFT else "transformers",
        pipeline_tag=_task(files),
        tags=["zotune", "zeroth-order", "forward-only", summary["method"]],
        model_name=repo.rpartition("/")[2],
        eval_results=list(_results(files, summary, dataset)) or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(_sections(files, summary, repo)) + "\n"


def _task(files: PublishedFiles) -> str:
    return _TASKS[kind_of_record(files.record, run_folder.RUN_FILE).name]


def _results(files: PublishedFiles, summary: Mapping[str, Any], dataset: str | None) -> Iterator[EvalResult]:
    for when in ("after", "before"):
        for name, value in _metrics(summary.get(when)).items():
            yield EvalResult(
                task_type=_task(files),
                dataset_type=dataset or summary["data"],
                dataset_name=summary["data"],
                metric_type=name,
                metric_name=f"{name} {when} training",
                metric_value=round(value, 5),
            )


def _metrics(found: Mapping[str, Any] | None) -> dict[str, float]:
    numbers = {name: value for name, value in (found or {}).items() if isinstance(value, int | float) and name not in _NO_METRICS}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def _sections(files: PublishedFiles, summary: Mapping[str, Any], repo: str) -> Iterator[str]:
    base = files.base or f"{summary['model']} (a local model; see below)"
    yield f"# {repo.rpartition('/')[2]}"
    yield (
        f"{base}, fine-tuned on {summary['data']} with forward passes only (no backward pass) by "
        f"zotune {VERSION}, method `{summary['method']}`."
    )
    before, after = _metrics(summary.get("before")), _metrics(summary.get("after"))
    if after:
        count = (files.record.get("data_arguments") or {}).get("num_eval")
        lines = [f"| on {f'{count:,} ' if count else ''}evaluation examples | before | after |", "|---|---|---|"]
        lines += [f"| {name} | {_number(before.get(name))} | {_number(value)} |" for name, value in after.items()]
        yield "## Results\n\n" + "\n".join(lines)
    if (files.folder / run_folder.CURVE_FILE).is_file():
        yield f"![loss and metric against steps]({run_folder.CURVE_FILE})"
    yield "## Training\n\n" + "\n".join(_training(summary))
    command = command_of(files.record)
    if command:
        yield f"```bash\n{command}\n```"
    yield _replay(files, summary, repo)


def _training(summary: Mapping[str, Any]) -> Iterator[str]:
    given = {name: value for name, value in summary["method_options"].items() if value not in (None, {}, []) and name not in ("lr", "eps")}
    options = ", ".join(f"{name} {value}" for name, value in given.items())
    rate, first = summary["learning_rate"], summary["first_learning_rate"]
    rows = {
        "method": f"`{summary['method']}` ({options})",
        "scheme": f"{summary['scheme']}, {summary['trainable_parameters']:,} trained parameters",
        "learning rate": f"measured, {_number(first)} at first" if isinstance(rate, str) else rate,
        "perturbation ε": summary["eps"],
        "steps": f"{summary['steps']:,} of {summary['batch_size']} examples, seed {summary['seed']}",
        "forward passes": f"{summary['forward_passes']:,}, of {summary['sequences_evaluated']:,} sequences in all",
        "loss": " → ".join(_number(summary["loss"].get(name)) for name in ("first", "last")),
        "seconds in steps": _number(summary["training_seconds"]),
    }
    yield "| | |"
    yield "|---|---|"
    yield from (f"| {name} | {value} |" for name, value in rows.items() if value is not None)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"


def _replay(files: PublishedFiles, summary: Mapping[str, Any], repo: str) -> str:
    if not (files.folder / run_folder.JOURNAL_FILE).is_file():
        return "The run left no journal: it was not trained by a zeroth-order method."
    base = files.base or "BASE"
    size = (files.folder / run_folder.JOURNAL_FILE).stat().st_size
    text = (
        f"## Replay\n\n`{run_folder.JOURNAL_FILE}` ({size:,} bytes) holds what every step did. With the base model it gives these weights "
        f"again:\n\n```bash\npip install zotune\nhf download {repo} --local-dir run\nzotune replay {base} run --output_dir rebuilt\n```"
    )
    if files.base is None:
        text += f"\n\nBASE is {summary['model']!r}, which was a folder on the machine of the run; the journal knows it by its digest."
    return text
