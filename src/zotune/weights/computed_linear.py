"""Matrices that an inference engine stores and computes with, trained by low-rank factors that the engine adds.

The module is a place for what the rest of zotune attaches to a layer: a parameter of the matrix's shape without memory, the factors of
what training has added so far, and the hooks of whoever watches the layer's inputs. It computes nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zotune.weights.quantized_linear import QuantizedLinear, own

#: (left (m, r), right (n, r)) of a product that is added to a matrix (m, n); None for nothing.
Product = Callable[[], tuple[Tensor, Tensor] | None]

NO_DECAY = "weight decay shrinks the weights themselves, which an engine only reads: set weight_decay=0."

LOW_RANK_METHODS = "use one that trains low-rank factors (lozo-g, lozo-e, lozo, lozo-m, agzo, subzero)"

ONE_POINT = "an engine evaluates one point at a time: leave forward_batching at 'auto'."

WRITES = f"{{}} writes the weights themselves, and an engine only reads its file: {LOW_RANK_METHODS}."

NO_SCHEME = "an engine trains low-rank factors of its matrices, which become a LoRA adapter: leave --scheme {} out."


class ComputedLinear(QuantizedLinear):
    """y = x Wᵀ + (x R) Lᵀ + (x V) Aᵀ, all of it computed by an engine.

    L and R are ``left`` and ``right`` (see :class:`QuantizedLinear`); A and V are what ``product`` returns at the point that is evaluated.

    Args:
        outputs, inputs: m and n.

    Attributes:
        product: the factors beside L and R; None where no optimizer trains the matrix.
        shrunk: the factor of L R with the decay that the next fold applies; None as for ``product``.
        computed: what the engine computed for the call of the module that follows.
    """

    def __init__(self, outputs: int, inputs: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = inputs, outputs
        self.register_parameter("bias", None)
        self._register_factors(torch.device("cpu"))
        self.weight = nn.Parameter(self._zero_weight(torch.float32, torch.device("cpu")))
        self.product: Product | None = None
        self.shrunk: Callable[[], float] | None = None
        self.computed = torch.empty(0)
        own(self)

    def add(self, left: Tensor, right: Tensor, keep: float, *, anchored: bool = False) -> None:
        if keep != 1.0 and not anchored:
            raise ValueError(NO_DECAY)
        super().add(left, right, keep, anchored=anchored)
        if self.left.shape[1] > min(self.out_features, self.in_features):  # the same sum in fewer columns
            whole = self.left @ self.right.T
            wide = self.in_features > self.out_features
            self.left = torch.eye(self.out_features) if wide else whole
            self.right = whole.T.contiguous() if wide else torch.eye(self.in_features)

    def take(self) -> tuple[Tensor, Tensor]:
        """Remove and return L and R."""
        found = self.left, self.right
        self.left, self.right = self.left[:, :0], self.right[:, :0]
        return found

    def with_factors(self, left: Tensor, right: Tensor) -> Tensor:
        raise ValueError("an engine's weights stay in its file, and the update is an adapter beside them: there is no merged weight.")

    def forward(self, x: Tensor) -> Tensor:
        return self.computed

    @property
    def watched(self) -> tuple[bool, bool]:
        """Whether hooks wait for its inputs, and whether some may change its outputs."""
        return bool(self._forward_pre_hooks), bool(self._forward_hooks)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, columns={self.left.shape[1]}"


def is_computed(model: nn.Module) -> bool:
    """Whether an engine computes some matrices of a model."""
    return any(isinstance(module, ComputedLinear) for module in model.modules())
