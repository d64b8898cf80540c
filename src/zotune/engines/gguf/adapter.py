"""Low-rank updates W + A Vᵀ of a GGUF model on disk: as an adapter of llama.cpp, and as one of PEFT for the checkpoint.

Factors are a mapping from the name of a :class:`~zotune.engines.gguf.file.Matrix` to (A (m, r), V (n, r)), float32, the rows of A in the
checkpoint's order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import torch

from zotune.engines.gguf.file import GGUFFile, Matrix, from_file_rows, to_file_rows
from zotune.engines.gguf.header import Header, Tensor, dequantized
from zotune.io.atomic import whole_file, write_text

Factors: TypeAlias = Mapping[str, tuple[Any, Any]]
#: Before the keys of zotune's own metadata in an adapter.
PREFIX = "zotune."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(path: str | os.PathLike[str], file: GGUFFile, factors: Factors, metadata: Mapping[str, str] | None = None) -> None:
    """Writes an adapter that llama.cpp and Ollama load; at scale 1 it adds A Vᵀ exactly. The same factors give the same bytes.

    Where the ranks of the matrices differ there is no alpha, and the scale of an adapter is taken as it is; else alpha is the rank.

    Args:
        path: the file, written atomically.
        file: the base model.
        factors: numpy arrays or tensors.
        metadata: what the file says of itself beside the base's name, such as its digest, the method and the run.

    Raises:
        ValueError: there are no factors, they are not of the model's matrices, or not finite.
    """
    matrices, ranks = _checked(file, factors)
    writer = gguf.GGUFWriter(None, file.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(f"{file.name or file.path.stem} adapter")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, file.name or file.path.stem)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    rank = max(ranks) if len(ranks) == 1 else 0
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, rank)  # a scale is taken times alpha / rank, without alpha as it is
    for key in sorted(metadata or {}):
        writer.add_key_value(PREFIX + key, (metadata or {})[key], gguf.GGUFValueType.STRING)
    for matrix in matrices:
        left, right = map(_array, factors[matrix.name])
        writer.add_tensor(f"{matrix.tensor}.lora_a", np.ascontiguousarray(right.T))
        writer.add_tensor(f"{matrix.tensor}.lora_b", np.ascontiguousarray(to_file_rows(left, matrix.heads)))
    with whole_file(path) as partial:
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def read_adapter(path: str | os.PathLike[str], file: GGUFFile) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, str]]:
    """The factors of an adapter, scaled so that they add A Vᵀ, and the metadata that :func:`write_adapter` was given.

    Args:
        path: an adapter of zotune or of llama.cpp's convert_lora_to_gguf.py.
        file: the base model, which knows its matrices' names and orders of rows.

    Raises:
        ValueError: it is no LoRA adapter, damaged, or one of another model.
    """
    header = Header(Path(path))
    facts = header.metadata
    if facts.get("general.type") != "adapter" or facts.get("adapter.type") != "lora":
        raise ValueError(f"{path} is no LoRA adapter, but a {facts.get('general.type', 'model')}: give an adapter.gguf.")
    if facts.get("general.architecture") != file.architecture:
        other = str(facts.get("general.architecture"))[:40]
        raise ValueError(f"{path} is an adapter of a {other}, and {file.path} a {file.architecture}: give the model of the adapter.")
    matrices = {matrix.tensor: matrix for matrix in file.matrices}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in header.tensors.items():
        base, _, side = name.rpartition(".lora_")
        if base not in matrices or side not in ("a", "b"):
            raise ValueError(f"{path} changes {name[:60]}, which is not trained in {file.path}: give the model of the adapter.")
        pairs.setdefault(base, {})[side] = tensor
    alpha = facts.get("adapter.lora.alpha", 0.0)
    factors = {matrices[base].name: _pair(path, matrices[base], sides, alpha) for base, sides in sorted(pairs.items())}
    own = {key.removeprefix(PREFIX): str(facts[key]) for key in facts if key.startswith(PREFIX)}
    return factors, own


def peft_folder(folder: str | os.PathLike[str], file: GGUFFile, factors: Factors, base: str | None = None) -> None:
    """Writes the same update as a LoRA adapter of PEFT, for the checkpoint that the GGUF file was made from.

    Args:
        folder: made if it is missing.
        file: the model that was trained.
        factors: numpy arrays or tensors.
        base: a folder or hub id of the checkpoint, which PEFT then finds by itself.

    Raises:
        ValueError: as :func:`write_adapter`, or it is not known what the checkpoint calls its layers.
    """
    from safetensors.torch import save_file

    matrices, ranks = _checked(file, factors)
    strange = next((matrix.name for matrix in matrices if not matrix.name.startswith("model.")), None)
    if strange is not None:
        raise ValueError(f"it is not known what the checkpoint of a {file.architecture} calls {strange}, so PEFT has no adapter of it.")
    tensors = {}
    for matrix in matrices:
        left, right = map(_array, factors[matrix.name])
        tensors[f"base_model.model.{matrix.name}.lora_A.weight"] = torch.from_numpy(right.T.copy())
        tensors[f"base_model.model.{matrix.name}.lora_B.weight"] = torch.from_numpy(left.copy())
    rank = max(ranks)
    others = {matrix.name: columns for matrix in matrices if (columns := factors[matrix.name][0].shape[1]) != rank}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": rank,
        "rank_pattern": others, "alpha_pattern": others, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "target_modules": _targets(file, matrices),
    }  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / _WEIGHTS) as partial:
        save_file(tensors, partial, {"format": "pt"})
    write_text(folder / _CONFIG, json.dumps(config, indent=2) + "\n")


def _checked(file: GGUFFile, factors: Factors) -> tuple[list[Matrix], set[int]]:
    """The matrices that have factors, in the file's order, and their ranks."""
    known = {matrix.name: matrix for matrix in file.matrices}
    if not factors:
        raise ValueError("an adapter needs factors of one matrix at least: train some of the model's matrices.")
    for name, (left, right) in factors.items():
        if name not in known:
            raise ValueError(f"{file.path} has no trainable matrix {name!r}: the factors are of another model.")
        shapes = tuple(left.shape), tuple(right.shape)
        m, n = known[name].shape
        if len(shapes[0]) != 2 or shapes != ((m, shapes[0][1]), (n, shapes[0][1])) or not shapes[0][1]:
            raise ValueError(
                f"factors of {name} have the shapes {shapes[0]} and {shapes[1]}, and it is ({m}, {n}): they are of another model."
            )
        if not (np.isfinite(_array(left)).all() and np.isfinite(_array(right)).all()):
            raise ValueError(f"factors of {name} are not finite: the run diverged; take an earlier checkpoint.")
    return [matrix for matrix in known.values() if matrix.name in factors], {left.shape[1] for left, _ in factors.values()}


