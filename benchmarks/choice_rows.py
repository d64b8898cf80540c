"""What it costs to score answer options, by the form of the batch.

    python benchmarks/choice_rows.py --shapes tiny-llama opt-125m --dtypes float32

Batches like those of real tasks (random tokens, lengths ±30%), random weights, one thread, time on the processor, medians over repeats in
which the forms alternate. Forms: one row per option, each with the whole prompt; the options in one row behind their prompt, which is what
``ChoicesCollator`` makes; and, for comparison, the prompts first and then the options against their cached keys and values, which
takes two forwards and a copy of the cache an option. Tokens are those fed, padding included; MB the peak of tensor bytes over the weights.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from step_time import CLOCKS, SHAPES, build, peak_bytes, timed
from torch import Tensor, nn

from zotune.objectives.losses import choice_scores
from zotune.objectives.token_logprobs import IGNORE, scored_logits
from zotune.tasks import ChoicesCollator

#: name: examples, tokens of the prompt, options, tokens of an option
BATCHES = {
    "SST-2": (16, 30, 2, 1),
    "COPA": (16, 20, 2, 8),
    "TREC": (16, 25, 6, 2),
    "MultiRC": (8, 200, 5, 8),
    "ReCoRD": (4, 250, 12, 4),
}


def make_examples(examples: int, prompt: int, options: int, answer: int, vocabulary: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        about = round(length * (0.7 + 0.6 * float(torch.rand((), generator=generator))))
        return torch.randint(5, vocabulary, (max(1, about),), generator=generator).tolist()

    return [{"prompt_ids": ids(prompt), "option_ids": [ids(answer) for _ in range(options)], "answer": 0} for _ in range(examples)]


def padded(rows: list[list[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)


def cached_batch(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    prompts, options = [e["prompt_ids"] for e in examples], [option for e in examples for option in e["option_ids"]]
    return {
        "prompts": padded(prompts, 1),
        "prompt_mask": padded([[1] * len(ids) for ids in prompts], 0),
        "lengths": torch.tensor([len(ids) for ids in prompts]),
        "fed": padded([option[:-1] for option in options], 1),
        "fed_mask": padded([[1] * (len(option) - 1) for option in options], 0),
        "targets": padded(options, IGNORE),
    }


def cached_scores(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same scores by way of a cache; right-padded prompts leave a gap in it, which mask and positions step over."""
    examples, count, lengths = len(batch["prompts"]), len(batch["targets"]) // len(batch["prompts"]), batch["lengths"]
    kept: list[Any] = []

    def keep(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        kept.append(output.past_key_values)

    def with_cache(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "use_cache": True}

    handles = [model.register_forward_pre_hook(with_cache, with_kwargs=True), model.register_forward_hook(keep, with_kwargs=True)]
    first = scored_logits(model, {"input_ids": batch["prompts"], "attention_mask": batch["prompt_mask"]}, lengths.unsqueeze(1) - 1)
    for handle in handles:
        handle.remove()
    table = first[:, 0].float().log_softmax(dim=1)
    scores = table.gather(1, batch["targets"][:, 0].view(examples, count))
    fed = batch["fed"].shape[1]
    if fed:
        kept[0].batch_repeat_interleave(count)
        mask = torch.cat([batch["prompt_mask"].repeat_interleave(count, 0), batch["fed_mask"]], dim=1)
        positions = lengths.repeat_interleave(count).unsqueeze(1) + torch.arange(fed)
        output = model(input_ids=batch["fed"], attention_mask=mask, position_ids=positions, past_key_values=kept[0], use_cache=True)
        targets = batch["targets"][:, 1:]
        rest = output.logits.float().log_softmax(dim=2).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
        scores = scores + rest.masked_fill(targets == IGNORE, 0).sum(dim=1).view(examples, count)
    return scores


@torch.no_grad()
def measure(model: nn.Module, name: str, repeats: int) -> list[str]:
    device = torch.device("cpu")
    examples = make_examples(*BATCHES[name], model.config.vocab_size)
    plain = ChoicesCollator(1, single_token_form=False, shared_prompt=False)(examples)
    chosen, cached = ChoicesCollator(1)(examples), cached_batch(examples)
    forms: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "one row per option": (plain["input_ids"].numel(), lambda: choice_scores(model, plain)),
        "one row per example": (chosen["input_ids"].numel(), lambda: choice_scores(model, chosen)),
        "cached prompts": (cached["prompts"].numel() + cached["fed"].numel(), lambda: cached_scores(model, cached)),
    }
    results = {form: work() for form, (_, work) in forms.items()}  # also the comparison of the first batch
    times: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(repeats):
        for form, (_, work) in forms.items():
            times[form].append(timed(work, device, CLOCKS["cpu"]))
    lines = []
    for form, (tokens, work) in forms.items():
        off = (results[form] - results["one row per option"]).abs().max()
        faster = statistics.median(a / b for a, b in zip(times["one row per option"], times[form], strict=True))
        peak = peak_bytes(work, device) / 1e6
        lines.append(f"{name} | {form} | {tokens} | {statistics.median(times[form]):.0f} | {faster:.2f} | {peak:.0f} | {off:.1e} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny-llama"])
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| shape | dtype | batch | form | tokens | ms | × faster | MB | largest difference |\n|---|---|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        for dtype in args.dtypes:
            model = build(shape, getattr(torch, dtype), torch.device("cpu"))
            for name in args.batches:
                for line in measure(model, name, args.repeats):
                    print(f"| {shape} | {dtype} | {line}", flush=True)


if __name__ == "__main__":
    main()
