"""A training step of any method on a batch of given shape, under the ledger: on real tensors, or on fake ones."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from zotune import catalogue, schemes
from zotune.first_order import Rival, optimizer_class
from zotune.io.caches import clear_tensor_caches
from zotune.memory.ledger import Ledger, Split
from zotune.memory.models import build, config_from, depth_of, shallow
from zotune.memory.rehearsal import rehearsal
from zotune.methods import Method
from zotune.objectives import objective
from zotune.optimizer import ZerothOrder
from zotune.schemes import Scheme
from zotune.subspaces import Guided
from zotune.tasks.preparation import is_encoder

#: Steps that are run: the first has states to make, the second has them already.
STEPS = 2
#: Layers of the two models that stand in for a deep one.
DEPTHS = (1, 2)


@dataclass(frozen=True)
class Workload:
    """What is trained, and how.

    Args:
        config: of the model, from :func:`zotune.memory.config_of`.
        method: from :func:`zotune.catalogue.get`; ``"zero-shot"`` evaluates and trains nothing.
        scheme: which parameters move.
        batch_size: examples a step, B.
        sequence_length: tokens an example, T.
        dtype: of the weights.
        scored: tokens of an example whose logits the loss needs; None: T − 1, all that can be predicted.
        probe: as in :class:`zotune.ZerothOrder`.
        activation_checkpointing: first-order methods run forwards again in place of keeping activations.
    """

    config: Any
    method: Method | Rival
    scheme: Scheme = field(default_factory=Scheme)
    batch_size: int = 16
    sequence_length: int = 256
    dtype: torch.dtype = torch.float32
    scored: int | None = None
    probe: str = "auto"
    activation_checkpointing: bool = False

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
            method=catalogue.get(method["name"], **method["options"]),
            scheme=Scheme(**content["scheme"]),
            dtype=getattr(torch, content["dtype"]),
            **{name: content[name] for name in _PLAIN_FIELDS},
        )


_PLAIN_FIELDS = ("batch_size", "sequence_length", "scored", "probe", "activation_checkpointing")


def estimate(workload: Workload, *, accelerator: bool = False, exact: bool = False) -> Split:
    """The predicted peak of training, by rehearsing steps without data: no weight is read or made.

    The layers of a deep model are alike, and what is kept for each is linear in their number in every moment of a step (forward, backward,
    update): two shallow models are rehearsed and their peaks continued, which takes seconds whatever the depth.

    Args:
        workload: what is trained.
        accelerator: allocate as on a GPU; otherwise as on a CPU.
        exact: rehearse all layers.

    Raises:
        ValueError: the method makes no sense on what the scheme trains, or the model cannot take the batch.
    """
    depth = depth_of(workload.config)
    if exact or depth <= 2 * DEPTHS[1]:
        return _highest(_rehearsed(workload, accelerator))
    few, more = (_rehearsed(workload.with_(config=shallow(workload.config, layers)), accelerator) for layers in DEPTHS)
    return _highest({moment: _continued(few[moment], more[moment], depth) for moment in more if moment in few})


def _rehearsed(workload: Workload, accelerator: bool) -> dict[str, Split]:
    peaks: dict[str, Split] = {}
    for place, one in enumerate([workload, *_other_turns(workload)]):
        with rehearsal(accelerator=accelerator):
            model = prepared(build(one.config, one.dtype), one)
            found, _ = run(model, one, batch_of(one), host=not accelerator)
            peaks |= {f"{moment} {place}": split for moment, split in found.items()}
    return peaks


def _highest(peaks: Mapping[str, Split]) -> Split:
    return max(peaks.values(), key=lambda split: split.total)


def _continued(few: Split, more: Split, depth: int) -> Split:
    """The straight line through the peaks of two depths, at another."""
    steps = (depth - DEPTHS[1]) / (DEPTHS[1] - DEPTHS[0])
    return Split({kind: max(0, round(size + steps * (size - few.kinds[kind]))) for kind, size in more.kinds.items()}, more.largest)


def measure(workload: Workload, device: torch.device | str = "cpu", model: nn.Module | None = None, ledger: bool = True) -> Split:
    """The peak of real steps, on random numbers or a given model. Without a ledger nothing is counted: somebody else does."""
    if model is None:
        model = build(workload.config, workload.dtype).to(device)
    model, host = prepared(model, workload), torch.device(device).type == "cpu"
    batch = {name: tensor.to(device) for name, tensor in batch_of(workload).items()}
    peaks, optimizer = run(model, workload, batch, ledger=ledger, host=host)
    if optimizer is not None:
        optimizer.detach()
    for place, other in enumerate(_other_turns(workload)):
        more, optimizer = run(model, other, batch, ledger=ledger, host=host)
        optimizer.detach()
        peaks = peaks | {f"{moment} {place}": split for moment, split in more.items()}
    return _highest(peaks)


def prepared(model: nn.Module, workload: Workload) -> nn.Module:
    model = schemes.apply(model, workload.scheme)
    problem = schemes.refusal(workload.method, model, workload.scheme) if trains(workload.method) else None
    if problem is not None:
        raise ValueError(problem)
    if workload.activation_checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
        if workload.scheme.scheme != "full":
            model.enable_input_require_grads()  # type: ignore[operator]
    return model


def numbers_of(workload: Workload) -> tuple[int, int]:
    """Numbers in all parameters of the model, and in its largest one."""
    with torch.device("meta"):
        counts = {name: p.numel() for name, p in build(workload.config, workload.dtype).named_parameters()}
    return sum(counts.values()), max(counts.values())


def trains(method: Method | Rival) -> bool:
    """Whether a method takes steps."""
    return not (isinstance(method, Rival) and method.build is None)


def batch_of(workload: Workload) -> dict[str, Tensor]:
    """A batch of the workload's shape: one row is a token shorter than the others, as padded batches are."""
    rows, length = workload.batch_size, workload.sequence_length
    ids = torch.arange(rows * length).view(rows, length) % min(997, workload.config.get_text_config().vocab_size - 3) + 3
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, -1] = 0
    if is_encoder(workload.config):
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(rows, dtype=torch.int64)}
    scored = length - 1 if workload.scored is None else workload.scored
    positions = torch.arange(length - 1 - scored, length - 1).expand(rows, scored).contiguous()
    return {"input_ids": ids, "attention_mask": mask, "positions": positions, "targets": ids[:, length - scored :].contiguous()}


