"""The structure of a model, found from its modules: its head, its repeated blocks, and the layers that write to the residual stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from zotune.weights.layouts import layout_of

T = TypeVar("T")

#: Names that Hugging Face's models give to the head of a classifier.
CLASSIFIERS = ("classifier", "score", "classification_head")


def every_module(model: nn.Module) -> list[nn.Module]:
    """``model.modules()``, each once, in any order, without its nested generators, which are slow."""
    found = {id(model): model}
    waiting = [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


@contextmanager
def module_mode(model: nn.Module, training: bool | None = None) -> Iterator[None]:
    """All modules in training mode (True), in evaluation mode (False), or as they are (None); afterwards each has its earlier flag."""
    flags = [(module, module.training) for module in every_module(model)]
    if training is not None:
        _set_flags([(module, training) for module, _ in flags])
    try:
        yield
    finally:
        _set_flags(flags)


def _set_flags(flags: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, flag in flags:
        if module.training is not flag:  # setting an attribute of a module is slow
            module.training = flag


def matching_children(model: nn.Module, matches: Callable[[str, nn.Module], bool]) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name, child) of the submodules for which ``matches(name, child)``; the name is that within the parent."""
    return [(parent, name, child) for parent in model.modules() for name, child in parent.named_children() if matches(name, child)]


def unshared_linears(model: nn.Module, types: tuple[type, ...], skip: Collection[str]) -> list[tuple[nn.Module, str, Any]]:
    """Of :func:`matching_children` those of exactly these types, not named in ``skip``, whose weight no other module has."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return matching_children(model, lambda name, child: type(child) in types and name not in skip and owners[id(child.weight)] == 1)


def linear_of(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """An ordinary Linear layer of these parameters."""
    linear = nn.Linear(1, 1, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear


def replace_children(found: Iterable[tuple[nn.Module, str, Any]], make: Callable[[Any], nn.Module]) -> None:
    """Replaces each of :func:`matching_children` by ``make(child)``, in the training mode of the child."""
    for parent, name, child in found:
        layer = make(child)
        layer.train(child.training)
        setattr(parent, name, layer)


def trained_layers(model: nn.Module, by_weight: Mapping[int, T]) -> dict[nn.Module, T]:
    """The matrix layers whose weight is in ``by_weight``, a mapping from ids of parameters, with its values."""
    return {m: by_weight[id(m.weight)] for m in model.modules() if id(m._parameters.get("weight")) in by_weight and layout_of(m)}


# -- the head -----------------------------------------------------------------------------------------------------------------------


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The layer that ``get_output_embeddings`` returns, if any."""
    return _embeddings(model, "output")


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The layer that ``get_input_embeddings`` returns, if any."""
    return _embeddings(model, "input")


def _embeddings(model: nn.Module, which: str) -> nn.Module | None:
    get = getattr(model, f"get_{which}_embeddings", None)
    try:
        found = get() if get is not None else None
    except NotImplementedError:  # transformers' models without a head, or without tokens
        found = None
    return found if isinstance(found, nn.Module) else None


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` wraps, else the model itself."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def refuse_compiled(model: nn.Module) -> None:
    """ValueError where a module is compiled: its graph would not see that weights are perturbed."""
    for name, module in model.named_modules():
        if uncompiled(module) is not module or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{f'the module {name!r}' if name else 'the model'} is compiled, and zotune attaches to the model's own modules: pass the "
                "model without torch.compile, to the optimizer and in the loss."
            )


def text_config(config: Any) -> Any:
    """The part of a model's configuration that is about text; the configuration itself where it has no parts."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def head_of(model: nn.Module) -> nn.Module | None:
    """The layer that maps the last hidden states of a language model to logits; None where it is unknown.

    A head that is the input embedding itself is called with token ids, so it is not one.
    """
    head = output_embeddings(model)
    return None if isinstance(head, nn.Embedding) else head


def transforms_states(model: nn.Module) -> bool:
    """Whether layers stand between the last hidden states and the head, as in transformers' masked language models."""
    return type(_unwrapped(model)).__name__.endswith(("ForMaskedLM", "ForPreTraining"))