def _array(values: Any) -> np.ndarray:
    return values.detach().float().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, dtype=np.float32)


def _pair(path: str | os.PathLike[str], matrix: Matrix, sides: Mapping[str, Tensor], alpha: Any) -> tuple[np.ndarray, np.ndarray]:
    """A and V of one matrix."""
    if set(sides) != {"a", "b"}:
        raise ValueError(f"{path} is damaged: it holds one factor of {matrix.tensor} without the other.")
    a, b = sides["a"], sides["b"]
    rank = a.shape[0]
    if (a.shape, b.shape) != ((rank, matrix.shape[1]), (matrix.shape[0], rank)):
        raise ValueError(f"{path} has factors {b.shape} and {a.shape} of {matrix.tensor}, which is {matrix.shape}: it is of another model.")
    left, right = from_file_rows(dequantized(b), matrix.heads), dequantized(a).T
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError(f"{path} is damaged: factors of {matrix.tensor} are not finite.")
    scale = np.float32(alpha / rank if isinstance(alpha, float) and alpha else 1)
    return left * scale, np.array(right, order="C")  # a copy: the file is mapped read-only


def _targets(file: GGUFFile, matrices: list[Matrix]) -> list[str]:
    """Layers by the ends of their names where all of a kind have factors, else by their whole names."""
    names = {matrix.name for matrix in matrices}
    kinds = sorted({name.rpartition(".")[2] for name in names})
    whole = {matrix.name for matrix in file.matrices if matrix.name.rpartition(".")[2] in kinds}
    experts = any("_exps." in tensor or "_shexp." in tensor for tensor in file.tensors)  # have layers of the same names
    return kinds if whole == names and not experts else sorted(names)
