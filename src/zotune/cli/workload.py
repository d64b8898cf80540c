"""The options of `zotune estimate` and `zotune memory` that say what is trained."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from zotune.cli.parser import CommandParser

DTYPES = ("float32", "bfloat16", "float16")


def add_options(parser: CommandParser) -> None:
    """The model, the scheme and the batch."""
    add = parser.add_argument
    add("--model_name_or_path", required=True, metavar="MODEL", help="hub id, folder, config.json, or a shipped shape such as opt-13b")
    add("--trust_remote_code", action="store_true", help="allow a model's own code")
    add("--method_args", default="{}", metavar="JSON", help="options of the methods, those that take them")
    add("--scheme", default="full", metavar="NAME", help="what is trained: full, lora, prefix, prompt, head, bias or scales (default full)")
    add("--lora_r", type=int, default=8, metavar="N", help="rank of the adapter (default 8)")
    add("--num_virtual_tokens", type=int, default=5, metavar="N", help="length of a prefix or soft prompt (default 5)")
    add("--batch_size", type=int, default=16, metavar="N", help="examples a step (default 16)")
    add("--sequence_length", type=int, default=256, metavar="N", help="tokens an example (default 256)")
    add("--scored_tokens", type=int, metavar="N", help="tokens of an example that the loss scores (default all)")
    add("--dtype", choices=DTYPES, metavar="NAME", help=f"of the weights: {', '.join(DTYPES)}")
    add(
        "--forward_batching",
        default="auto",
        choices=("auto", "batched", "sequential"),
        metavar="NAME",
        help="as in train: batched or sequential",
    )
    add("--activation_checkpointing", action="store_true", help="first-order methods run forwards again and keep no activations")


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
    idle = sorted(given.keys() - taken)
    if idle:
        raise ValueError(f"none of the methods takes the option {idle[0]!r}: there are {', '.join(sorted(taken))}.")
    return [catalog.get(name, **{k: v for k, v in given.items() if k in catalog.options_of(name)}) for name in names]


def workload(args: argparse.Namespace, method: Any, dtype: str) -> Any:
    """The :class:`zotune.memory.Workload` of the options.

    Raises:
        ValueError: a number makes no sense; the sequence is longer than the model's context.
    """
    import torch

    from zotune.memory.shapes import config_of, context_of
    from zotune.memory.workload import Workload
    from zotune.tasks.preparation import is_encoder
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
    options = {"lora_r": args.lora_r} if args.scheme == "lora" else {}
    if args.scheme in ("prefix", "prompt"):
        options["num_virtual_tokens"] = args.num_virtual_tokens
    scheme = Scheme(args.scheme, **options)
    for name in ("lora_r", "num_virtual_tokens"):
        if name not in options and getattr(args, name) != next(f.default for f in dataclasses.fields(Scheme) if f.name == name):
            raise ValueError(f"--{name} is an option of another scheme than {args.scheme}.")
    return Workload(
        config=config,
        method=method,
        scheme=scheme,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        dtype=getattr(torch, dtype),
        scored=args.scored_tokens,
        forward_batching=args.forward_batching,
        activation_checkpointing=args.activation_checkpointing,
    )