def run(
    model: nn.Module, workload: Workload, batch: Mapping[str, Tensor], *, ledger: bool = True, host: bool = True
) -> tuple[dict[str, Split], Any]:
    """The splits at the peaks of ``STEPS`` steps, by the moments of a step; the optimizer, None for a method without.

    ``host``: whether what is kept in the host's memory counts.
    """
    clear_tensor_caches()  # a step counts the tables of the directions that it makes, whatever ran before
    counted = Ledger(model, host)
    counted.add(batch.values(), "temporary")
    loss = objective("classifier" if "labels" in batch else "lm", model)
    with counted if ledger else contextlib.nullcontext():
        optimizer = _steps(model, workload, loss, batch, counted)
        return counted.peaks(), optimizer


def _steps(
    model: nn.Module, workload: Workload, loss: Callable[[Mapping[str, Tensor]], Tensor], batch: Mapping[str, Tensor], counted: Ledger
) -> Any:
    method = workload.method
    if not trains(method):
        with torch.no_grad():
            model.eval()
            loss(batch)
        return None
    with counted.phase("optimiser state"):
        rate = 1e-6
        optimizer: Any
        if isinstance(method, Rival):
            optimizer = optimizer_class(method)(model, method, lr=rate, max_steps=STEPS)
        else:
            rows = len(next(iter(batch.values())))
            # What is looked at beyond a batch is kept on the host: elsewhere it is no more than its forwards.
            examples = (lambda _, count: [batch] * -(-count // rows)) if counted.host else None
            optimizer = ZerothOrder(model, method, lr=rate, probe=workload.probe, examples=examples)
    for _ in range(STEPS):
        counted.begin_step()
        optimizer.step(loss, batch)
    return optimizer


def _other_turns(workload: Workload) -> list[Workload]:
    """The workload with those turns first that come late in it, and evaluate more at once than the first do."""
    method = workload.method
    if not (isinstance(method, Method) and isinstance(method.subspace, Guided) and not method.subspace.begin):
        return []
    return [workload.with_(method=replace(method, subspace=replace(method.subspace, begin=1)))]
