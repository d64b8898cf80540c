"""Loading a model with its head, its adapter and its tokenizer."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zotune.io.inside import check_indexes
from zotune.io.sizes import parse_size
from zotune.io.text import read_text
from zotune.tasks import PreparedData
from zotune.tasks.media import media_kind
from zotune.tasks.model_kind import ModelKind
from zotune.training import base_identity, loading_kinds, offloaded_loading
from zotune.training.adapters import check_fresh
from zotune.training.arguments import ModelArguments
from zotune.training.base_identity import BaseIdentity
from zotune.training.bounds import LONGEST_FILE, check_model
from zotune.training.schemes import load_adapter
from zotune.weights import offload
from zotune.weights.offload.budget import Needs
from zotune.weights.quantized_linear import quantize


@dataclass
class ModelPlan:
    """A model before its weights are read.

    Attributes:
        name: folder (absolute) or hub id of the base model.
        adapter: folder of a trained adapter, or None.
        config: its transformers configuration.
        identity: of the base model's weights, where :func:`load_model` was asked for it.
        gguf: the GGUF file, of a model that llama.cpp computes; None for torch models.
        engine: that model, loaded with its tokenizer, which is compared with the engine's.
    """

    name: str
    adapter: str | None
    config: Any
    identity: BaseIdentity | None = None
    gguf: Any = None
    engine: Any = None


def plan_model(args: ModelArguments, command: str) -> ModelPlan:
    """Reads the model's configuration; FileNotFoundError for an unknown folder or hub id, ValueError for a folder without a model."""
    from transformers import AutoConfig

    if args.is_gguf:
        return _plan_gguf(args)
    name, adapter = _located(args.require(command)), None
    if (Path(name) / "adapter_config.json").is_file():
        adapter = name
        name = _located(_base_of(Path(adapter)))
        if (Path(name) / "adapter_config.json").is_file():  # transformers would load it unchecked
            raise ValueError(
                f"the base model of {adapter} is {name}, an adapter itself: merge that into its own base first (peft's merge_and_unload)."
            )
    if Path(name).is_dir():
        check_indexes(Path(name))
    config = explained(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code))
    if Path(name).is_dir():
        check_model(config, Path(name))
    return ModelPlan(name, adapter, config)


def _plan_gguf(args: ModelArguments) -> ModelPlan:
    from zotune.engines.gguf.file import GGUFFile
    from zotune.training import gguf_models

    gguf_models.check_options(args)
    path, adapter = Path(args.model_name_or_path or "").expanduser().resolve(), None
    if path.is_dir():
        found = gguf_models.source_of(path)
        assert found is not None, "the folder holds its source"
        path, adapter = found
    file = GGUFFile(path)
    return ModelPlan(str(path), None if adapter is None else str(adapter), gguf_models.config_of(file, args.n_ctx), gguf=file)


def load_tokenizer(plan: ModelPlan, args: ModelArguments) -> Any:
    """The base model's tokenizer; None for models of images or sound alone."""
    from transformers import AutoTokenizer

    if plan.gguf is not None:
        from zotune.tasks.gguf_tokenizer import gguf_tokenizer, tokens_of
        from zotune.tasks.tokenizer_check import check_tokenizer
        from zotune.training import gguf_models

        name = args.tokenizer_name
        tokens_of(plan.gguf)  # llama.cpp ends the process on damaged ones
        tokenizer = gguf_tokenizer(plan.gguf) if name is None else explained(name, lambda: AutoTokenizer.from_pretrained(name))
        plan.engine = gguf_models.load_engine(plan.gguf, plan.config, args)
        check_tokenizer(tokenizer, plan.engine.engine)
        for special in ("bos_token_id", "eos_token_id", "pad_token_id"):  # else the trainer tells that they differ
            setattr(plan.config, special, getattr(tokenizer, special))
        return tokenizer
    if media_kind(plan.config) is not None:
        return None
    return explained(plan.name, lambda: AutoTokenizer.from_pretrained(plan.name, trust_remote_code=args.trust_remote_code))