def body_of(model: nn.Module) -> nn.Module | None:
    """The module that gives a masked language model's last hidden states, before the layers of its head; None for others."""
    inner = _unwrapped(model)
    body = getattr(inner, getattr(inner, "base_model_prefix", "") or "-", None)
    return body if isinstance(body, nn.Module) and transforms_states(model) else None


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The decoder of an encoder–decoder model, whose states the head reads; None for others."""
    inner = _unwrapped(model)
    both = bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False)) and hasattr(inner, "get_decoder")
    found = inner.get_decoder() if both else None  # type: ignore[operator]
    return found if isinstance(found, nn.Module) and found is not inner else None


def masked_head(model: nn.Module) -> list[str]:
    """Names of the parameters of a masked language model behind its last hidden states: transform, biases and decoder; empty for others."""
    inner = _unwrapped(model)
    prefix = getattr(inner, "base_model_prefix", "")
    if inner is not model or not prefix or not transforms_states(model):
        return []
    return [name for name, _ in model.named_parameters() if not name.startswith(f"{prefix}.")]


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers within adapters and compilation."""
    model = uncompiled(model)
    inner = getattr(model, "get_base_model", lambda: model)()
    return inner if isinstance(inner, nn.Module) else model


def classifier_of(model: nn.Module) -> tuple[str, nn.Module] | None:
    """(name, module) of the head of a sequence or token classifier."""
    return next(((name, m) for name in CLASSIFIERS if isinstance(m := getattr(model, name, None), nn.Module)), None)


def last_module(model: nn.Module) -> nn.Module | None:
    """The module that computes a model's outputs: its output embeddings, its classifier, or its last Linear layer."""
    head = output_embeddings(model)
    if head is not None:
        return head
    classifier = classifier_of(model)
    if classifier is not None:
        return classifier[1]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


def last_layer(model: nn.Module) -> list[str]:
    """Names of the parameters of :func:`last_module`; empty where there is none."""
    head = last_module(model)
    own = {id(p) for p in head.parameters()} if head is not None else set()
    return [name for name, p in model.named_parameters() if id(p) in own]


# -- repeated blocks ----------------------------------------------------------------------------------------------------------------


def are_alike(modules: nn.Module) -> bool:
    """Whether the children of a list of modules are of one class."""
    return len({type(child) for child in modules.children()}) == 1


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The children of the list (ModuleList or Sequential) of two or more modules of one class that holds most trained parameters.

    Empty if no such list has any.
    """
    found: list[nn.Module] = []
    most = 0
    for module in model.modules():
        children = list(module.children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        if len(children) < 2 or not are_alike(module):
            continue
        trained = sum(p.numel() for child in children for p in child.parameters() if p.requires_grad)
        if trained > most:
            found, most = children, trained
    return found


def outermost_lists(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """(name, list) of the module lists outside any other list, trained or not."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            yield prefix + name, child
        else:
            yield from outermost_lists(child, f"{prefix}{name}.")


def longest_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """(name, list) of the longest of the outermost lists of two or more modules of one class; several if they are of one length."""
    alike = [(name, modules) for name, modules in outermost_lists(model) if len(modules) > 1 and are_alike(modules)]
    longest = max((len(modules) for _, modules in alike), default=0)
    return [(name, modules) for name, modules in alike if len(modules) == longest]


def last_block(model: nn.Module) -> nn.Module | None:
    """The last of a model's repeated blocks, of a decoder's behind an encoder; None without such."""
    lists = longest_lists(model)
    return lists[-1][1][-1] if lists else None


def blocks_of(model: nn.Module) -> list[list[nn.Module]]:
    """The modules of each of a model's repeated layers; without such, every module with trained weights is a block."""
    layers = repeated_layers(model)
    if layers:
        return [list(layer.modules()) for layer in layers]
    return [[module] for module in model.modules() if any(p is not None and p.requires_grad for p in module._parameters.values())]


def last_blocks(model: nn.Module, blocks: int) -> list[str]:
    """Names of the trained parameters of the last blocks, and of a head that shares none with other modules.

    Other parameters outside the blocks (embeddings, norms) are left out: a norm after the last block is only a vector, and a parameter read
    before the last blocks would make backpropagation pass through the whole model.
    """
    found: dict[int, nn.Parameter] = {}
    last = [module for block in blocks_of(model)[-blocks:] for module in block]
    head = last_module(model)
    inside = {id(module) for module in last} | ({id(module) for module in head.modules()} if head is not None else set())
    elsewhere = {id(p) for m in model.modules() if id(m) not in inside for p in m._parameters.values() if p is not None}
    for module in [*last, *(head.modules() if head is not None else ())]:
        found |= {id(p): p for p in module._parameters.values() if p is not None and p.requires_grad and id(p) not in elsewhere}
    return [name for name, p in model.named_parameters() if id(p) in found]
