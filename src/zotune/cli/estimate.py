"""`zotune estimate`: the peak memory of training, predicted without reading a weight; with --measure that of real steps beside it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from typing import Any

from zotune.cli.parser import CommandParser
from zotune.cli.table import wide_table
from zotune.io.json_files import write_json
from zotune.io.sizes import parse_size, size_text

#: The methods of the table when none is named.
METHODS = ("zero-shot", "mezo", "lozo", "mezo-adam", "fo-sgd", "fo-adamw")
#: The kinds of memory and their colors in charts.
COLORS = {
    "weights": "#4477aa",
    "gradients": "#ee6677",
    "optimizer state": "#ccbb44",
    "activations": "#66ccee",
    "directions": "#aa3377",
    "logits": "#228833",
    "temporary": "#bbbbbb",
}
DTYPES = ("float32", "bfloat16", "float16")
_SCHEME_OPTIONS = {"lora_r": ("lora",), "num_virtual_tokens": ("prefix", "prompt")}


def main(argv: Sequence[str]) -> int:
    """Runs `zotune estimate`."""
    args = _parser().parse(argv)
    from zotune.memory.estimate import estimate
    from zotune.memory.formulas import closed_form
    from zotune.memory.shapes import context_of
    from zotune.memory.workload import elements_of

    limit = parse_size(args.memory) if args.memory else None
    device = _device(args)
    dtype = args.dtype or ("float32" if args.measure else "bfloat16")
    accelerator = device == "cuda"
    began = time.perf_counter()
    plans = [workload(args, method, dtype) for method in methods_of(args.method, args.method_args)]
    _refuse_idle(args, [plan.method for plan in plans])
    parameters, largest_parameter = elements_of(plans[0])
    splits: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for plan in plans:
        name = plan.method.name
        split = splits[name] = estimate(plan, accelerator=accelerator, exact=args.exact or args.measure)
        row = {"method": name, "total": split.total, **split.kinds, "formula": None}
        if args.scheme == "full":
            saved = split.kinds["activations"] if name.startswith("fo-") else 0
            row["formula"] = closed_form(name, parameters, largest_parameter, saved, half=dtype != "float32")
        if limit is not None:
            row |= _fits(plan, limit, accelerator, context_of(plan.config) or 1 << 20)
        if args.measure:
            measured, row["process" if device == "cpu" else "CUDA allocator"] = _measured(plan, device)
            splits[f"{name}, measured"] = measured
            row["measured"] = {"total": measured.total, **measured.kinds}
        rows.append(row)
    print(
        f"{args.model_name_or_path}: {parameters / 1e6:,.0f} million parameters, {dtype}, {args.scheme}, batch {args.batch_size}, "
        f"{args.sequence_length} tokens, allocated as on a {'GPU' if accelerator else 'CPU'}"
    )
    print(wide_table(*_table(rows, list(splits[rows[0]["method"]].kinds), limit)))
    for line in _notes(rows, limit, accelerator):
        print(line)
    print(f"({time.perf_counter() - began:.0f} s; {'the weights were random' if args.measure else 'no weight was read'})")
    if args.chart:
        from zotune.io.figures import save_figure, stacked_bars

        title = f"{args.model_name_or_path}, {dtype}, batch {args.batch_size} × {args.sequence_length} tokens"
        bars = {name: [split.kinds[kind] / 1e9 for kind in COLORS] for name, split in splits.items()}
        save_figure(stacked_bars(bars, COLORS, "peak memory, GB", title, limit and limit / 1e9), args.chart)
        print(f"chart: {args.chart}")
    if args.json:
        write_json(args.json, rows)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        "zotune estimate",
        "Predicts the peak memory of training, and what it is for, without reading a weight; --measure puts that of real steps beside it.",
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, metavar="MODEL", help="hub id, folder, config.json, or a shipped shape such as opt-13b")
    add("--trust_remote_code", action="store_true", help="allow a model's own code")
    add("--method", nargs="+", default=list(METHODS), metavar="NAME", help=f"methods to compare (default {' '.join(METHODS)})")
    add("--method_args", default="{}", metavar="JSON", help="options of the methods, those that take them")
    add("--scheme", default="full", metavar="NAME", help="what is trained: full, lora, prefix, prompt, head, bias or scales (default full)")
    add("--lora_r", type=int, default=8, metavar="N", help="rank of the adapter (default 8)")
    add("--num_virtual_tokens", type=int, default=5, metavar="N", help="length of a prefix or soft prompt (default 5)")
    add("--batch_size", type=int, default=16, metavar="N", help="examples per step (default 16)")
    add("--sequence_length", type=int, default=256, metavar="N", help="tokens per example (default 256)")
    add("--scored_tokens", type=int, metavar="N", help="tokens of an example that the loss scores (default all)")
    add("--objective", choices=("mlm",), metavar="NAME", help="mlm: an encoder's masked language model on label words, not its classifier")
    add("--dtype", choices=DTYPES, metavar="NAME", help=f"of the weights: {', '.join(DTYPES)} (default bfloat16, with --measure float32)")
    batching = ("auto", "batched", "sequential")
    add("--forward_batching", default="auto", choices=batching, metavar="NAME", help=f"as in train: {', '.join(batching)} (default auto)")
    add("--anchor_decay", type=float, default=0.0, metavar="X", help="as in train: above 0 the weights that training begins with are kept")
    add("--activation_checkpointing", action="store_true", help="first-order methods run forwards again and keep no activations")
    add("--device", choices=("cpu", "cuda"), metavar="NAME", help="allocate as on a cpu or on a GPU (cuda, the default without --measure)")
    add("--measure", action="store_true", help="also run real steps on this machine, with random weights of the model's shapes")
    add("--memory", metavar="SIZE", help="a card's, such as 24GB: also find the largest batch and sequence that fit it")
    add("--exact", action="store_true", help="compute every layer; otherwise two shallow models are extrapolated (implied by --measure)")
    add("--chart", metavar="FILE", help="draw the table as a bar chart (PNG)")
    add("--json", metavar="FILE", help="write the table as JSON")
    return parser


def methods_of(names: Sequence[str], options: str) -> list[Any]:
    """The methods of these names, each with those of the options (JSON) that it takes.

    Raises:
        ValueError: an unknown name; an option that none takes; no JSON.
    """
    from zotune.baselines import catalog

    try:
        given = json.loads(options)
    except json.JSONDecodeError as error:
        raise ValueError(f"--method_args must be JSON such as '{{\"rank\": 4}}', not {options!r} ({error}).") from None
    if not isinstance(given, dict):
        raise ValueError(f"--method_args must be a JSON object such as '{{\"rank\": 4}}', not {options!r}.")
    taken = {option for name in names for option in catalog.options_of(name)}
    unused = sorted(given.keys() - taken)
    if unused:
        raise ValueError(f"none of the methods takes the option {unused[0]!r}: there are {', '.join(sorted(taken))}.")
    return [catalog.get(name, **{k: v for k, v in given.items() if k in catalog.options_of(name)}) for name in names]


def workload(args: argparse.Namespace, method: Any, dtype: str) -> Any:
    """The :class:`zotune.memory.Workload` of the options.

    Raises:
        ValueError: a number makes no sense; the sequence is longer than the model's context.
    """
    import torch

    from zotune.memory.shapes import config_of, context_of
    from zotune.memory.workload import Workload
    from zotune.tasks.objective_choice import is_encoder
    from zotune.training.schemes import Scheme

    for name in ("batch_size", "sequence_length", "scored_tokens"):
        value, least = getattr(args, name), 2 if name == "sequence_length" else 1
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, not {value}.")
    config = config_of(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    context = context_of(config) - (2 if getattr(config, "model_type", "") in ("roberta", "xlm-roberta") else 0)
    if 0 < context < args.sequence_length:
        raise ValueError(f"--sequence_length {args.sequence_length}: {args.model_name_or_path} takes at most {context} tokens.")
    if args.scored_tokens is not None and (args.scored_tokens >= args.sequence_length or is_encoder(config)):
        raise ValueError("--scored_tokens must be less than --sequence_length, and is for causal language models only.")
    if args.objective == "mlm" and not is_encoder(config):
        raise ValueError(f"--objective mlm needs an encoder, and {args.model_name_or_path} is none: leave it out.")
    options = {}
    defaults = {field.name: field.default for field in dataclasses.fields(Scheme)}
    for name, schemes in _SCHEME_OPTIONS.items():
        if args.scheme in schemes:
            options[name] = getattr(args, name)
        elif getattr(args, name) != defaults[name]:
            raise ValueError(f"--{name} is an option of another scheme than {args.scheme}.")
    return Workload(
        config=config,
        method=method,
        scheme=Scheme(args.scheme, **options),
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        dtype=getattr(torch, dtype),
        scored=args.scored_tokens,
        forward_batching=args.forward_batching,
        anchor_decay=args.anchor_decay,
        activation_checkpointing=args.activation_checkpointing,
        masked=args.objective == "mlm",
    )


def _refuse_idle(args: argparse.Namespace, methods: Sequence[Any]) -> None:
    """ValueError for an option that has no effect on any of the methods."""
    from zotune.methods import Method

    zeroth = any(isinstance(method, Method) for method in methods)
    backward = any(getattr(method, "kind", None) == "backward" for method in methods)
    if args.activation_checkpointing and not backward:
        raise ValueError("--activation_checkpointing is an option of first-order methods, and none is named: leave it out.")
    if args.forward_batching != "auto" and not zeroth:
        raise ValueError("--forward_batching is an option of zeroth-order methods, and none is named: leave it out.")
    if args.anchor_decay and not zeroth:
        raise ValueError("--anchor_decay is an option of zeroth-order methods, and none is named: leave it out.")
    if args.exact and args.measure:
        raise ValueError("--measure computes every layer anyway: leave --exact out.")


def _device(args: argparse.Namespace) -> str:
    """What is allocated on: the device that was asked for; to measure, this machine's."""
    if not args.measure:
        return args.device or "cuda"
    import torch

    here = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" != here:
        raise ValueError("--measure --device cuda needs a CUDA device, and there is none: leave --device out.")
    return args.device or here


