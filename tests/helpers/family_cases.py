"""Toy rows and small random models of the families beside causal language models."""

from __future__ import annotations

import json
import random
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import processors
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    BartConfig,
    BartForConditionalGeneration,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from command_cases import BAD, GOOD, word_tokenizer

Draw = Callable[[random.Random], dict[str, Any]]


def number(draw: random.Random) -> dict[str, Any]:
    """A text whose label is the share of good words."""
    good = draw.randint(0, 4)
    words = [*draw.choices(GOOD, k=good), *draw.choices(BAD, k=4 - good)]
    draw.shuffle(words)
    return {"text": " ".join(words), "label": good / 2 - 1.0}


def several(draw: random.Random) -> dict[str, Any]:
    """A text with a label for each kind of word in it."""
    chosen = [name for name in ("good", "bad") if draw.random() < 0.5]
    words = ["the film", *(draw.choice(GOOD if name == "good" else BAD) for name in chosen)]
    return {"text": " ".join(words), "labels": chosen}


def ticket(draw: random.Random) -> dict[str, Any]:
    """A text of one of four classes."""
    word = draw.choice(["fine", "dull", "sharp", "weak"])
    return {"text": f"the film is {word}", "label": f"about {word}"}


def write_rows(folder: Path, draw: Draw, train: int = 32, evaluated: int = 16) -> None:
    """`train.jsonl` and `eval.jsonl`."""
    for name, count, seed in (("train", train, 0), ("eval", evaluated, 1)):
        rows = [draw(source) for source in [random.Random(seed)] for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer(draw: random.Random) -> dict[str, Any]:
    """A prompt whose completion is one of two words."""
    good = draw.random() < 0.5
    return {
        "prompt": f"the {draw.choice(['film', 'plot'])} is {draw.choice(GOOD if good else BAD)}",
        "completion": "great" if good else "bad",
    }


def pair(draw: random.Random) -> dict[str, Any]:
    """Two texts on the same thing."""
    words = draw.sample([*GOOD, *BAD], 3)
    return {"anchor": " ".join(words), "positive": f"the film {' '.join(reversed(words))}"}


def similarity(draw: random.Random) -> dict[str, Any]:
    """Two texts with the share of words that they have in common."""
    words = draw.sample([*GOOD, *BAD], 5)
    common = draw.randint(0, 2)
    return {"sentence1": " ".join(words[:2]), "sentence2": " ".join(words[2 - common : 4 - common]), "score": common / 2}


def tagged(draw: random.Random) -> dict[str, Any]:
    """Words of which some are entities of two kinds, one or two words long."""
    tokens, tags = ["the"], ["O"]
    for _ in range(draw.randint(1, 3)):
        kind, words = draw.choice([("GOOD", GOOD), ("BAD", BAD)])
        length = draw.randint(1, 2)
        tokens += [*draw.choices(words, k=length), "film"]
        tags += [f"B-{kind}", *[f"I-{kind}"] * (length - 1), "O"]
    return {"tokens": tokens, "tags": tags}


def save_seq2seq(folder: Path, name: str, **changes: Any) -> None:
    """A random T5 or BART of one layer each with a word tokenizer, whose texts end with ``</s>``."""
    tokenizer = word_tokenizer(["<s>"])
    end = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "t5":
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "initializer_factor": 1.0}
            model: Any = T5ForConditionalGeneration(T5Config(**ids, **sizes, decoder_start_token_id=tokenizer.pad_token_id, **changes))
        else:
            sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
            widths = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32, "init_std": 0.3, "bos_token_id": 3}
            config = BartConfig(
                **ids, **sizes, **widths, decoder_start_token_id=tokenizer.eos_token_id, forced_eos_token_id=None, **changes
            )
            model = BartForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_images(folder: Path, train: int = 16, evaluated: int = 8) -> None:
    """Folders of images of one color each with `metadata.jsonl`, whose captions name the color's word."""
    for part, count, seed in (("train", train, 0), ("eval", evaluated, 1)):
        draw, lines = random.Random(seed), []
        (folder / part).mkdir(parents=True)
        for number in range(count):
            good = draw.random() < 0.5
            color = (200 + draw.randint(0, 50), 20, 20) if good else (20, 20, 200 + draw.randint(0, 50))
            Image.new("RGB", (20, 16), color).save(folder / part / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "text": "great film" if good else "bad film"}) + "\n")
        (folder / part / "metadata.jsonl").write_text("".join(lines))


