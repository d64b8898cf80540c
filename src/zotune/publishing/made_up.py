"""Inputs for which two models are compared: :func:`made_up_inputs`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zotune.weights.structure import text_config

#: Rows, tokens of a row, and samples of a sound.
ROWS, TOKENS, SAMPLES = 2, 16, 16_000


def made_up_inputs(model: Any) -> dict[str, Tensor]:
    """Inputs that a model of transformers takes: tokens, an image or a sound, drawn from a fixed seed.

    Args:
        model: whose ``main_input_name`` says which; of a model of images and text, tokens alone.
    """
    source, config, name = torch.Generator().manual_seed(0), model.config, model.main_input_name
    if name == "input_ids":
        found = {name: torch.randint(0, text_config(config).vocab_size, (ROWS, TOKENS), generator=source)}
        return found | ({"decoder_input_ids": found[name]} if config.is_encoder_decoder else {})
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape: tuple[int, ...] = (ROWS, getattr(config, "num_channels", 3), height, width)
    elif hasattr(config, "max_source_positions"):  # Whisper: two frames a position
        shape = (ROWS, config.num_mel_bins, 2 * config.max_source_positions)
    elif name == "input_features":
        shape = (ROWS, TOKENS, config.feature_projection_input_dim)
    elif hasattr(config, "num_mel_bins"):
        shape = (ROWS, config.max_length, config.num_mel_bins)
    else:
        shape = (ROWS, SAMPLES)
    return {name: torch.randn(shape, generator=source)}
