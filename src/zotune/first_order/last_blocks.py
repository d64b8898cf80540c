"""Which parameters of a model are its last: the head's, and those of its last blocks."""

from __future__ import annotations

from torch import nn

from zotune.subspaces.blocks import repeated_layers


def head_of(model: nn.Module) -> nn.Module | None:
    """A model's head: its output embeddings, its classifier, or its last linear layer."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is None:
        head = next((getattr(model, name) for name in ("classifier", "score") if isinstance(getattr(model, name, None), nn.Module)), None)
    if head is None:
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        head = linear[-1] if linear else None
    return head


def last_layer(model: nn.Module) -> list[str]:
    """Names of the parameters of a model's head; empty where it has none that one could name."""
    head = head_of(model)
    own = {id(p) for p in head.parameters()} if head is not None else set()
    return [name for name, p in model.named_parameters() if id(p) in own]


def blocks_of(model: nn.Module) -> list[list[nn.Module]]:
    """The modules of each of a model's repeated layers; without such, every module that has weights to train is a block."""
    layers = repeated_layers(model)
    if layers:
        return [list(layer.modules()) for layer in layers]
    return [[module] for module in model.modules() if any(p is not None and p.requires_grad for p in module._parameters.values())]


def deep_names(model: nn.Module, blocks: int) -> list[str]:
    """Names of the trained parameters that backprop reaches: those of the last blocks, and of a head that shares none with other modules.

    What else lies outside the blocks (embeddings, norms) is not among them, wherever it is used: a norm after the last block is a
    vector, and a parameter read before the last blocks would draw the whole model into the graph.
    """
    found: dict[int, nn.Parameter] = {}
    last = [module for block in blocks_of(model)[-blocks:] for module in block]
    head = head_of(model)
    inside = {id(module) for module in last} | ({id(module) for module in head.modules()} if head is not None else set())
    elsewhere = {id(p) for m in model.modules() if id(m) not in inside for p in m._parameters.values() if p is not None}
    for module in [*last, *(head.modules() if head is not None else ())]:
        found |= {id(p): p for p in module._parameters.values() if p is not None and p.requires_grad and id(p) not in elsewhere}
    return [name for name, p in model.named_parameters() if id(p) in found]


def refusal(model: nn.Module, blocks: int) -> str | None:
    """Why a model cannot be trained so, with the fix; None when it can."""
    there = len(blocks_of(model))
    if blocks >= there:
        return f"the model has {there} blocks, and backprop through its last {blocks} leaves none before them: choose fewer, or fo-adamw"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    deep = set(deep_names(model, blocks))
    if not deep:
        return "nothing is trained in the last blocks, where it would use backprop: choose mezo"
    if deep == trained:
        return "nothing is trained before the last blocks, where it would use forward passes alone: choose fo-adamw"
    return None
