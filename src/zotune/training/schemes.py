"""Schemes: which parameters of a model are trained. All, an adapter's, the head's, the biases, or those whose names match a pattern.

Adapters are PEFT's, with another initialization of two: a prefix starts from the model's keys and values of real tokens (MeZO, 2305.17333),
a soft prompt from embeddings of real tokens (2104.08691).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from zotune.io import patterns
from zotune.tasks.media import media_kind
from zotune.training.adapters import WEIGHTS, check_fit, fresh_layers
from zotune.training.arguments import option
from zotune.training.bounds import check_adapter
from zotune.weights.computed_linear import NO_SCHEME, is_computed
from zotune.weights.external_linear import external_layers
from zotune.weights.structure import classifier_of, masked_head, module_mode, output_embeddings
from zotune.weights.trainable_scales import quantize

if TYPE_CHECKING:
    from zotune.methods import Method

SCHEMES = ("full", "lora", "prefix", "prompt", "head", "bias", "scales")
#: The schemes that put a PEFT adapter on the model.
ADAPTERS = ("lora", "prefix", "prompt")
# PEFT's word for every Linear and Conv1D layer but the output layer; as a name among others it means nothing to PEFT.
_ALL_LINEAR = "all-linear"
#: Names of queries and values, which get an adapter where PEFT knows no layers of a kind of model.
_QUERIES_AND_VALUES = (("q_proj", "v_proj"), ("query", "value"))

# A matrix that every subspace method trains in its subspace.
_LARGE = (1 << 20, 1 << 20)


@dataclass
class Scheme:
    """Which parameters are trained; the help texts describe the fields, those of adapters are as in ``peft``.

    Raises:
        ValueError: an invalid value, or an option of another scheme.
    """

    scheme: Literal["full", "lora", "prefix", "prompt", "head", "bias", "scales"] = option(
        "full",
        "what is trained: all weights; an adapter: lora, prefix (keys and values before the text) or prompt (embeddings before it); the "
        "head; the biases; the scales of int8 layers",
    )
    lora_r: int = option(8, "rank of the adapter")
    lora_alpha: float = option(16.0, "scale of the adapter: alpha / r")
    lora_dropout: float = option(0.0, "dropout before the adapter; acts in first-order training only")
    lora_target_modules: list[str] | None = option(
        None,
        "names of the layers that get an adapter, or all-linear: all but the output layer; when not given peft's choice, else queries and "
        "values",
    )
    num_virtual_tokens: int = option(5, "length of a prefix or soft prompt, in tokens")
    trainable: list[str] | None = option(
        None, r"with full: train only parameters whose name matches one of these regular expressions, such as 'layers\.(2[0-3])\.'"
    )

    def __post_init__(self) -> None:
        if isinstance(self.trainable, str):
            self.trainable = [self.trainable]
        if self.scheme not in SCHEMES:
            raise ValueError(f"unknown scheme {self.scheme!r}: choose one of {', '.join(SCHEMES)}.")
        if self.lora_r < 1:
            raise ValueError(f"--lora_r must be at least 1, not {self.lora_r}.")
        if not self.lora_alpha > 0:
            raise ValueError(f"--lora_alpha must be above 0, not {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must be in [0, 1), not {self.lora_dropout}.")
        if self.num_virtual_tokens < 1:
            raise ValueError(f"--num_virtual_tokens must be at least 1, not {self.num_virtual_tokens}.")
        if self.trainable is not None:
            patterns.check(self.trainable, "--trainable")
        self._refuse_idle_options()

    def _refuse_idle_options(self) -> None:
        """An option of another scheme would do nothing."""
        owners = {
            name: ("lora",) if name.startswith("lora_") else ("prefix", "prompt") if name == "num_virtual_tokens" else ("full",)
            for name in (each.name for each in dataclasses.fields(self))
            if name != "scheme"
        }
        for each in dataclasses.fields(self):
            if each.name in owners and getattr(self, each.name) != each.default and self.scheme not in owners[each.name]:
                raise ValueError(f"--{each.name} is an option of --scheme {' or '.join(owners[each.name])}, not of {self.scheme}.")


def apply(model: nn.Module, scheme: Scheme | str = "full", *, seed: int = 0, fresh: Collection[str] = (), **options: Any) -> nn.Module:
    """Makes the parameters of a scheme trainable, in place, and freezes all others; for an adapter, wraps the model as a PEFT model.

    Args:
        model: a ``transformers`` model, or any module for ``"full"``, ``"bias"`` and ``"scales"``. ``"head"`` unties the head from the
            embeddings; ``"scales"`` quantizes the Linear layers (QZO, 2505.13430; :mod:`zotune.weights.trainable_scales`).
        scheme: a :class:`Scheme`, or its name.
        seed: of an adapter's initialization; the global generators are left untouched.
        fresh: names of the parameters that the model's files lack (``missing_keys``), which were drawn at random: ``"lora"`` trains their
            layers and saves them with the adapter.
        options: with a name, fields of :class:`Scheme`.

    Raises:
        ValueError: an unknown scheme or option, or a model without parameters for the scheme.

    Example:
        >>> model = apply(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), "bias")
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.bias', '1.bias']
    """
    if isinstance(scheme, str):
        known = [each.name for each in dataclasses.fields(Scheme) if each.name != "scheme"]
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r} of a scheme: there are {', '.join(known)}.")
        scheme = Scheme(scheme, **options)  # type: ignore[arg-type]
    elif options:
        raise ValueError("options go into the Scheme, or beside the name of one.")
    if is_computed(model) and scheme.scheme != "full":
        raise ValueError(NO_SCHEME.format(scheme.scheme))
    if scheme.scheme in ADAPTERS:
        device = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        with torch.random.fork_rng(devices=device):
            torch.manual_seed(seed)
            return _adapted(model, scheme, fresh)
    if scheme.scheme == "head":
        return _only(model, set(_head_names(model)))
    if scheme.scheme == "scales":
        return quantize(model)
    names = [name for name, _ in model.named_parameters()]
    if scheme.scheme == "bias":
        chosen = {name for name in names if name.rpartition(".")[2].endswith("bias")}
        if not chosen:
            raise ValueError("this model has no bias, so --scheme bias would train nothing: choose another scheme.")
        return _only(model, chosen)
    if scheme.trainable is None:
        return _only(model, set(names))
    chosen = set(patterns.matching(scheme.trainable, names, "--trainable"))
    if not chosen:
        examples = names[len(names) // 2 :][:3]
        raise ValueError(f"--trainable {' '.join(scheme.trainable)} matches no parameter; names are such as {', '.join(examples)}.")
    return _only(model, chosen)


def refusal(method: Method | Any, model: nn.Module, scheme: Scheme) -> str | None:
    """Why a method cannot train what a scheme trains, in one sentence with the fix; None when it can.

    Args:
        method: a zeroth-order method or a baseline.
        model: from :func:`apply` with ``scheme``.
        scheme: of the model.
    """
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    where = f"--scheme {scheme.scheme}" + (" with --trainable" if scheme.trainable else "")
    if scheme.scheme == "full" and external_layers(model):
        return (
            "another library has quantized the model's weights, which are read-only: train an adapter on them (--scheme lora), or "
            "in Python factors beside them (zotune.weights.external_linear.wrap and a low-rank method)."
        )
    if hasattr(method, "refusal"):
        reason = method.refusal(model, trained)
        return None if reason is None else f"{method.name} makes no sense with {where}: {reason}."
    if scheme.lora_dropout:
        return f"lora_dropout acts in training mode, and the forwards of {method.name} run in evaluation mode: leave it at 0."

    def in_full(shape: tuple[int, ...]) -> bool:
        return method.subspace.elements(shape) == (_numel(shape), 0)

    if not in_full(_LARGE) and all(map(in_full, trained.values())):
        matrices = [shape for shape in trained.values() if len(shape) == 2]
        what = f"none of the matrices it trains is larger than that ({max(matrices, key=min)})" if matrices else "it trains vectors only"
        return (
            f"{method.name} trains matrices in a smaller subspace, and with {where} {what}: choose a method in full space, such as mezo"
            + (", or a smaller --rank." if matrices else ".")
        )
    return None


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _only(model: nn.Module, chosen: set[str]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen and parameter.is_floating_point() and not getattr(parameter, "unread", False))
    return model


# -- the head -----------------------------------------------------------------------------------------------------------------------


def _head_names(model: nn.Module) -> list[str]:
    """Names of the head's parameters; a head tied to the embeddings is untied first."""
    classifier = classifier_of(model)
    if classifier is not None:
        return [key for key, _ in model.named_parameters() if key.startswith(f"{classifier[0]}.")]
    head = output_embeddings(model)
    if head is None or not hasattr(head, "weight"):
        raise ValueError("this model has no head that could be trained alone: choose another scheme, or name it with --trainable.")
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    if head is embeddings:
        raise ValueError("this model's head is its embedding layer itself, so it cannot be trained alone: choose another scheme.")
    unused: nn.Parameter | None = None
    if head.weight is getattr(embeddings, "weight", None):
        head.weight = nn.Parameter(head.weight.detach().clone())
        unused = _untie_bias(model, head)
        config: Any = model.config
        for each in (config, config.get_text_config() if hasattr(config, "get_text_config") else config):
            each.tie_word_embeddings = False
        if hasattr(model, "all_tied_weights_keys"):
            model.all_tied_weights_keys = {}  # type: ignore[assignment]
    behind = masked_head(model)
    if behind:
        return [name for name in behind if model.get_parameter(name) is not unused]
    own = {id(parameter) for parameter in head.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]


