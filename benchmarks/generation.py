"""Tokens a second of a population that generates in one batch, over plain `generate` at as many rows and over one member after the other.

    python benchmarks/generation.py --model MODEL --data_file PROMPTS.jsonl

The three are timed in turn, `--repeats` times; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from zotune import ZerothOrder
from zotune.forward.batches import shared_layout
from zotune.forward.generation import Sampling, generate
from zotune.methods.estimators import Point
from zotune.subspaces.coordinate import Offset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_file", type=Path, required=True, help="JSON Lines with a text or sentence")
    parser.add_argument("--methods", nargs="+", default=["lozo"])
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--words", type=int, default=6, help="of a prompt")
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    texts = [
        text for row in map(json.loads, args.data_file.read_text().splitlines()) if len(text := row.get("text") or row["sentence"]) > 60
    ]
    prompts = [" ".join(text.split()[: args.words]) for text in texts[: args.prompts]]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    plain = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    settings = GenerationConfig(do_sample=False, max_new_tokens=args.new_tokens, pad_token_id=tokenizer.pad_token_id)
    settings.eos_token_id = plain.generation_config.eos_token_id = None  # all rows generate equally many tokens
    rows, rows_mask = ids.repeat(args.members, 1), mask.repeat(args.members, 1)
    sampling = Sampling(args.new_tokens)
    points = [Point(1 if k % 2 == 0 else -1, k // 2) for k in range(args.members)]

    def transformers_generate() -> None:
        with torch.inference_mode():
            made = plain.generate(input_ids=rows, attention_mask=rows_mask, generation_config=settings)
        assert made.shape[1] == ids.shape[1] + args.new_tokens

    for method in args.methods:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        optimizer = ZerothOrder(model, method, lr=1e-3)
        optimizer.updater.begin(0)
        layout = shared_layout(points, 1e-3, len(ids), 0, 0)

        def population(optimizer: ZerothOrder = optimizer, layout=layout) -> None:
            source = layout.source
            optimizer.forward.evaluate_batched(lambda: generate(optimizer.model, ids[source], mask[source], None, sampling), layout)

        def one_by_one(optimizer: ZerothOrder = optimizer) -> None:
            for point in points:
                offset = Offset(point.sign * 1e-3, 0, 0, point.direction)
                optimizer.forward.evaluate(lambda: generate(optimizer.model, ids, mask, None, sampling), offset)

        work: dict[str, Callable[[], None]] = {"generate": transformers_generate, "population": population, "one by one": one_by_one}
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for repeat in range(args.repeats + 1):
            for name, run in work.items():
                start = time.process_time() if args.threads == 1 else time.perf_counter()
                run()
                if repeat:  # the first is to warm up
                    seconds[name].append((time.process_time() if args.threads == 1 else time.perf_counter()) - start)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        tokens = args.members * args.prompts * args.new_tokens
        rates = ", ".join(f"{name} {tokens / value:.0f}" for name, value in median.items())
        print(f"{method}: tokens a second: {rates}")
        print(f"{method}: population / generate {median['generate'] / median['population']:.2f}, "
              f"population / one by one {median['one by one'] / median['population']:.2f}", flush=True)  # fmt: skip
        optimizer.remove_hooks()


if __name__ == "__main__":
    main()
