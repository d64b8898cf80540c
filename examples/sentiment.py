"""Sentiment steering: continuations of film reviews become friendly, as the model as it was at the start judges them.

    python examples/sentiment.py --model Qwen/Qwen2.5-0.5B --output_dir DIR [--train_file prompts.jsonl] [--max_steps 100]

The reward of a continuation is the probability of " great" over " terrible" behind "<text> It was". A reward can be won by wrong means:
texts that only say "great great great" score high too. Look at the completions that each evaluation prints, and at the drift.
"""

import argparse
import copy
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zotune

SUBJECTS = ("The film", "This movie", "The story", "The acting", "The director")
VERBS = ("is", "was", "has", "and the rest of it", "seems to be", "about a man who", "in the end", "makes me feel", "that I saw", "will")
BEGINNINGS = [f"{subject} {verb}" for subject in SUBJECTS for verb in VERBS]


class Judge:
    """Rewards texts by the label words of a model that is not trained."""

    def __init__(self, model: torch.nn.Module, tokenizer, words: tuple[str, str] = (" great", " terrible")) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.words = [tokenizer.encode(word, add_special_tokens=False)[0] for word in words]
        self.__name__ = "sentiment"

    @torch.no_grad()
    def __call__(self, prompts: list[str], completions: list[str], **columns) -> list[float]:
        texts = [f"{prompt}{completion.rstrip()} It was" for prompt, completion in zip(prompts, completions, strict=True)]
        rewards = []
        for start in range(0, len(texts), 64):
            batch = self.tokenizer(texts[start : start + 64], return_tensors="pt", padding=True, padding_side="right")
            ids, mask = batch["input_ids"].to(self.model.device), batch["attention_mask"].to(self.model.device)
            logits = self.model(input_ids=ids, attention_mask=mask).logits
            last = logits[torch.arange(len(ids)), mask.sum(dim=1) - 1][:, self.words]
            rewards += last.float().softmax(dim=1)[:, 0].tolist()
        return rewards


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B")
    parser.add_argument("--output_dir", default="sentiment")
    parser.add_argument("--train_file", help="JSON Lines with a prompt in each; beginnings of reviews by default")
    parser.add_argument("--max_steps", type=int, default=100)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model)
    judge = Judge(copy.deepcopy(model).eval(), tokenizer)
    rows = [{"prompt": text} for text in BEGINNINGS]
    if options.train_file:
        with open(options.train_file) as file:
            rows = [json.loads(line) for line in file]
    args = zotune.ZOConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=8,
        method="lozo-e",
        estimator="central",
        num_directions=1,
        interval=1,
        max_completion_length=16,
        eval_strategy="steps",
        eval_steps=max(1, options.max_steps // 4),
        report_to="none",
    )
    trainer = zotune.ZOTrainer(model, args, reward_funcs=judge, train_dataset=rows, eval_dataset=rows[:16], processing_class=tokenizer)
    trainer.train()
    model.save_pretrained(f"{options.output_dir}/model")


if __name__ == "__main__":
    main()