def _untie_bias(model: nn.Module, head: Any) -> nn.Parameter | None:
    """Gives the head a bias of its own; the one that it shared, which nothing reads any more (masked language models), if it did."""
    bias = head._parameters.get("bias")
    if bias is None or not any(p is bias for m in model.modules() if m is not head for p in m._parameters.values()):
        return None
    head.bias = nn.Parameter(bias.detach().clone())
    return bias


# -- adapters -----------------------------------------------------------------------------------------------------------------------


def _adapted(model: nn.Module, scheme: Scheme, fresh: Collection[str]) -> nn.Module:
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

    classifier, kind = classifier_of(model) is not None, type(model).__name__
    generates = not classifier and hasattr(model, "prepare_inputs_for_generation")
    config = getattr(model, "config", None)
    both = bool(getattr(config, "is_encoder_decoder", False))
    causal = generates and not both and not hasattr(config, "vision_config")
    of_texts = media_kind(config) is None  # PEFT's wrapper of a classifier gives the model input_ids
    task = TaskType.TOKEN_CLS if kind.endswith("ForTokenClassification") else TaskType.SEQ_CLS if classifier and of_texts else None
    if generates:
        task = TaskType.SEQ_2_SEQ_LM if both else TaskType.CAUSAL_LM
    elif task is None and not kind.endswith(("ForMaskedLM", "ForPreTraining")) and config is not None:
        task = TaskType.FEATURE_EXTRACTION if "For" not in kind else None
    if scheme.scheme == "lora":
        config = LoraConfig(
            r=scheme.lora_r,
            lora_alpha=scheme.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=scheme.lora_dropout,
            target_modules=_targets(model, scheme.lora_target_modules),
            modules_to_save=fresh_layers(model, fresh, head=not of_texts) or None,
            task_type=task,
        )
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            told = " ".join(str(error).split()).rstrip(".")
            raise ValueError(f"--scheme lora: {told}. Name layers with --lora_target_modules.") from error
    if classifier:
        raise ValueError(
            f"--scheme {scheme.scheme} is for causal language models: tokens before a classifier's text shift the token that it reads. "
            "Choose lora, head or full."
        )
    if not causal:
        raise ValueError(
            f"--scheme {scheme.scheme} is for causal language models, and this is a {type(model).__name__}: choose lora or full."
        )
    tokens = real_tokens(model, scheme.num_virtual_tokens)
    if scheme.scheme == "prompt":
        adapted = get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=scheme.num_virtual_tokens))
        start = model.get_input_embeddings().weight.detach()[tokens[0]]  # type: ignore[operator]
    else:
        layers = real_activations(model, tokens)
        shapes = {tuple(part.shape) for layer in layers for part in layer}
        if len(shapes) != 1:
            raise ValueError("--scheme prefix: the keys of this model's layers differ in shape: choose lora or prompt.")
        heads, _, width = next(iter(shapes))
        config = PrefixTuningConfig(
            task_type=task,
            num_virtual_tokens=scheme.num_virtual_tokens,
            num_layers=len(layers),
            num_attention_heads=heads,
            token_dim=heads * width,
            num_transformer_submodules=1,
        )
        adapted = get_peft_model(model, config)
        # PEFT reads a row of its table as key, value of layer 0, key, value of layer 1, ...
        start = torch.cat([part.transpose(0, 1).flatten(1) for layer in layers for part in layer], dim=1)
    table = adapted.prompt_encoder[adapted.active_adapter].embedding.weight
    with torch.no_grad():
        table.copy_(start)
    return adapted


