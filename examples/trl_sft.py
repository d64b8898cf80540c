"""A script for TRL's SFTTrainer, of which two lines are changed: the trainer's import, and (optional) the method.

    python examples/trl_sft.py --model Qwen/Qwen2.5-0.5B-Instruct --train_file chats.jsonl --output_dir runs/sft

`--train_file`: JSON Lines in one of TRL's formats: text; prompt and completion; messages. Needs `pip install trl peft`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig

from zotune.training.sft import SFTTrainer  # was: from trl import SFTTrainer


def main(argv: Sequence[str] | None = None) -> SFTTrainer:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--output_dir", default="runs/sft")
    parser.add_argument("--max_steps", type=int, default=500)
    options = parser.parse_args(argv)
    on_cpu = not torch.accelerator.is_available()
    trainer = SFTTrainer(
        model=options.model,
        args=SFTConfig(output_dir=options.output_dir, max_steps=options.max_steps, max_length=512, use_cpu=on_cpu, report_to="none"),
        train_dataset=load_dataset("json", data_files=options.train_file, split="train"),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
        method="lozo",  # new; zotune's default without it
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
