"""A method on a model with batches of a given shape: :class:`Workload`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from zotune.baselines import Baseline, catalog
from zotune.memory.shapes import build, config_from
from zotune.methods import Method
from zotune.subspaces import Guided
from zotune.tasks.objective_choice import is_encoder
from zotune.training import schemes
from zotune.training.schemes import Scheme


@dataclass(frozen=True)
class Workload:
    """What is trained and on which batches.

    Args:
        config: of the model, from :func:`zotune.memory.config_of`.
        method: from :func:`zotune.baselines.catalog.get`; ``"zero-shot"`` evaluates and trains nothing.
        scheme: which parameters are trained.
        batch_size: examples per step, B.
        sequence_length: tokens per example, T.
        dtype: of the weights.
        scored: tokens of an example whose logits the loss needs; None: T − 1, all that can be predicted.
        forward_batching: as in :class:`zotune.ZerothOrder`.
        anchor_decay: as there; above 0 the weights that training begins with are kept beside the trained ones.
        activation_checkpointing: first-order methods recompute activations in the backward pass.
        masked: of an encoder, its masked language model and the loss of label words at a mask; else its classifier.
    """

    config: Any
    method: Method | Baseline
    scheme: Scheme = field(default_factory=Scheme)
    batch_size: int = 16
    sequence_length: int = 256
    dtype: torch.dtype = torch.float32
    scored: int | None = None
    forward_batching: str = "auto"
    anchor_decay: float = 0.0
    activation_checkpointing: bool = False
    masked: bool = False

    def with_(self, **changes: Any) -> Workload:
        return replace(self, **changes)

    def to_json(self) -> str:
        """The workload as JSON, for another process."""
        content = {
            "config": json.loads(self.config.to_json_string(use_diff=False)),
            "method": {"name": self.method.name, "options": self.method.options},
            "scheme": asdict(self.scheme),
            "dtype": str(self.dtype).removeprefix("torch."),
            **{name: getattr(self, name) for name in _PLAIN_FIELDS},
        }
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> Workload:
        """The workload that :meth:`to_json` wrote.

        Raises:
            ValueError: its model, method or scheme is unknown here.
        """
        content = json.loads(text)
        method = content["method"]
        return cls(
            config=config_from(content["config"], "the workload"),
            method=catalog.get(method["name"], **method["options"]),
            scheme=Scheme(**content["scheme"]),
            dtype=getattr(torch, content["dtype"]),
            **{name: content[name] for name in _PLAIN_FIELDS},
        )


_PLAIN_FIELDS = ("batch_size", "sequence_length", "scored", "forward_batching", "anchor_decay", "activation_checkpointing", "masked")


def prepared(model: nn.Module, workload: Workload) -> nn.Module:
    """The model under the workload's scheme; ValueError where the method does not apply to it."""
    model = schemes.apply(model, workload.scheme)
    problem = schemes.refusal(workload.method, model, workload.scheme) if trains(workload.method) else None
    if problem is not None:
        raise ValueError(problem)
    if workload.activation_checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
        if workload.scheme.scheme != "full":
            model.enable_input_require_grads()  # type: ignore[operator]
    return model


def elements_of(workload: Workload) -> tuple[int, int]:
    """Elements of all parameters of the model, and of the largest one."""
    with torch.device("meta"):
        counts = {name: p.numel() for name, p in build(workload.config, workload.dtype, masked=workload.masked).named_parameters()}
    return sum(counts.values()), max(counts.values())


def trains(method: Method | Baseline) -> bool:
    """Whether a method takes steps."""
    return not (isinstance(method, Baseline) and method.build is None)


def batch_of(workload: Workload) -> dict[str, Tensor]:
    """A batch of the workload's shape: one row is a token shorter than the others, as padded batches are."""
    rows, length = workload.batch_size, workload.sequence_length
    ids = torch.arange(rows * length).view(rows, length) % min(997, workload.config.get_text_config().vocab_size - 3) + 3
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, -1] = 0
    if workload.masked:
        place, answer = torch.zeros(rows, 1, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        words = torch.arange(2).expand(rows, 2).contiguous()
        return {"input_ids": ids, "attention_mask": mask, "positions": place, "option_ids": words, "answer": answer}
    if is_encoder(workload.config):
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(rows, dtype=torch.int64)}
    scored = length - 1 if workload.scored is None else workload.scored
    positions = torch.arange(length - 1 - scored, length - 1).expand(rows, scored).contiguous()
    return {"input_ids": ids, "attention_mask": mask, "positions": positions, "targets": ids[:, length - scored :].contiguous()}


def other_phases(workload: Workload) -> list[Workload]:
    """The workload from its later phases on, which may need more memory than the first."""
    method = workload.method
    if not (isinstance(method, Method) and isinstance(method.subspace, Guided) and not method.subspace.begin):
        return []
    return [workload.with_(method=replace(method, subspace=replace(method.subspace, begin=1)))]
