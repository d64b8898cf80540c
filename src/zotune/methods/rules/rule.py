"""``Rule``: an optimizer class that updates one coordinate at a time."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.methods.rules.lookup import OWN_RULES, resolve

#: State tensors that are averages of estimates, linear in them, and so follow a change of basis M ← M T.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
#: Entries of a parameter group that every update sets anew.
_GIVEN = ("params", "lr", "weight_decay")
_GROUP = "group:"


def is_plain_sgd(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> bool:
    """Whether the rule is θ ← θ − η ĝ, which needs no tensor of the estimate."""
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
    except Exception as error:  # a class may fail in any way on parameters without their model
        raise ValueError(f"{cls.__name__} cannot be an update rule here: it does not take a list of parameters ({error}).") from None


class Rule:
    """One optimizer object per coordinate, created when that coordinate is first updated.

    Rules for matrices only (Muon) update the matrices; AdamW at the same rate, with its own defaults, updates everything else.

    Args:
        rule: a name or an optimizer class.
        options: its keyword arguments besides lr.

    Raises:
        ValueError: unknown rule, options that its class does not take, or a class that cannot be a rule: it needs gradients or losses
            of its own, draws random numbers, or has a state that cannot be saved.
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
        self.matrices_only = False if self.cls in OWN_RULES.values() else _try_out(self.cls, _Options(self.options))  # type: ignore[arg-type]
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    @tagged("update")
    def update(self, name: str, value: Tensor, estimate: Tensor, lr: float, weight_decay: float) -> Tensor:
        """θ after one step of the rule. ``value`` may be changed in place; ``estimate`` has its shape."""
        if self.plain and not weight_decay:  # what the class does, without its cost beside small factors
            return value.add_(estimate, alpha=-lr)
        optimizer = self._optimizer(name, value)
        (group,) = optimizer.param_groups
        (parameter,) = group["params"]
        group["lr"] = lr
        if self.takes_weight_decay:
            group["weight_decay"] = weight_decay
        parameter.data, parameter.grad = value, estimate
        optimizer.step()
        value = parameter.data
        # Neither the weight nor the estimate may stay in memory here.
        parameter.grad, parameter.data = None, value.new_empty(0)
        return value

    @tagged("update")
    def transport(self, name: str, carry: Callable[[Tensor], Tensor]) -> None:
        """Change the basis of first moments: each becomes ``carry(moment)``."""
        optimizer = self.optimizers.get(name)
        if optimizer is None:
            return
        for state in optimizer.state.values():
            for moment in FIRST_MOMENTS:
                if isinstance(state.get(moment), Tensor):
                    state[moment] = carry(state[moment])

    def _optimizer(self, name: str, value: Tensor) -> torch.optim.Optimizer:
        if name not in self.optimizers:
            beside = self.matrices_only and value.dim() != 2
            cls, options = (torch.optim.AdamW, {}) if beside else (self.cls, self.options)
            self.optimizers[name] = instance(cls, nn.Parameter(value), 1e-3, options)
        return self.optimizers[name]

    @tagged("update")
    def state(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """(tensors by "coordinate/entry", other entries by coordinate), enough for :meth:`load_state`.

        Step counters in the parameter group of an optimizer are entries whose name begins with ``group:``.
        """
        tensors: dict[str, Tensor] = {}
        others: dict[str, dict[str, Any]] = {}
        for name, optimizer in self.optimizers.items():
            others[name] = {}
            (group,) = optimizer.param_groups
            entries = [(_GROUP + key, value) for key, value in group.items() if key not in _GIVEN and _changed(value, optimizer, key)]
            for state in optimizer.state.values():
                entries += state.items()
            for entry, value in entries:
                if isinstance(value, Tensor):
                    tensors[f"{name}/{entry}"] = value
                else:
                    others[name][entry] = value
        return tensors, others

    @tagged("update")
    def load_state(self, tensors: dict[str, Tensor], others: dict[str, dict[str, Any]], values: dict[str, Tensor]) -> None:
        """Restore :meth:`state`; ``values``: θ of each coordinate, for its shape and device."""
        self.optimizers.clear()
        for name, entries in others.items():
            value = values[name]
            (group,) = self._optimizer(name, value).param_groups
            (parameter,) = group["params"]
            state = self.optimizers[name].state[parameter]
            found = dict(entries)
            for path, tensor in tensors.items():
                owner, _, entry = path.rpartition("/")
                if owner == name:
                    # torch keeps step counters on the CPU whatever the device of the parameter
                    found[entry] = tensor.clone() if tensor.dim() == 0 else tensor.to(value.device, copy=True)
            for entry, content in found.items():
                if entry.startswith(_GROUP):
                    group[entry.removeprefix(_GROUP)] = content
                else:
                    state[entry] = content
            parameter.data = value.new_empty(0)


def _changed(value: Any, optimizer: torch.optim.Optimizer, key: str) -> bool:
    """Whether an entry of the parameter group differs from the options."""
    default = optimizer.defaults.get(key)
    return isinstance(value, Tensor) or type(value) is not type(default) or value != default


# -- which classes can be rules ------------------------------------------------------------------------------------------------------


class _Options(dict[str, Any]):
    """Options as a cache key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))


@functools.lru_cache(maxsize=256)
def _try_out(cls: type[torch.optim.Optimizer], options: _Options) -> bool:
    """Run a class on a small matrix and a vector, saved and restored half-way. Returns whether it takes matrices only.

    Raises:
        ValueError: it cannot be a rule, with the reason.
    """
    refused = f"{cls.__name__} cannot be an update rule here: "
    if callable(getattr(cls, "eval", None)) and callable(getattr(cls, "train", None)):
        raise ValueError(f"{refused}it trains other weights than it evaluates (train() and eval()); choose another rule.")
    before = torch.get_rng_state()
    try:
        _run(cls, options, (3, 2), refused)
        try:
            _run(cls, options, (3,), refused)
        except (ValueError, RuntimeError, IndexError, AssertionError) as error:
            if "2D" not in str(error) and "2-D" not in str(error):
                raise
            return True
        if not torch.equal(before, torch.get_rng_state()):
            raise ValueError(f"{refused}it draws random numbers from torch's global generator; choose another rule.")
    finally:
        torch.set_rng_state(before)
    return False


def _run(cls: type[torch.optim.Optimizer], options: dict[str, Any], shape: tuple[int, ...], refused: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start, *estimates = torch.randn(5, *shape, generator=generator)
    straight, halted, resumed = (_untried(cls, options) for _ in range(3))

    def follow(rule: Rule, value: Tensor, through: list[Tensor]) -> Tensor:
        for estimate in through:
            value = rule.update("trial", value, estimate.clone(), 1e-2, 0.0)
        return value

    try:
        expected = follow(straight, start.clone(), estimates)
    except Exception as error:
        if "2D" in str(error):
            raise
        raise ValueError(f"{refused}a step on an estimate alone fails ({type(error).__name__}: {error}).") from None
    half = follow(halted, start.clone(), estimates[:2])
    try:
        tensors, others = halted.state()
        resumed.load_state({k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(others)), {"trial": half})
        same = torch.equal(follow(resumed, half, estimates[2:]), expected)
    except Exception:  # a state that was restored wrongly may fail in any way
        same = False
    if not same:
        raise ValueError(f"{refused}it keeps a state that cannot be saved and restored exactly; choose another rule.")


def _untried(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> Rule:
    rule = Rule.__new__(Rule)
    rule.cls, rule.options, rule.plain, rule.matrices_only, rule.optimizers = cls, dict(options), False, False, {}
    rule.takes_weight_decay = "weight_decay" in instance(cls, nn.Parameter(torch.zeros(2, 2)), 1e-3, rule.options).defaults
    return rule
