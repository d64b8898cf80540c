""":class:`SFTTrainer`: the constructor of TRL's trainer over :class:`~zotune.ZOTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from zotune.tasks.collators import LanguageModelCollator
from zotune.tasks.encoding import context_limit, pad_token_id
from zotune.training.config import ZOConfig
from zotune.training.loading import resolve_dtype
from zotune.training.raw_text import tokenizer_of
from zotune.training.sft import blocks
from zotune.training.sft.rows import RowFormat
from zotune.training.sft.settings import OF_TRAINER, config_of
from zotune.training.trainer import ZOTrainer


class SFTTrainer(ZOTrainer):
    """Supervised fine-tuning with the constructor of `trl.SFTTrainer`, by forward passes only.

    Rows become the tokens that TRL trains on. The loss is the mean over all scored tokens of a step, as TRL's. TRL need not be installed;
    its `SFTConfig` is read by its fields (:mod:`zotune.training.sft.settings`).

    Args:
        model: the name or folder of a causal language model, or the model.
        args: TRL's `SFTConfig`, `TrainingArguments` or a :class:`~zotune.ZOConfig`.
        data_collator: of tokenized rows; None: zotune's for rows in TRL's formats.
        train_dataset, eval_dataset: rows with text, messages, or prompt and completion (texts or messages); or tokenized ones.
        processing_class: the tokenizer; None: the model's.
        quantization_config, peft_config, formatting_func, callbacks, compute_metrics, optimizers: as TRL's.
        kwargs: fields of :class:`~zotune.ZOConfig`, such as `method`, `learning_rate` and `eps`.

    Raises:
        ValueError: an option that cannot act, or a row that cannot be encoded; the message names the fix.

    Source: the formats and the meaning of the fields, TRL 1.16.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[Mapping[str, Any]], str] | None = None,
        callbacks: list[Any] | None = None,
        compute_metrics: Any = None,
        compute_loss_func: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("compute_loss_func", compute_loss_func), ("preprocess_logits_for_metrics", preprocess_logits_for_metrics)):
            if value is not None:
                raise ValueError(f"SFTTrainer takes no {name} here: use zotune.ZOTrainer(model, args, objective=...).")
        if train_dataset is None:
            raise ValueError("SFTTrainer needs a train_dataset.")
        given = _given(model, args)
        config = args if isinstance(args, ZOConfig) else config_of(given, **kwargs)
        if isinstance(args, ZOConfig) and kwargs:
            raise ValueError(f"{next(iter(kwargs))} is a field of the ZOConfig: set it there.")
        options = {name: getattr(given, name, None) for name in OF_TRAINER}
        set_seed(config.seed)  # a new adapter draws from the global generator
        loaded = _loaded(model, options, config.device, quantization_config)
        tokenizer, processing_class = _tokenizer(loaded, processing_class, options)
        if peft_config is not None:
            from peft import get_peft_model

            loaded = get_peft_model(loaded, peft_config)
        limit, longest = context_limit(tokenizer, loaded.config)[0], options["max_length"]
        form = RowFormat(
            tokenizer,
            options["dataset_text_field"] or "text",
            min((each for each in (longest, None if limit is None else limit + 1) if each is not None), default=None),
            options["completion_only_loss"],
            bool(options["assistant_only_loss"]),
            formatting_func,
        )
        packing = bool(options["packing"])
        eval_packing = packing if options["eval_packing"] is None else bool(options["eval_packing"])
        for packs, evaluated in ((packing, False), (eval_packing and eval_dataset is not None, True)):
            if packs:
                blocks.check(str(options["packing_strategy"]), form.max_length, evaluated)
        data = {
            "train_dataset": form.encoded(train_dataset, "train_dataset", packing),
            "eval_dataset": form.encoded(eval_dataset, "eval_dataset", eval_packing),
        }
        if data_collator is None and data["train_dataset"] is not train_dataset:
            data_collator = LanguageModelCollator(pad_token_id(tokenizer), over_tokens=True)
        super().__init__(
            loaded,
            config,
            data_collator=data_collator,
            processing_class=processing_class,
            callbacks=callbacks,
            compute_metrics=compute_metrics,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            **data,
        )


def _given(model: str | nn.Module, args: TrainingArguments | None) -> TrainingArguments:
    if args is not None:
        return args
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "name_or_path", "")
    return TrainingArguments(output_dir=f"{Path(name or 'model').name}-SFT", per_device_train_batch_size=8)


def _loaded(model: str | nn.Module, options: Mapping[str, Any], device: torch.device, quantization: Any) -> Any:
    """The model; loaded by name in the dtype of `model_init_kwargs`, else float32 on a CPU and as stored on a GPU."""
    given = dict(options["model_init_kwargs"] or {})
    if not isinstance(model, str):
        if given or quantization is not None:
            raise ValueError("model_init_kwargs and quantization_config load a model, and this one is loaded: leave them out.")
        return model
    if quantization is not None:
        given["quantization_config"] = quantization
    given.setdefault("dtype", resolve_dtype("auto", device))
    if isinstance(given["dtype"], str) and given["dtype"] != "auto":
        given["dtype"] = getattr(torch, given["dtype"])
    given.setdefault("trust_remote_code", bool(options["trust_remote_code"]))
    return AutoModelForCausalLM.from_pretrained(model, **given)


def _tokenizer(model: Any, processing_class: Any, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """The tokenizer with the end token, the padding token and the chat template that TRL's arguments ask for, and the processing class."""
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(model.config.name_or_path, trust_remote_code=bool(options["trust_remote_code"]))
    tokenizer = tokenizer_of(processing_class)
    for name in ("eos_token", "pad_token"):
        token = options[name]
        if token is not None and token not in tokenizer.get_vocab():
            raise ValueError(f"{name}={token!r} of the SFTConfig is no token of the tokenizer.")
        if token is not None:
            setattr(tokenizer, name, token)
            setattr(model.config.get_text_config(), f"{name}_id", getattr(tokenizer, f"{name}_id"))
    template = options["chat_template_path"]
    if template is not None:
        if not Path(template).is_file():
            raise ValueError(f"chat_template_path={template!r} is not a file with a Jinja template: set tokenizer.chat_template yourself.")
        processing_class.chat_template = tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    return tokenizer, processing_class
