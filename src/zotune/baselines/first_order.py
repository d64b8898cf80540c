"""``FirstOrder``: a gradient method under the interface of :class:`zotune.ZerothOrder`, so that one trainer runs both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zotune import errors
from zotune.baselines import registry
from zotune.baselines.baseline import Baseline, Setting
from zotune.errors import NonFiniteLossError
from zotune.forward import batches
from zotune.io.memory_tags import tagged
from zotune.io.typed import are_groups, is_like
from zotune.rng.directions import Directions, Key
from zotune.subspaces.base import not_negative
from zotune.weights.computed_linear import is_computed
from zotune.weights.precision import HALF
from zotune.weights.structure import last_layer, module_mode

LossFunction = Callable[[Any], Tensor]


@dataclass(frozen=True)
class BackwardReport:
    """The report of a step.

    Attributes:
        step: steps done so far, this one included.
        loss: mean loss of the batch, before the step.
        grad_norm: norm of its gradient, before clipping.
        skipped: whether the loss or its gradient was not finite; then no weight was updated.
        lr: learning rate of each parameter group.
    """

    step: int
    loss: float
    grad_norm: float
    skipped: tuple[bool, ...]
    lr: tuple[float, ...]
    loss_diff: None = None
    loss_diff_stderr: None = None


class FirstOrder(torch.optim.Optimizer):
    """A method that calls backward, with the step, the counts and the state dict of :class:`zotune.ZerothOrder`.

    The model is in training mode during a step (dropout acts, activation checkpointing too) and has its flags back afterwards. Weights
    in half precision have a float32 copy that the method updates, so no update is lost to rounding.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        method: a name of ``zotune.baselines.names()`` or a :class:`~zotune.baselines.Baseline`.
        lr: learning rate; the method's default when None.
        weight_decay: of matrices; vectors do not decay.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        seed: for methods that draw random numbers.
        max_steps: length of the run, for methods that change during it.
        max_nonfinite_steps: training stops after this many steps in a row without a finite loss.

    Raises:
        ValueError: nothing to train, a method without gradients, or a number that makes no sense.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = FirstOrder(model, "fo-sgd", lr=0.1)
        >>> loss = optimizer.step(lambda x: model(x).square().mean(dim=1), torch.ones(4, 3))
    """

    journal = None
    eps: float | None = None

    def __init__(
        self,
        model: nn.Module,
        method: str | Baseline,
        lr: float | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        seed: int = 0,
        max_steps: int | None = None,
        max_nonfinite_steps: int = 10,
    ) -> None:
        self.method = registry.get(method) if isinstance(method, str) else method
        if self.method.blocks and type(self) is FirstOrder:
            raise ValueError(f"{self.method.name} takes no gradient of the first blocks: step with zotune.baselines.Hybrid.")
        if self.method.build is None:
            raise ValueError(f"{self.method.name} takes no steps: `zotune train --method {self.method.name}` runs it.")
        if is_computed(model):
            raise ValueError(f"{self.method.name} needs a backward pass, and the engine of this model has none: use lozo-g or lozo.")
        if lr is None:
            assert self.method.lr is not None, "a method that takes steps has a rate"
            lr = self.method.lr
        for label, number in (("learning rate", lr), ("weight_decay", weight_decay), ("max_grad_norm", max_grad_norm)):
            not_negative(f"the {label}", number)
        if max_nonfinite_steps < 1:
            raise ValueError(f"max_nonfinite_steps must be at least 1, not {max_nonfinite_steps}.")
        self.model, self.seed = model, int(seed)
        self.max_grad_norm, self.max_nonfinite_steps = max_grad_norm, max_nonfinite_steps
        self.weight_decay = weight_decay
        self.parameters = self.trained()
        # What the method updates: the parameter itself, or its float32 copy.
        self.masters = {name: nn.Parameter(p.detach().float().clone()) if p.dtype in HALF else p for name, p in self.parameters.items()}
        self.inner = self.method.build(self._setting(lr, weight_decay, max_steps))
        super().__init__([{"params": list(self.masters.values())}], {"lr": lr})
        self.param_groups = self.inner.param_groups  # a scheduler sets the rates of the groups that step
        self.steps = 0
        self.forward_passes = 0
        self.backward_passes = 0
        self.sequences_evaluated = 0
        self.last_report: BackwardReport | None = None
        self._nonfinite_in_a_row = 0

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained by their gradients, by name."""
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not found:
            raise ValueError("the model has no trainable parameter; set requires_grad=True on those to train.")
        return found

    def _setting(self, lr: float, weight_decay: float, max_steps: int | None) -> Setting:
        matrices = [p for p in self.masters.values() if p.dim() > 1]
        vectors = [p for p in self.masters.values() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return Setting(
            self.model,
            {id(p): name for name, p in self.masters.items()},
            [group for group in groups if group["params"]],
            lr,
            frozenset(id(self.masters[name]) for name in last_layer(self.model) if name in self.masters),
            self.seed,
            max_steps,
            {id(self.masters[name]): p for name, p in self.parameters.items()},
        )

    # -- a step ---------------------------------------------------------------------------------------------------------------------

    @tagged("backward update")
    def step(self, loss_fn: LossFunction, batch: Any) -> Tensor:  # type: ignore[override]
        """One step along the gradient of the mean loss.

        Args:
            loss_fn: ``loss_fn(batch)`` returns losses per example, shape (B,), or a scalar.
            batch: whatever ``loss_fn`` takes. A *list* is a list of micro-batches, whose gradients are summed.

        Returns:
            The batch's mean loss, a scalar float32 tensor.

        Raises:
            NonFiniteLossError: ``max_nonfinite_steps`` steps in a row had no finite loss.
        """
        parts = batch if isinstance(batch, list) else [batch]
        names, parameters = list(self.parameters), list(self.parameters.values())
        gradients: list[Tensor | None] = [None] * len(names)
        curvatures: list[Tensor | None] = [None] * len(names)
        total, count = 0.0, 0
        with self._training():
            for part in parts:
                losses = checked(loss_fn(part))
                loss = losses.sum()
                total, count = total + float(loss.detach()), count + losses.numel()
                found: list[Tensor | None] = [*torch.autograd.grad(loss, parameters, create_graph=self.method.curvature, allow_unused=True)]
                if self.method.curvature:
                    add(curvatures, self._hessian_diagonal(found, names, parameters))
                add(gradients, found)
        self._count(parts, 2 if self.method.curvature else 1)
        return self._move(gradients, curvatures, total / count, count)

    def _count(self, parts: Sequence[Any], backward: int) -> None:
        self.forward_passes += self.passes
        self.backward_passes += backward
        self.sequences_evaluated += self.passes * sum(map(_rows, parts))

    def _move(self, gradients: list[Tensor | None], curvatures: Sequence[Tensor | None], loss: float, count: int) -> Tensor:
        for index, master in enumerate(self.masters.values()):
            gradient, gradients[index] = gradients[index], None  # only one gradient at a time is in memory twice
            master.grad = None if gradient is None else gradient.to(master.dtype) / count
            del gradient
        there = [p for p in self.masters.values() if p.grad is not None]
        norm = float(nn.utils.get_total_norm([p.grad for p in there if p.grad is not None])) if there else 0.0
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            if self.max_grad_norm:
                nn.utils.clip_grads_with_norm_(there, self.max_grad_norm, torch.tensor(norm))
            self._inner_step(loss, curvatures, count)
            self._nonfinite_in_a_row = 0
        else:
            self._nonfinite_in_a_row += 1
        for master in self.masters.values():
            master.grad = None
        self.steps += 1
        rates = tuple(float(group["lr"]) for group in self.param_groups)
        self.last_report = BackwardReport(self.steps, loss, norm, (not finite,), rates)
        if self._nonfinite_in_a_row >= self.max_nonfinite_steps:
            raise NonFiniteLossError(
                f"the loss or its gradient was not finite for {self._nonfinite_in_a_row} steps in a row, up to step {self.steps}: lower "
                "the learning rate, or inspect the batches of these steps."
            )
        return torch.tensor(loss, dtype=torch.float32)

    def _inner_step(self, loss: float, curvatures: Sequence[Tensor | None], count: int) -> None:
        record = getattr(self.inner, "record", None)  # of a method that uses the loss, or sums over examples itself
        if record is not None:
            record(loss, count)
        if self.method.curvature:
            self.inner.step(hessian=self._in_group_order(curvatures, count))  # type: ignore[call-overload]
            for state in self.inner.state.values():
                state.pop("hessian", None)
        else:
            self.inner.step()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])

    def _in_group_order(self, values: Sequence[Tensor | None], count: int) -> list[Tensor]:
        by_id = {id(p): value for p, value in zip(self.masters.values(), values, strict=True)}
        found = []
        for group in self.param_groups:
            for p in group["params"]:
                value = by_id[id(p)]
                found.append(torch.zeros_like(p) if value is None else value.to(p.dtype) / count)
        return found

    def _hessian_diagonal(
        self, gradients: Sequence[Tensor | None], names: Sequence[str], parameters: Sequence[nn.Parameter]
    ) -> list[Tensor | None]:
        """Hutchinson: z ∘ H z with z of ±1, a function of (seed, step, name)."""
        rademacher = Directions("rademacher")
        draws = [
            rademacher.draw(Key(self.seed, self.steps, 0, name, "hutchinson"), p.shape, p.device).to(p.dtype)
            for name, p in zip(names, parameters, strict=True)
        ]
        pairs = [(g, z) for g, z in zip(gradients, draws, strict=True) if g is not None and g.requires_grad]
        products = torch.autograd.grad([g for g, _ in pairs], parameters, [z for _, z in pairs], allow_unused=True)
        return [None if product is None else product * z for product, z in zip(products, draws, strict=True)]

    @contextmanager
    def _training(self) -> Iterator[None]:
        attention = sdpa_kernel(SDPBackend.MATH) if self.method.curvature else nullcontext()  # fused attention has no second derivative
        with module_mode(self.model, training=True), attention, torch.enable_grad():
            yield

    @property
    def passes(self) -> int:
        """Cost of a step in forward passes; a checkpointed forward runs again."""
        return self.method.forwards_per_step + int(_checkpoints(self.model))

    def remove_hooks(self) -> None:
        """Remove the hooks that the method has attached to the model."""
        remove = getattr(self.inner, "remove_hooks", None)
        if remove is not None:
            remove()

    # -- state ----------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that, with the model's weights, continues the run bit for bit.

        Returns:
            ``state``: tensors by name; ``param_groups``: without the parameters; ``baseline``: numbers and strings, for JSON.
        """
        tensors: dict[str, Tensor] = {}
        plain: dict[str, dict[str, Any]] = {}
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                tensors[f"{name}|copy"] = master.detach()
            for key, value in self.inner.state.get(master, {}).items():
                content = value.state() if hasattr(value, "state") else {"": value}
                for part, each in content.items():
                    if isinstance(each, Tensor):
                        tensors[f"{name}|{key}|{part}"] = each
                    else:
                        plain.setdefault(name, {})[f"{key}|{part}"] = each
        extra = self.inner.extra_state() if hasattr(self.inner, "extra_state") else {}
        return {
            "state": tensors,
            "param_groups": [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups],
            "baseline": {
                "method": self.method.name,
                "options": self.method.options,
                "seed": self.seed,
                "names": list(self.parameters),
                "plain": plain,
                "extra": extra,
                "counts": [self.steps, self.forward_passes, self.backward_passes, self.sequences_evaluated, self._nonfinite_in_a_row],
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue from :meth:`state_dict`; load the model's weights first.

        Raises:
            ValueError: the state is another method's, seed's or model's.
        """
        baseline = state_dict.get("baseline")
        if baseline is None:
            raise ValueError("this state is that of a zeroth-order method: resume with the method of the run.")
        sample = {"method": "", "options": {}, "seed": 0, "names": [""], "plain": {}, "counts": [0] * 5}
        if not is_like(baseline, sample) or len(baseline["counts"]) != 5 or not are_groups(state_dict["param_groups"]):
            raise ValueError(f"this state is damaged: it has entries of other types than those of a run of {self.method.name}.")
        here = {"method": self.method.name, "options": _plain(self.method.options), "seed": self.seed, "names": list(self.parameters)}
        different = [name for name, value in here.items() if _plain(baseline[name]) != value]
        if different:
            raise ValueError(f"this state has another {', '.join(different)}: resume with the settings of that run.")
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
        holders: dict[str, dict[str, dict[str, Any]]] = {}
        for address, tensor in state_dict["state"].items():
            name, key, *rest = address.split("|")
            if not rest:
                self.masters[name].copy_(tensor)
                continue
            master = self.masters[name]
            holders.setdefault(name, {}).setdefault(key, {})[rest[0]] = tensor if key == "step" else tensor.to(master.device)
        for name, values in baseline["plain"].items():
            for address, value in values.items():
                key, part = address.split("|")
                holders.setdefault(name, {}).setdefault(key, {})[part] = value
        for name, found in holders.items():
            state = self.inner.state[self.masters[name]]
            for key, content in found.items():
                if "" in content:
                    state[key] = content[""]
                else:
                    state[key].load(content)
        if hasattr(self.inner, "load_extra_state"):
            self.inner.load_extra_state(baseline["extra"])
        counts = baseline["counts"]
        self.steps, self.forward_passes, self.backward_passes, self.sequences_evaluated, self._nonfinite_in_a_row = counts


def checked(losses: Tensor) -> Tensor:
    """The losses that a loss function returned, in float32.

    Raises:
        ValueError: it is neither one loss per example nor a scalar.
    """
    if losses.dim() > 1:
        raise ValueError(f"the loss function returned shape {tuple(losses.shape)}; return one loss per example, shape (B,), or a scalar.")
    return losses.float()


def add(sums: list[Tensor | None], found: list[Tensor | None]) -> None:
    """sums += found, in float32. Every entry of ``found`` is set to None, so that its memory is free before the next is copied."""
    for index, value in enumerate(found):
        found[index] = None
        if value is not None:
            value = value.detach().float() if value.dtype in HALF else value.detach()
            before = sums[index]
            sums[index] = value if before is None else before + value


def _checkpoints(model: nn.Module) -> bool:
    new = getattr(model, "is_activation_checkpointing", None)  # its name in newer releases of transformers, which warn of the older
    return bool(getattr(model, "is_gradient_checkpointing", False) if new is None else new)


def _rows(part: Any) -> int:
    try:
        return batches.batch_rows(part)
    except errors.NotBatchableError:
        return 0


def _plain(value: Any) -> Any:
    """As JSON returns it: tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
