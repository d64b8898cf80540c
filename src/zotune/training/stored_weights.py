"""The tensors in the files that a model was loaded from, memory-mapped: :class:`StoredWeights`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


class StoredWeights:
    """Tensors by the names of a model's parameters, from the safetensors files of its folder; read when they are used.

    Args:
        model: a model of transformers, which knows its folder; of others there is nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.places: dict[str, Any] = {}
        self.files: dict[Path, tuple[int, int, int]] = {}
        folder = Path(str(getattr(model, "name_or_path", "") or "")).expanduser()
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        if not getattr(model, "name_or_path", "") or not folder.is_dir():
            return
        for path in sorted(folder.glob("*.safetensors")):
            try:
                opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError):  # then the weights are copied, as those of any other model
                continue
            self.files[path] = _version(path)
            self.places |= dict.fromkeys(opened.keys(), opened)

    def __call__(self, name: str) -> Tensor | None:
        """The tensor of a parameter; None where the files have none of this name."""
        for known in (name, name.removeprefix(self.prefix), self.prefix + name):
            if known in self.places:
                found: Tensor = self.places[known].get_tensor(known)
                return found
        return None

    def check(self) -> None:
        """ValueError where a file has been changed since."""
        for path, version in self.files.items():
            if not path.is_file() or _version(path) != version:
                raise ValueError(
                    f"{path} was changed while a run decays toward the weights in it (anchor_decay): put the file back, and resume the run."
                )


def _version(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