def _targets(model: nn.Module, given: list[str] | None) -> list[str] | str | None:
    """The layers with LoRA in PEFT's words: those given, else None where it knows the model's kind, else queries and values by name."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    if given is not None:
        return _ALL_LINEAR if given == [_ALL_LINEAR] else given
    if getattr(getattr(model, "config", None), "model_type", None) in KNOWN:
        return None
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return next((list(pair) for pair in _QUERIES_AND_VALUES if names.issuperset(pair)), None)


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """The model with a saved adapter, trainable; ValueError where its weights are not in safetensors, or are not those of the model."""
    from peft import PeftConfig, PeftModel

    if not (Path(folder) / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: adapters are loaded from safetensors only.")
    check_adapter(model, Path(folder), Path(folder) / WEIGHTS)
    for_text = PeftConfig.from_pretrained(str(folder)).is_prompt_learning
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
        try:
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=not for_text)  # PEFT loads prompts for inference only
        except KeyError as error:
            raise ValueError(f"{Path(folder) / WEIGHTS} does not fit the model: it lacks {error.args[0]}.") from error
    if for_text:
        adapted.active_peft_config.inference_mode = False
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_("prompt_encoder" in name)
    check_fit(adapted, Path(folder))
    return adapted


def real_tokens(model: nn.Module, count: int) -> Tensor:
    """Uniform random tokens of the vocabulary without the special ones, (1, count)."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special = {getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    special = {token for each in special for token in (each if isinstance(each, list) else [each])}
    ordinary = torch.tensor([token for token in range(text.vocab_size) if token not in special])
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    return ordinary[torch.randint(len(ordinary), (1, count))].to(device)


@torch.no_grad()
def real_activations(model: nn.Module, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values of ``tokens``, int64 (1, n), each (heads, n, head width); ValueError for a model without a cache."""
    with module_mode(model, training=False):
        cache = getattr(model(input_ids=tokens, use_cache=True), "past_key_values", None)
    layers = [(layer.keys[0], layer.values[0]) for layer in getattr(cache, "layers", []) if getattr(layer, "keys", None) is not None]
    if not layers:
        raise ValueError("--scheme prefix: this model has no cache of keys and values: choose lora or prompt.")
    return layers