def save_llava(folder: Path) -> None:
    """A random LLaVA of one layer each, with a processor of images of 16 x 16 pixels."""
    tokenizer = word_tokenizer(["<s>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.25, eos_token_id=2, pad_token_id=1, **sizes
    )
    vision = CLIPVisionConfig(image_size=16, patch_size=8, initializer_range=0.25, **{**sizes, "num_hidden_layers": 2})
    image = tokenizer.convert_tokens_to_ids("<image>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, eos_token_id=2, pad_token_id=1)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    edge = {"height": 16, "width": 16}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=edge)
    strategy = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(image_processor=processor, tokenizer=tokenizer, image_token="<image>", **strategy).save_pretrained(folder)


def save_media_rows(folder: Path, kind: str, train: int = 16, evaluated: int = 8, label: str = "label") -> None:
    """Folders with `metadata.csv` of images of one color each, or of tones, whose label is the color's, or the pitch's."""
    names = ("red", "green") if kind == "image" else ("low", "high")
    for part, count, seed in (("train", train, 0), ("eval", evaluated, 1)):
        draw, lines = random.Random(seed), [f"file_name,{label}"]
        (folder / part).mkdir(parents=True)
        for number in range(count):
            chosen = draw.randrange(2)
            name = f"{number}.{'png' if kind == 'image' else 'wav'}"
            if kind == "image":
                color = [draw.randint(0, 60) + (150 if channel == chosen else 0) for channel in range(3)]
                Image.new("RGB", (20, 16), tuple(color)).save(folder / part / name)
            else:
                write_tone(folder / part / name, (300.0, 1200.0)[chosen], draw.uniform(0.1, 0.2))
            lines.append(f"{name},{names[chosen]}")
        (folder / part / "metadata.csv").write_text("\n".join(lines) + "\n")


def write_tone(path: Path, pitch: float, seconds: float, rate: int = 8000, channels: int = 1) -> None:
    """A WAV file of a tone, 16 bits."""
    samples = np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((8000 * np.repeat(samples, channels)).astype("<i2").tobytes())


def save_media_model(folder: Path, name: str) -> None:
    """A random ViT, AST or wav2vec 2.0 without a head, with its processor."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "vit":
            model: Any = ViTModel(ViTConfig(image_size=16, patch_size=8, initializer_range=0.2, **sizes), add_pooling_layer=False)
            processor: Any = ViTImageProcessorPil(size={"height": 16, "width": 16})
        elif name == "ast":
            config = ASTConfig(
                max_length=24, num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8, initializer_range=0.2, **sizes
            )
            model = ASTForAudioClassification(config).audio_spectrogram_transformer
            processor = ASTFeatureExtractor(max_length=24, num_mel_bins=16)
        else:
            convolutions: dict[str, Any] = {"conv_dim": (8, 8), "conv_kernel": (20, 8), "conv_stride": (20, 8)}
            others: dict[str, Any] = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
            quiet = {f"{part}_{what}": 0.0 for part, what in [("feat_proj", "dropout"), ("mask_time", "prob"), ("mask_feature", "prob")]}
            config = Wav2Vec2Config(initializer_range=0.2, **sizes, **convolutions, **others, **quiet, vocab_size=8)
            model = Wav2Vec2Model(config)
            processor = Wav2Vec2FeatureExtractor(sampling_rate=8000)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
