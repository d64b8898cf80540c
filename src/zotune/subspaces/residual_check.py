"""Which layers write to the residual stream: a small change of their output arrives at the head's input as it is, up to one factor.

Output y_l of layer l becomes y_l + e_l at the scored positions of a few examples, e_l random, of all layers at a time. With Δh the
change of the head's input,

    g_l = Σ ⟨Δh, e_l⟩ / Σ ‖e_l‖²  →  tr(∂h/∂y_l) / d.

All layers that add to one stream have about the same g, that of the last norm. An output that something else reads (a query of
cross-attention) has about none; behind a norm of its own (sandwich norms, norms after the sum) it has another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zotune.objectives.output_gradients import OutputGradientRecorder, recording
from zotune.rng.directions import Directions, Key
from zotune.rng.isolation import isolated_generators
from zotune.subspaces.base import Losses

#: Size of a change, in units of the median layer's output; for weights in half precision.
SIZE, SIZE_HALF = 0.05, 0.3
#: Rows that are evaluated, however they are cut into micro-batches: as many as a step of the default batch has.
ROWS = 16
#: Pairs of evaluations: so many that sampling moves g by this fraction or less; at most.
NOISE, MAX_PAIRS = 0.1, 4
#: g of a layer that writes to the stream, as a multiple of the median of all: at least, at most. Layers of pre-norm decoders have 0.8 to
#: 1.3, queries of cross-attention up to 0.5 in size.
LEAST, MOST = 0.5, 2.0
#: At most, of a masked language model or a classifier. With norms after the sum (BERT) g falls with every norm on the way to the head: the
#: last layer, whose gradient is the most exact, has up to 3.2 in MiniLM.
MOST_ENCODER = 4.0
#: The part of the layers that has to agree; else there is no stream that all write to.
AGREEING = 2 / 3
#: Where they do not, in an encoder: g of a layer that still reaches the head, as a part of the largest. With norms after the sum those of
#: the last blocks do (0.9 to 0.3 of a classifier on MiniLM), and what the first blocks write is normed away (0.05 and less).
NEAR_HEAD = 0.25
#: Relative change of a factor of the loss (see ``objectives.returned_losses``) beyond which it depends on the model.
FACTOR_CHANGE = 1e-5


class Verdict(NamedTuple):
    """Names of the layers that do not write to the residual stream, and whether the loss's factors are constants."""

    rejected: list[str]
    constant_factors: bool


def verify(layers: Mapping[nn.Module, str], losses: Losses, max_positions: int, seed: int, step: int, *, encoder: bool = False) -> Verdict:
    """Check layers, by name, on the first rows of ``losses``: one evaluation, and two or more with changed outputs.

    ``encoder``: of a masked language model or a classifier, which may have norms after its sums.
    """
    most = MOST_ENCODER if encoder else MOST
    found, factors = gains(layers, losses, max_positions, seed, step)
    middle = float(torch.tensor(list(found.values())).median()) if found else math.nan
    rejected = [name for name, gain in found.items() if not (middle > 0 and LEAST * middle < gain < most * middle)]
    if len(found) - len(rejected) < AGREEING * len(found):
        reaching = NEAR_HEAD * max(found.values()) if encoder else math.inf
        rejected = [name for name, gain in found.items() if not 0 < reaching <= gain]
    constant = all(bool(((one - factors[0]).abs() <= FACTOR_CHANGE * factors[0].abs()).all()) for one in factors[1:])
    return Verdict(rejected, constant)


def gains(
    layers: Mapping[nn.Module, str], losses: Losses, max_positions: int, seed: int, step: int
) -> tuple[dict[str, float], list[Tensor]]:
    """(g of every layer, factors of the loss in every evaluation)."""
    changes = _Changes(layers, seed, step)
    base = changes.evaluate(losses, max_positions, 0.0, 0)
    factors = [torch.cat(base.factors)]
    hidden = torch.cat(base.hidden) if base.hidden else torch.zeros(0, 1)
    if not hidden.numel() or not changes.sizes:
        return dict.fromkeys(layers.values(), 0.0), factors
    half = any(p.dtype.itemsize < 4 for layer in layers for p in layer.parameters(recurse=False) if p.is_floating_point())
    middle = float(torch.stack(list(changes.sizes.values())).median())
    changes.size = (SIZE_HALF if half else SIZE) * (middle or float(hidden.square().mean().sqrt()))
    pairs = min(MAX_PAIRS, math.ceil(len(layers) / (NOISE**2 * hidden.numel())))
    found = dict.fromkeys(layers.values(), 0.0)
    for pair in range(pairs):
        up, down = (changes.evaluate(losses, max_positions, sign, pair) for sign in (1.0, -1.0))
        factors += [torch.cat(up.factors), torch.cat(down.factors)]
        moved = (torch.cat(up.hidden) - torch.cat(down.hidden)) / 2
        for name in found:
            change = changes.of(name, pair, hidden.shape, hidden.device)
            if name in changes.sizes and moved.shape == change.shape:
                found[name] += float((moved * change).sum() / change.square().sum()) / pairs
    return found, factors


class _Changes:
    """Evaluates the losses with changed outputs of layers."""

    def __init__(self, layers: Mapping[nn.Module, str], seed: int, step: int) -> None:
        self.layers, self.seed, self.step = layers, seed, step
        self.size = 0.0
        self._squares: dict[str, tuple[Tensor | float, int]] = {}  # sum of squares of the outputs and their number, by layer
        self.directions = Directions("gaussian")

    @property
    def sizes(self) -> dict[str, Tensor]:
        """Root mean square of the outputs, by layer."""
        return {name: (torch.as_tensor(total) / count).sqrt() for name, (total, count) in self._squares.items() if count}

    def of(self, name: str, pair: int, shape: torch.Size, device: torch.device) -> Tensor:
        """e of a layer in a pair of evaluations."""
        return self.size * self.directions.draw(Key(self.seed, self.step, pair, name, "residual"), tuple(shape), device)

    def evaluate(self, losses: Losses, max_positions: int, sign: float, pair: int) -> OutputGradientRecorder:
        devices = sorted({p.device for layer in self.layers for p in layer.parameters(recurse=False)}, key=str)
        with recording(max_positions, ROWS) as recorder:
            recorder.keeps_hidden = True

            def change(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
                if not isinstance(output, Tensor):
                    return None
                name, places = self.layers[layer], recorder.scored_places(output)
                if recorder.scored is None and sign:  # another forward of the loss function, whose result may be a factor
                    everywhere = self.of(name, MAX_PAIRS + pair, output.shape[-1:], output.device)
                    return output + (sign * everywhere).to(output.dtype)
                if places is None:
                    return None
                changed = output.clone()
                rows = changed.view(-1, changed.shape[-1])
                if not sign:
                    total, count = self._squares.get(name, (0.0, 0))
                    self._squares[name] = total + rows[places].float().square().sum(), count + rows[places].numel()
                    return None
                first = recorder.num_positions  # of earlier micro-batches
                change = self.of(name, pair, torch.Size((first + len(places), rows.shape[1])), output.device)[first:]
                rows[places] += (sign * change).to(output.dtype)
                return changed

            handles = [layer.register_forward_hook(change) for layer in self.layers]
            try:
                calls = losses()
                with isolated_generators(Key(self.seed, self.step, 0, "", "residual"), devices):
                    while not recorder.full:
                        with recorder.following():
                            returned = next(calls, None)
                            if returned is None:
                                break
                            recorder.end_call(returned)
            finally:
                for handle in handles:
                    handle.remove()
        return recorder
