"""The update of a run as a LoRA adapter of PEFT: :func:`adapter_of`.

Of every matrix W of a linear layer or an embedding the update ΔW = W_trained − W_base is factored, ΔW ≈ B A with r rows of A, by its
singular value decomposition, which is the best approximation of rank r in the Frobenius norm. What low-rank methods add has the rank of the
factors that they have drawn, up to the rounding of the weights. Vectors have no factors: biases of linear layers go along as PEFT's
``bias="all"``, the modules of others (norms) whole.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune.weights.structure import input_embeddings, output_embeddings

#: Rank at most, where none is given.
MOST = 64
#: What counts as nothing lost: so many rounding errors of the weights, or such a part of the update; never more than the last.
ROUNDING, EXACT, MOST_LOST = 8, 1e-5, 1e-2


@dataclass
class Factored:
    """What an adapter keeps of a run's update.

    Attributes:
        model: the base model with the adapter, a `PeftModel`.
        rank: r of all matrices.
        errors: by matrix, ‖ΔW − B A‖ / ‖ΔW‖.
        error: the same over all matrices.
        whole: modules that go along whole, for vectors in them that were trained.
        biases: whether biases go along, which stay when the adapter is disabled.
    """

    model: Any
    rank: int
    errors: dict[str, float]
    error: float
    whole: list[str]
    biases: bool

    @property
    def worst(self) -> str:
        """The matrix that loses most."""
        return max(self.errors, key=lambda name: self.errors[name])


def adapter_of(base: nn.Module, trained: nn.Module, rank: int | None = None, fresh: Collection[str] = ()) -> Factored:
    """The adapter that makes the base model the trained one; ``base`` becomes part of it.

    Args:
        base, trained: two models of one architecture, in one dtype, on the CPU.
        rank: r; None: the least that loses no more than the weights' own rounding, at most 64.
        fresh: parameters that the base model's files lack (a classifier's new head): they go along whole.

    Raises:
        ValueError: nothing was trained, or a trained parameter has no place in an adapter.
    """
    from peft import LoraConfig, get_peft_model

    before, after = dict(base.named_parameters(remove_duplicate=False)), dict(trained.named_parameters(remove_duplicate=False))
    if set(before) != set(after) or any(before[name].shape != after[name].shape for name in before):
        raise ValueError("the trained model has other parameters than the base model: give the base model of the run with --base.")
    changed = [name for name in after if name in set(fresh) or not torch.equal(before[name], after[name])]
    if not changed:
        raise ValueError("the trained weights are those of the base model: there is nothing to export.")
    modules = dict(base.named_modules())
    factors: dict[str, _Spectrum] = {}
    whole: list[str] = []
    biases: list[str] = []
    for name in changed:
        module, _, kind = name.rpartition(".")
        if kind == "weight" and name not in set(fresh) and _factors(modules[module]):
            transposed = _transposed(modules[module])
            same = next((other for other in factors if after[f"{other}.weight"] is after[name]), None)  # a head tied to the embedding
            factors[module] = factors[same] if same is not None else _Spectrum.of(before[name], after[name], transposed)
        elif kind == "bias" and name not in set(fresh) and _factors(modules[module]):
            biases.append(module)
        elif module and module not in whole:
            whole.append(module)
        elif not module:
            raise ValueError(f"an adapter has no place for {name}, a parameter of the model itself: export with --to merged.")
    whole = [module for module in whole if not any(module.startswith(f"{outer}.") for outer in whole)]
    factors = {module: each for module, each in factors.items() if module not in whole}
    if not factors:
        raise ValueError(
            "no matrix of a linear layer or an embedding was trained, so that there is nothing to factor: export with --to merged."
        )
    r = rank or max((each.needed for each in factors.values()), default=1)
    r = min(r, rank or MOST)
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted(factors),
        modules_to_save=sorted(whole) or None,
        fan_in_fan_out=any(_transposed(modules[module]) for module in factors),
        bias="all" if biases else "none",
        ensure_weight_tying=_tied(base) and any(isinstance(modules[module], nn.Embedding) for module in factors),
        task_type=_task(base, fresh),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws factors, which are replaced
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # of layers of both kinds, where peft sets each right
        model = get_peft_model(base, config)  # type: ignore[arg-type]
    _fill(model, factors, r)
    saved = dict(model.named_parameters())
    with torch.no_grad():
        for module in whole:
            for name, value in _module_parameters(trained, module):
                saved[f"base_model.model.{module}.modules_to_save.default{name}"].copy_(value)
        for module in biases:
            of = f"base_model.model.{module}.base_layer.bias"
            saved[of if of in saved else f"base_model.model.{module}.bias"].copy_(after[f"{module}.bias"])
    lost = {module: each.lost(r) for module, each in factors.items()}
    total = math.sqrt(math.fsum(each.norm**2 for each in factors.values()))
    left = math.sqrt(math.fsum((lost[module] * each.norm) ** 2 for module, each in factors.items()))
    return Factored(model, r, lost, left / total if total else 0.0, sorted(whole), bool(biases))


@dataclass
class _Spectrum:
    """ΔW = U diag(s) Vᵀ, and the rank below which only the rounding of the weights is lost."""

    u: Tensor
    s: Tensor
    vt: Tensor
    norm: float
    needed: int

    @classmethod
    def of(cls, before: Tensor, after: Tensor, transposed: bool) -> _Spectrum:
        update = (after.detach().double() - before.detach().double()).float()
        update = update.T if transposed else update
        u, s, vt = torch.linalg.svd(update, full_matrices=False)
        squares = s.double().square()
        tails = squares.flip(0).cumsum(0).flip(0).sqrt()  # ‖ΔW − B A‖ with r = 0, 1, …
        norm = float(tails[0])
        rounding = ROUNDING * torch.finfo(after.dtype).eps * float(after.detach().float().norm())
        allowed = min(max(rounding, EXACT * norm), MOST_LOST * norm)
        needed = int((tails > allowed).sum())
        return cls(u, s, vt, norm, max(1, needed))

    def lost(self, r: int) -> float:
        """‖ΔW − B A‖ / ‖ΔW‖ at rank r."""
        return float(self.s[r:].double().square().sum().sqrt()) / self.norm

    def pair(self, r: int) -> tuple[Tensor, Tensor]:
        """A (r, n) and B (m, r), with rows and columns of zeros beyond the rank."""
        kept = min(r, len(self.s))
        root = self.s[:kept].sqrt()
        a, b = torch.zeros(r, self.vt.shape[1]), torch.zeros(self.u.shape[0], r)
        a[:kept], b[:, :kept] = root.unsqueeze(1) * self.vt[:kept], self.u[:, :kept] * root
        return a, b


@torch.no_grad()
def _fill(model: nn.Module, factors: dict[str, _Spectrum], r: int) -> None:
    for module, spectrum in factors.items():
        layer: Any = model.get_submodule(f"base_model.model.{module}")
        a, b = spectrum.pair(r)
        if "default" in getattr(layer, "lora_embedding_A", {}):
            # An embedding's weight is (tokens, width) and its update (B A)ᵀ.
            layer.lora_embedding_A["default"].copy_(b.T)
            layer.lora_embedding_B["default"].copy_(a.T)
        else:
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)


def _module_parameters(model: nn.Module, module: str) -> Iterator[tuple[str, Tensor]]:
    """Names, with a dot before them, and values of a module's parameters."""
    for name, value in model.get_submodule(module).named_parameters():
        yield f".{name}", value


def _factors(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or _transposed(module)


def _transposed(module: nn.Module) -> bool:
    """Whether a layer stores its matrix as (in, out), as GPT-2 does."""
    return type(module).__name__ == "Conv1D"


def _tied(model: nn.Module) -> bool:
    """Whether the head's weight is that of the embedding."""
    head, embedding = output_embeddings(model), input_embeddings(model)
    return head is not None and embedding is not None and head.weight is embedding.weight


def _task(model: nn.Module, fresh: Collection[str]) -> Any:
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None
