"""Which options, methods, schemes and models go together: checks before and after the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from zotune.baselines import Baseline
from zotune.io.suggest import did_you_mean
from zotune.methods import Method
from zotune.subspaces import Full, LowRank
from zotune.tasks.model_kind import has_head
from zotune.training import attributed, baseline_runs, privacy_options, schemes
from zotune.training.arguments import ACCURACY
from zotune.training.evaluation import SPEED
from zotune.training.reward_options import check_no_gradient
from zotune.weights import placement
from zotune.weights.computed_linear import LOW_RANK_METHODS, NO_DECAY, NO_SCHEME, ONE_POINT, WRITES
from zotune.weights.quantized_linear import owner_of

if TYPE_CHECKING:
    from zotune.tasks import PreparedData
    from zotune.training.config import ZOConfig
    from zotune.training.run_config import RunConfig


def check_request(config: RunConfig, method: Method | Baseline) -> None:
    """Sets the default number of demonstrations; ValueError for options that exclude each other."""
    if method.name == "icl":
        if config.data.num_demonstrations is None:
            config.data.num_demonstrations = baseline_runs.DEMONSTRATIONS
    elif config.data.num_demonstrations is not None:
        raise ValueError(f"--num_demonstrations is an option of --method icl, not of {method.name}.")
    if privacy_options.is_private(config.training):
        privacy_options.check_data(config.data)
    if config.data.reward or config.data.objective == ACCURACY:
        check_no_gradient(method)
    if config.data.attribute is not None:
        attributed.check(method, rewards=config.data.generates)
        if config.data.packing:
            raise ValueError("--attribute has shares of rows, and blocks of --packing hold parts of several: leave one of them out.")
    if isinstance(method, Method) and method.subspace.quantized and (config.model.quantize is None or config.scheme.scheme != "full"):
        raise ValueError(
            f"{method.name} trains integers of quantized weights, and nothing else: it needs --quantize int8 or int4, and --scheme full."
        )
    if isinstance(method, Method) and method.subspace.quantized and config.model.offload != "no":
        raise ValueError(f"{method.name} writes quantized weights at each step, so they cannot be offloaded: leave --offload out.")
    if config.scheme.scheme != "scales":
        return
    if config.model.quantize != "int8":
        raise ValueError("--scheme scales trains the scales of int8 layers, one per row: it needs --quantize int8.")
    if config.model.offload != "no":
        raise ValueError("--scheme scales trains scales, which stay in memory with their layers: leave --offload out.")


def check_engine(config: RunConfig, method: Method | Baseline) -> None:
    """ValueError for what cannot be done with a model that an inference engine computes, before it is loaded."""
    training, scheme = config.training, config.scheme.scheme
    if isinstance(method, Baseline):
        reason = {"fit": "reads hidden states, which an engine does not give", "backward": "goes backward, which an engine cannot"}
        if method.kind in reason:
            raise ValueError(f"{method.name} {reason[method.kind]}: {LOW_RANK_METHODS}.")
    elif not isinstance(method.subspace, LowRank):
        raise ValueError(WRITES.format(method.name))
    if scheme != "full":
        raise ValueError(NO_SCHEME.format(scheme))
    if config.data.objective == "classifier":
        raise ValueError("llama.cpp computes language models, and --objective classifier trains a new head: use lm or choices.")
    if training.weight_decay:
        raise ValueError(NO_DECAY)
    if training.forward_batching == "batched":
        raise ValueError(ONE_POINT)


def check_evaluations(training: ZOConfig, data: PreparedData, *, guarded: bool = False) -> None:
    """ValueError where evaluations during training, or their metric, cannot be had of the data."""
    if data.task_file is not None and privacy_options.is_private(training):
        raise ValueError(
            "the classes were read from the labels, which a private run must not publish: write them into a task file for --task."
        )
    if data.dev is None and data.eval is None:
        if guarded:
            raise ValueError("a guard is evaluated beside other data, and there are none: pass --eval_file or --num_dev.")
        asked = [name for name in ("load_best_model_at_end", "eval_on_start") if getattr(training, name)]
        if training.eval_strategy != "no":
            asked.append("eval_strategy")
        if asked:
            raise ValueError(
                f"{asked[0]}={getattr(training, asked[0])!s} needs evaluation data: pass --eval_file or --num_dev, or leave it out."
            )
    metric, known = training.metric_for_best_model, ["loss", *metric_names(data), *SPEED]
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"metric_for_best_model={metric!r} is no metric of these data{did_you_mean(metric, known)}: there are {', '.join(known)}."
        )


def check_kinds(config: RunConfig, data: PreparedData, guarded: PreparedData | None, model_config: Any) -> None:
    """ValueError where data are for another kind of model than others, or do not go together with options of the run."""
    private, kind = privacy_options.is_private(config.training), data.kind
    unnamed = data.task is not None or kind.labels == tuple(f"LABEL_{number}" for number in range(len(kind.labels)))
    if private and kind.has_new_head and not unnamed and not has_head(model_config, kind.name):
        raise ValueError(
            "the names of the labels were read from the rows, which a private run must not publish: give a task file (--task), or a model "
            "whose head has these names (id2label)."
        )
    if guarded is not None and guarded.kind.name != data.kind.name:
        raise ValueError(
            f"the guard's rows are for a model of another kind ({guarded.kind.name}) than the run's ({data.kind.name}): leave it out."
        )
    if data.train_objective != "contrastive":
        return
    together = "an example's loss depends on the others of its batch (in-batch negatives)"
    if private:
        raise ValueError(f"{together}, so that it cannot be clipped: give pairs with scores (sentence1, sentence2, score).")
    if config.data.attribute is not None:
        raise ValueError(f"{together}, so that no example has a share of its own: leave --attribute out.")
    if config.training.per_device_train_batch_size < 2:
        raise ValueError(f"{together}: --per_device_train_batch_size must be 2 or more.")


def metric_names(data: PreparedData) -> Sequence[str]:
    """The metrics of data, beside the loss."""
    return getattr(data.compute_metrics, "names", ()) or getattr(data.compute_metrics, "metrics", ())


def under_scheme(model: nn.Module, config: RunConfig, method: Method | Baseline, fresh: Sequence[str], *, on_adapter: bool) -> nn.Module:
    """The model under its scheme; ``on_adapter``, the loaded adapter is trained. ValueError where scheme, method and model do not match."""
    if on_adapter:
        if config.scheme.scheme in ("head", "bias", "scales") or config.scheme.trainable:
            raise ValueError("the model folder holds an adapter, which is what is trained: leave --scheme and --trainable out.")
    else:
        model = schemes.apply(model, config.scheme, seed=config.training.seed, fresh=fresh)
        if isinstance(method, Method) and method.subspace.quantized:
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.requires_grad and owner_of(parameter) is not None)
    if config.scheme.scheme == "prefix" and config.training.activation_checkpointing:
        raise ValueError("prefix tuning keeps its keys and values where activation checkpointing drops them: leave one of them out.")
    reason = schemes.refusal(method, model, config.scheme) or (refusal(method, model) if config.model.offload != "no" else None)
    if reason is not None:
        raise ValueError(reason)
    return model


def refusal(method: Method | Any, model: nn.Module) -> str | None:
    """Why a method cannot train an offloaded model, in one sentence with the fix; None when it can."""
    if not isinstance(method, Method):
        if getattr(method, "kind", "backward") != "backward":
            return None
        return f"{method.name} goes backward through all weights at once, so they cannot be offloaded: choose a zeroth-order method."
    trained = [p for p in model.parameters() if p.requires_grad and placement.offload_handle(p) is not None]
    if not trained:
        return None
    if any(getattr(placement.offload_handle(p), "lossy", False) for p in trained):
        return "the offloaded weights are quantized, so they cannot be trained: train an adapter (--scheme lora)."
    plain = isinstance(method.subspace, LowRank) or type(method.subspace) is Full
    if not plain or method.svrg is not None or method.estimator == "curvature":
        return (
            f"{method.name} reads weights between evaluations, when they are offloaded: choose a low-rank method such as lozo, mezo, or an "
            "adapter (--scheme lora)."
        )
    return None