def load_model(
    plan: ModelPlan,
    args: ModelArguments,
    device: torch.device,
    *,
    kind: ModelKind | None = None,
    needs: Needs | None = None,
    identify: bool = False,
) -> tuple[nn.Module, list[str]]:
    """The model on the CPU, and the names of the parameters missing from its files (a new head, initialized at random).

    Args:
        plan: from `plan_model`.
        args: the user's options.
        device: where it will run, for dtype "auto".
        kind: as what it is loaded; None: as a causal language model.
        needs: memory of a step beside the weights, for `--max_memory`.
        identify: sets ``plan.identity``.

    Raises:
        ValueError: an adapter was trained on another base, the head has other classes, or the model's files are incomplete.
    """
    kind = ModelKind() if kind is None else kind
    if plan.gguf is not None:
        return _load_gguf(plan, args, kind, identify), []
    if args.offload == "cpu" and device.type == "cpu":
        raise ValueError("--offload cpu needs a GPU; on a CPU, --offload disk keeps blocks in the model's files.")
    options: dict[str, Any] = {"dtype": resolve_dtype(args.dtype, device), "trust_remote_code": args.trust_remote_code}
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    config, loader = plan.config, loading_kinds.loader_of(kind, plan.config, plan.name)
    if kind.has_new_head:
        loading_kinds.set_head(config, kind, plan.name)
    model, info = explained(
        plan.name, lambda: _read(plan.name, loader, args, device, needs, config=config, output_loading_info=True, **options)
    )
    missing = loading_kinds.checked_missing(model, sorted(info["missing_keys"]), kind, plan.name)
    then = None if plan.adapter is None else base_identity.saved(Path(plan.adapter))
    if then is not None:

        def again(dtype: str) -> nn.Module:
            return explained(plan.name, lambda: loader.from_pretrained(plan.name, config=config, **{**options, "dtype": dtype}))

        base_identity.check(then, model, plan.adapter or "", again, missing)
    if identify:
        plan.identity = base_identity.identity_of_base(model, missing)
    if args.quantize is not None:
        quantize(model, int(args.quantize.removeprefix("int")))
        stream = offload.stream_of(model)
        if stream is not None:
            stream.bring_back()
    if args.offload == "cpu" or (args.offload == "disk" and args.quantize is not None):
        offload.offload(model, args.offload, device=device, **_how(args, needs))
    if plan.adapter is not None:
        base, adapter = model, plan.adapter
        model = explained(adapter, lambda: load_adapter(base, adapter))
        check_fresh(model, missing, adapter)
    return model, missing


def check_texts(plan: ModelPlan, tokenizer: Any, data: PreparedData) -> None:
    """ValueError where the engine's tokenizer reads texts of the data otherwise than ``tokenizer``."""
    if plan.engine is None:
        return
    from zotune.tasks.tokenizer_check import check_tokenizer

    ids = (example["prompt_ids"] + example.get("completion_ids", []) for example in data.train or data.eval or ())
    check_tokenizer(tokenizer, plan.engine.engine, chain(data.texts, (tokenizer.decode(each) for each in ids)))


def _load_gguf(plan: ModelPlan, args: ModelArguments, kind: ModelKind, identify: bool) -> nn.Module:
    from zotune.training import gguf_models

    if kind.name != "causal":
        raise ValueError(
            "llama.cpp computes causal language models, and these data are for another kind: give prompts with completions, or text."
        )
    model = plan.engine or gguf_models.load_engine(plan.gguf, plan.config, args)
    if identify:
        plan.identity = gguf_models.identity_of(model)
    if plan.adapter is not None:
        gguf_models.add_adapter(model, Path(plan.adapter))
    return model


def _read(name: str, kind: Any, args: ModelArguments, device: torch.device, needs: Needs | None, **options: Any) -> Any:
    if args.offload == "disk" and args.quantize is None:
        return offloaded_loading.load(name, kind, device=device, **_how(args, needs), **options)
    if args.quantize is not None:  # one block at a time: the model need not fit into memory
        return offloaded_loading.load(name, kind, blocks=args.offload_blocks, **options)
    return kind.from_pretrained(name, **options)


def _how(args: ModelArguments, needs: Needs | None) -> dict[str, Any]:
    return {
        "blocks": args.offload_blocks,
        "max_memory": None if args.max_memory is None else parse_size(args.max_memory),
        "needs": needs,
        "scratch": None if args.offload_dir is None else str(Path(args.offload_dir).expanduser()),
    }


def resolve_dtype(name: str, device: torch.device) -> Any:
    """The torch dtype of a name; "auto": float32 on a CPU, where half precision is slow, else as stored."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, name)


def _located(name: str) -> str:
    """The absolute path of a model folder, or the hub id; FileNotFoundError for another path."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.exists():
        raise ValueError(f"{name} is a file; --model_name_or_path takes a model folder or a Hugging Face hub id.")
    if not re.fullmatch(r"[\w\-][\w.\-]*(/[\w.\-]+)?", name):  # no hub id
        raise FileNotFoundError(f"there is no model folder {name!r}.")
    return name


def _base_of(adapter: Path) -> str:
    """The base model's name in an adapter's configuration."""
    path = adapter / "adapter_config.json"
    try:
        name = json.loads(read_text(path, LONGEST_FILE))["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError, RecursionError):
        name = None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path} is damaged: it names no base model (base_model_name_or_path).")
    return name


def explained(name: str, load: Callable[[], Any]) -> Any:
    """The result of ``load``; its errors as one sentence."""
    try:
        return load()
    except (offload.NotOffloadable, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{name} holds weights as a pickle of more than tensors, which could run code; use safetensors.") from error
    except Exception as error:  # a damaged or hostile file ends in any exception of the libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason:
            raise ValueError(f"{name} needs code of its own: add --trust_remote_code if you trust its authors.") from error
        if Path(name).is_dir():
            raise ValueError(f"cannot load a model from the folder {name}: {reason}") from error
        if not isinstance(error, OSError | ValueError | KeyError):
            raise
        raise FileNotFoundError(
            f"there is no model folder {name!r}, and the Hugging Face hub gave none of that name "
            "(no such model, no network, or HF_HUB_OFFLINE is set)."
        ) from error
