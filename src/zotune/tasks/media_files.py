"""Files of images and of sound that rows name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

#: Most pixels of an image, and most samples of a sound, against small files of huge ones.
MOST_PIXELS, MOST_SAMPLES = 1 << 26, 1 << 26


def file_beside(source: str, name: Any, what: str = "image") -> Path:
    """The file that a row of ``source``, a metadata file, names; ValueError where it lies outside of its folder, or is not there."""
    folder = Path(source).expanduser().resolve().parent
    if not isinstance(name, str) or not name:
        raise ValueError("column 'file_name' holds no name of a file.")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise ValueError(f"file_name {name!r} is outside of the folder of the metadata file: put the files beside it.")
    if not path.is_file():
        raise ValueError(f"there is no {what} {path}: file names are relative to the metadata file.")
    return path


def read_image(path: str | Path) -> Any:
    """The image of a file in three colors, as PIL has it; ValueError where it is none that can be read."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            if file.width * file.height > MOST_PIXELS:
                raise ValueError(f"{path} has {file.width} x {file.height} pixels, more than {MOST_PIXELS}: make it smaller.")
            return file.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image that can be read: {' '.join(str(error).split()).rstrip('.')}.") from None


def read_sound(path: str | Path, sampling_rate: int) -> np.ndarray:
    """The samples (N,) of a file of sound, float32, its channels' mean, at ``sampling_rate`` in Hz.

    Raises:
        ValueError: it cannot be read, is empty or too long, or the libraries are missing.
    """
    missing = [name for name in ("soundfile", "soxr") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"sound is read by {' and '.join(missing)}: pip install 'zotune[audio]'.")
    import soundfile
    from transformers.audio_utils import load_audio

    try:
        found = soundfile.info(str(path))
        if found.frames * max(1.0, sampling_rate / found.samplerate) > MOST_SAMPLES:
            raise ValueError(f"{path} has {found.duration:.0f} seconds, more than {MOST_SAMPLES} samples: cut it.")
        samples = np.asarray(load_audio(str(path), sampling_rate=sampling_rate, backend="soundfile"), dtype=np.float32)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is no sound that can be read: {' '.join(str(error).split()).rstrip('.')}.") from None
    if not samples.size or not np.isfinite(samples).all():
        raise ValueError(f"{path} holds no samples, or such as are no numbers.")
    return samples
