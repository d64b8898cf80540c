"""Update rules: any ``torch.optim.Optimizer`` class, fed one parameter's estimate at a time, and the few rules torch lacks.

A rule never sees the model: for each coordinate it gets the value θ (float32) and the estimate ĝ, and leaves the new value behind. Each
coordinate has an optimiser object of its own with a single parameter, so that no two estimates are ever alive together; rules that couple
parameters (D-Adaptation, LAMB's global norm) therefore see each parameter alone.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class EMASGD(torch.optim.Optimizer):
    """SGD on an exponential moving average that starts at zero: N ← βN + (1 − β) ĝ, θ ← θ − η N (LOZO-M, 2410.07698).

    ``torch.optim.SGD(momentum=β, dampening=β)`` differs in its first step, which it does not dampen.

    Args:
        params: as in any torch optimiser.
        lr: η.
        beta: β, in [0, 1).
    """

    def __init__(self, params: Any, lr: float = 1e-3, beta: float = 0.9, weight_decay: float = 0.0) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta must lie in [0, 1), not {beta}.")
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                average.lerp_(grad, 1 - group["beta"])
                p.add_(average, alpha=-group["lr"])
        return loss


OWN_RULES: dict[str, type[torch.optim.Optimizer]] = {"EMASGD": EMASGD}

#: State tensors that are averages of estimates, linear in them, and so follow a change of basis M ← M T.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")


def _torch_rules() -> dict[str, type[torch.optim.Optimizer]]:
    rules = {name: value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    return {n: v for n, v in rules.items() if issubclass(v, torch.optim.Optimizer) and v is not torch.optim.Optimizer}


def _find(name: str, rules: dict[str, Any]) -> Any:
    return next((rules[known] for known in rules if known.lower() == name.lower()), None)


def resolve(rule: str | type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The optimiser class for a name: ours, torch's, or pytorch-optimizer's where that is installed (case does not matter).

    Raises:
        ValueError: no such rule (with the nearest name), or not an optimiser class.
    """
    if isinstance(rule, type):
        if not issubclass(rule, torch.optim.Optimizer):
            raise ValueError(f"an update rule must be a torch.optim.Optimizer class, and {rule.__name__} is not.")
        return rule
    known = OWN_RULES | _torch_rules()
    found = _find(rule, known)
    if found is not None:
        return found
    try:
        package = importlib.import_module("pytorch_optimizer")
    except ImportError:
        extra = " (more rules come with `pip install pytorch-optimizer`)"
    else:
        extra = ""
        more = {n: v for n, v in vars(package).items() if isinstance(v, type) and issubclass(v, torch.optim.Optimizer)}
        found = _find(rule, more)
        if found is not None:
            return found
        known = known | more
    near = difflib.get_close_matches(rule.lower(), [name.lower() for name in known], 1)
    hint = f"; did you mean {next(n for n in known if n.lower() == near[0])!r}?" if near else f"; known: {', '.join(known)}."
    raise ValueError(f"unknown update rule {rule!r}{hint}{extra}")


def is_plain_sgd(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> bool:
    """Whether the rule is θ ← θ − η ĝ, for which the estimate need not be built."""
    return cls is torch.optim.SGD and not any(options.get(name) for name in ("momentum", "nesterov", "maximize"))


def instance(cls: type[torch.optim.Optimizer], parameter: Tensor, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    """``cls`` over one parameter.

    Raises:
        ValueError: the options are not ones the class takes.
    """
    try:
        return cls([parameter], lr=lr, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the update rule {cls.__name__} does not take the options {options}: {error}") from None


class Rule:
    """One optimiser object per coordinate, created when that coordinate is first updated.

    Args:
        rule: a name or an optimiser class.
        options: its keyword arguments besides lr.

    Raises:
        ValueError: unknown rule, or options that its class does not take.
    """

    def __init__(self, rule: str | type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
        self.cls = resolve(rule)
        self.options = dict(options)
        for name in ("lr", "weight_decay"):
            if name in options:
                raise ValueError(f"give {name} to the optimizer, whose parameter groups hold it, not to its update rule.")
        self.plain = is_plain_sgd(self.cls, self.options)
        trial = instance(self.cls, nn.Parameter(torch.zeros(2, 2)), 1e-3, self.options)
        self.takes_weight_decay = "weight_decay" in trial.defaults
        self._optimizers: dict[str, torch.optim.Optimizer] = {}

    def update(self, name: str, value: Tensor, estimate: Tensor, lr: float, weight_decay: float) -> Tensor:
        """θ after one step of the rule. ``value`` may be changed in place; ``estimate`` has its shape."""
        optimizer = self._optimizer(name, value)
        (group,) = optimizer.param_groups
        (parameter,) = group["params"]
        group["lr"] = lr
        if self.takes_weight_decay:
            group["weight_decay"] = weight_decay
        parameter.data, parameter.grad = value, estimate
        optimizer.step()
        value = parameter.data
        # Neither the weight nor the estimate may live on in here.
        parameter.grad, parameter.data = None, value.new_empty(0)
        return value

    def transport(self, name: str, matrix: Tensor) -> None:
        """Carry first moments over to a new basis: M ← M T, T (r, r)."""
        optimizer = self._optimizers.get(name)
        if optimizer is None:
            return
        for state in optimizer.state.values():
            for moment in FIRST_MOMENTS:
                if isinstance(state.get(moment), Tensor):
                    state[moment] = state[moment] @ matrix

    def _optimizer(self, name: str, value: Tensor) -> torch.optim.Optimizer:
        if name not in self._optimizers:
            self._optimizers[name] = instance(self.cls, nn.Parameter(value), 1e-3, self.options)
        return self._optimizers[name]

    def state(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """(tensors by "coordinate/entry", other entries by coordinate), enough for :meth:`load_state`."""
        tensors: dict[str, Tensor] = {}
        others: dict[str, dict[str, Any]] = {}
        for name, optimizer in self._optimizers.items():
            others[name] = {}
            for state in optimizer.state.values():
                for entry, value in state.items():
                    if isinstance(value, Tensor):
                        tensors[f"{name}/{entry}"] = value
                    else:
                        others[name][entry] = value
        return tensors, others

    def load_state(self, tensors: dict[str, Tensor], others: dict[str, dict[str, Any]], values: dict[str, Tensor]) -> None:
        """Restore :meth:`state`; ``values`` gives each coordinate's θ, for its shape and device."""
        self._optimizers.clear()
        for name, entries in others.items():
            value = values[name]
            optimizer = self._optimizer(name, value)
            (parameter,) = optimizer.param_groups[0]["params"]
            state = optimizer.state[parameter]
            state.update(entries)
            for path, tensor in tensors.items():
                owner, _, entry = path.rpartition("/")
                if owner == name:
                    # torch keeps step counters on the CPU whatever the device of the parameter
                    state[entry] = tensor.clone() if tensor.dim() == 0 else tensor.to(value.device, copy=True)
            parameter.data = value.new_empty(0)
