"""Which objectives a run has: by its options, its task and its model."""

from __future__ import annotations

from typing import Any

from zotune.tasks.task import MASK, Task

OBJECTIVES = ("lm", "choices", "accuracy", "classifier", "mlm", "reward")


def is_seq2seq(model_config: Any) -> bool:
    """Whether a model is an encoder-decoder language model."""
    heads = getattr(model_config, "architectures", None) or ()
    classifies = any(name.endswith(("ForSequenceClassification", "ForTokenClassification")) for name in heads)
    return bool(getattr(model_config, "is_encoder_decoder", False)) and not classifies


def is_encoder(model_config: Any) -> bool:
    """Whether a model is an encoder or a sequence classifier."""
    architectures = getattr(model_config, "architectures", None) or []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return True
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return False
    if model_config is None or getattr(model_config, "is_decoder", False):
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def objectives_of(objective: str | None, task: Task | None, model_config: Any) -> tuple[str, str]:
    """Names of the training and of the evaluation objective; ValueError where objective, task and model do not go together."""
    if objective is not None and objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}.")
    if is_seq2seq(model_config):
        what = f"objective {objective!r}" if objective is not None else "this"
        raise ValueError(
            f"{model_config.model_type} is an encoder-decoder model, which {what} is not for: leave --objective and --reward out."
        )
    masked = task is not None and task.has_mask
    if masked and objective is None and is_encoder(model_config):
        objective = "mlm"
    if objective == "mlm":
        _check_masked(task, model_config)
        return "mlm", "mlm"
    if masked:
        raise ValueError(f"the prompt has a {MASK}, which the head of a masked language model fills: use an encoder and --objective mlm.")
    if is_encoder(model_config):
        if objective in ("lm", "choices", "accuracy", "reward"):
            raise ValueError(
                f"objective {objective!r} needs a causal language model, and this is a sequence classifier "
                f"({model_config.model_type}): leave the objective out."
            )
        objective = "classifier"
    if objective == "reward":
        return "reward", "reward"
    if task is None:
        if objective in ("choices", "accuracy", "classifier"):
            raise ValueError(f"objective {objective!r} needs a task with labels: pass --task (a name or your own YAML file).")
        return "lm", "lm"
    if objective == "classifier":
        return "classifier", "classifier"
    if task.generation:
        if objective in ("choices", "accuracy"):
            raise ValueError(f"task {task.name!r} has no options to score, its answers are generated: leave the objective out.")
        return "lm", "generation"
    return objective or "lm", "choices"


def _check_masked(task: Task | None, model_config: Any) -> None:
    """ValueError where there are no label words, or no masked language model's head."""
    if task is None or task.generation:
        raise ValueError(
            "objective 'mlm' needs a task with labels, whose options are label words: pass --task (a name or your own YAML file)."
        )
    if model_config is None:
        return
    kind = getattr(model_config, "model_type", type(model_config).__name__)
    if not is_encoder(model_config):
        raise ValueError(
            f"objective 'mlm' needs a masked language model such as BERT or RoBERTa, and {kind} is none: use 'choices' or 'lm'."
        )
    if any(name.endswith("ForSequenceClassification") for name in getattr(model_config, "architectures", None) or ()):
        raise ValueError(
            f"objective 'mlm' needs the head of a masked language model, and this {kind} is a sequence classifier: take the checkpoint "
            "that it was made from, or leave the objective out."
        )