def _measured(plan: Any, device: str) -> tuple[Any, int]:
    """Memory by kind of real steps, and the bytes at the peak by the CUDA allocator or the process's resident set."""
    import torch

    from zotune.memory.estimate import measure
    from zotune.memory.process import process_peak
    from zotune.training.peak_memory import PeakMemory

    split = measure(plan, device)
    if device == "cpu":
        return split, process_peak(plan)
    torch.cuda.empty_cache()
    memory = PeakMemory(torch.device(device))
    measure(plan, device, ledger=False)
    return split, memory.peak() - memory.baseline


def _fits(plan: Any, limit: int, accelerator: bool, context: int) -> dict[str, int]:
    """The largest batch and the largest sequence that fit ``limit`` bytes."""
    from zotune.memory.estimate import estimate
    from zotune.memory.search import largest

    def needs(**changes: Any) -> int:
        return estimate(plan.with_(**changes), accelerator=accelerator).total

    step = 1 if context <= 64 else 16
    batch = largest(lambda n: needs(batch_size=n), limit, 1 << 14)
    blocks = largest(lambda n: needs(sequence_length=max(2, n * step)), limit, math.floor(context / step))
    return {"batch": batch, "sequence": blocks * step}


def _table(rows: Sequence[dict[str, Any]], kinds: Sequence[str], limit: int | None) -> tuple[list[str], list[list[str]]]:
    """Header and lines; what was measured stands below what was predicted."""
    extra = ["batch", "sequence"] if limit is not None else []
    lines = []
    for row in rows:
        formula = size_text(row["formula"]) if row["formula"] else "–"
        lines.append([row["method"], *(size_text(row[name]) for name in ("total", *kinds)), formula, *(str(row[name]) for name in extra)])
        if "measured" in row:
            lines.append(["  measured", *(size_text(row["measured"][name]) for name in ("total", *kinds)), *([""] * (1 + len(extra)))])
    return ["method", "peak", *kinds, "ZO-Bench formula", *extra], lines


def _notes(rows: Sequence[dict[str, Any]], limit: int | None, accelerator: bool) -> list[str]:
    from zotune.memory.formulas import FORMULAS

    notes = []
    if limit is not None:
        notes.append(f"batch, sequence: the largest that fit {size_text(limit)}, the other as above (0: not even 1).")
    used = [f"{row['method']} {FORMULAS[row['method']]}" for row in rows if row["formula"]]
    if used:
        notes.append(f"ZO-Bench (2402.11592): {'; '.join(used)}.")
    for row in rows:
        for key, what in (("process", "the process grew by"), ("CUDA allocator", "the CUDA allocator's peak is")):
            if key in row:
                notes.append(f"{row['method']}: {what} {size_text(row[key])}; predicted / measured = {row['total'] / row[key]:.3f}")
    notes.append(f"Tensors alone: add the library's own (about 0.5 GB for {'CUDA' if accelerator else 'Python and torch'}).")
    return notes
