"""Rows of an image with a text, for models of images and text: the metadata file of an image folder.

``{"file_name": "cat.png", "text": "a cat"}``, or with ``prompt`` and ``completion`` in place of ``text``. File names are relative to the
metadata file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.objectives.image_text import TEXT
from zotune.tasks.collators import Collator, LanguageModelCollator, padded
from zotune.tasks.family import Family, FamilyInputs
from zotune.tasks.media_files import file_beside, read_image
from zotune.tasks.model_kind import ModelKind
from zotune.tasks.rows import Rows
from zotune.tasks.seq2seq import ComputeTextMetrics, referred


@dataclass(frozen=True)
class ImageTextCollator(Collator):
    """Batches for ``ImageTextLoss``; those that are evaluated add prompt_ids and prompt_mask (B, P), padded on the left, for generation.

    Attributes:
        processor: of the model, which makes tensors of images.
    """

    processor: Any = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = LanguageModelCollator(self.pad_token_id, self.pad_to_multiple_of)(examples)
        length = batch["input_ids"].shape[1]
        parts = [processed(self.processor, example["image"], example["text"]) for example in examples]
        for name in parts[0]:
            values = [part[name] for part in parts]
            if name in TEXT:
                if name not in batch:  # kinds of tokens: a completion is text
                    batch[name] = padded([value[0].tolist() for value in values], length, 0)
                continue
            if len({value.shape for value in values}) > 1:
                raise ValueError(
                    f"the images of a batch give {name} of different shapes: resize them to one size, or set --per_device_train_batch_size "
                    "and --per_device_eval_batch_size to 1."
                )
            batch[name] = torch.stack(values)
        if "reference" in examples[0]:
            prompts = [example["prompt_ids"] for example in examples]
            longest = max(map(len, prompts))
            batch["prompt_ids"] = torch.tensor([[self.pad_token_id] * (longest - len(ids)) + list(ids) for ids in prompts])
            batch["prompt_mask"] = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
            for name in ("reference", "max_new_tokens"):
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


def processed(processor: Any, path: str, text: str) -> dict[str, Tensor]:
    """What a processor makes of an image and the text of a prompt with its place, each tensor with one row for the text."""
    image = read_image(path)
    found = processor(images=[image], text=[text], return_tensors="pt")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def prepare(inputs: FamilyInputs) -> Family:
    """The family of images with texts; ValueError where the model's folder has no processor."""
    encoder, processor = inputs.encoder, _processor(inputs.config)
    tokenizer, references = encoder.tokenizer, list[tuple[str, ...]]()
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(rows: Rows, evaluated: bool) -> list[dict[str, Any]]:
        captions = "text" in rows.columns
        rows.require(["file_name", *(["text"] if captions else ["prompt", "completion"])])

        def example(row: Mapping[str, Any]) -> dict[str, Any]:
            prompt, completion = ("", row["text"]) if captions else (row["prompt"], row["completion"])
            if not isinstance(prompt, str) or not isinstance(completion, str) or not completion.strip():
                raise ValueError("the text of an image holds no string, or an empty one.")
            path = file_beside(rows.source, row["file_name"])
            text = _prompt_text(processor, prompt.strip())
            ids = processed(processor, str(path), text)["input_ids"][0].tolist()
            after = encoder.affixes[1]
            ids = ids[: -len(after)] if after and ids[-len(after) :] == after else ids
            completion_ids = encoder.ids(completion.strip()) + end
            if encoder.limit is not None and len(ids) + len(completion_ids) - 1 > encoder.limit:
                raise ValueError(encoder.too_long(f"image and prompt have {len(ids)} tokens and the text {len(completion_ids)}", cut=False))
            return {
                "prompt_ids": ids,
                "completion_ids": completion_ids,
                "image": str(path),
                "text": text,
                "texts": (completion.strip(),),
            }

        return referred(encoder.map_rows(rows, example), "completion_ids", references if evaluated else None)

    collate = ImageTextCollator(**inputs.padding, processor=processor)
    metrics = ComputeTextMetrics(partial(tokenizer.decode, skip_special_tokens=True), references)
    ids = lambda example: (example["prompt_ids"], example["completion_ids"])  # noqa: E731
    return Family(ModelKind("image-text"), "image-text", "image-text", encode, collate, collate, metrics, ids, processor=processor)


def _processor(config: Any) -> Any:
    from transformers import AutoProcessor

    name = getattr(config, "_name_or_path", "")
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{name} has no processor of images that can be loaded: {' '.join(str(error).split())[:300]}") from None
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"{name} has a {type(processor).__name__}, which processes no images: give the folder its processor's files.")
    return processor


def _prompt_text(processor: Any, prompt: str) -> str:
    """The text before a completion, with the image's place: by the chat template of the processor, else the image's token first."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, *([{"type": "text", "text": prompt}] if prompt else [])]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    token = getattr(processor, "image_token", "<image>")
    return f"{token}{prompt and ' '}{prompt}"
