"""What a private run cannot do: everything that reads training data beside the clipped coefficients, each with the reason."""

from __future__ import annotations

from zotune.methods import AUTO, Method
from zotune.methods.coefficients import FITNESS, ConservativeStep, Shaping
from zotune.methods.history import CoefficientHistory
from zotune.methods.kernel import Kernel
from zotune.methods.layer_projection import LayerProjection
from zotune.methods.output_window import OutputWindow
from zotune.methods.selection import Selection
from zotune.methods.svrg import SVRGSchedule
from zotune.subspaces import Guided, LowRank, Subspace
from zotune.subspaces.blockwise import Blocks

#: Estimators that make an example's coefficients of that example's losses alone, and release nothing else.
ESTIMATORS = ("central", "forward", "leave-one-out", "tangent")
#: Transforms that read released coefficients only.
AFTERWARDS = (Shaping, CoefficientHistory, Kernel)
_TAKE = "take lozo or mezo"

#: Why a transform reads the data; by its class.
_TRANSFORMS: dict[type, str] = {
    SVRGSchedule: "evaluates many examples at its snapshot",
    Selection: "chooses a direction by the losses of its candidates",
    ConservativeStep: "chooses a step by the losses behind it",
    LayerProjection: "searches for how far layers are moved by their losses",
    OutputWindow: "records what the examples' outputs are",
}


def refusal(method: Method) -> str | None:
    """Why a method's steps would not be private, in one sentence with the fix; None: they are."""
    subspace, name = method.subspace, method.name
    while isinstance(subspace, Blocks):
        subspace = subspace.inner
    if isinstance(subspace, Guided):
        return f"{name} takes steps along output gradients, which are not clipped and get no noise: {_TAKE}."
    if type(subspace).observe is not Subspace.observe:
        return f"{name} chooses its subspace by training examples, which would be released without noise: {_TAKE}."
    if isinstance(subspace, LowRank) and subspace.layer_scales:
        return f"{name} measures scales of layers on training examples, which would be released without noise: {_TAKE}."
    if method.own:
        return (
            f"with directions_per={method.directions_per!r} the number of coefficients tells how many examples a step has drawn: set "
            "directions_per to 'batch'."
        )
    if method.estimator not in ESTIMATORS:
        return f"the estimator {method.estimator!r} releases curvatures beside the coefficients, without noise: {_TAKE}."
    if FITNESS[method.fitness] is not None:
        return f"fitness={method.fitness!r} compares points by all examples together, where none's part can be clipped: set it to 'loss'."
    for transform in method.transforms:
        reason = next((reason for kind, reason in _TRANSFORMS.items() if isinstance(transform, kind)), None)
        if reason is not None:
            return f"{name} {reason}, which would be released without noise: {_TAKE}."
        if not isinstance(transform, AFTERWARDS):
            return f"{name} transforms coefficients in a way that is not known to read released ones only: {_TAKE}."
    if method.eps == AUTO:
        return "eps='auto' is measured on training examples, without noise: give a number, such as 1e-3."
    return None


MEASURED_RATE = "the learning rate 'auto' is measured on training examples, without noise: give a number."
SEVERAL = "a private run has one process: noise and samples have one key. Start it without torchrun or accelerate launch."
NO_BATCH = "a private step needs a batch of the sampled examples: step(loss_fn, batch), with optimizer.sample() for their numbers."
