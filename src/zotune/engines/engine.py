"""What training needs of an inference engine.

An engine holds a model that it only reads. It adds low-rank factors to some of its matrices, evaluates batches of texts, and gives logits
at the positions asked for. :class:`zotune.engines.model.EngineModel` makes a module of it, which the forward, the objectives, the optimizer
and the trainer take as any other: points, journal, resume, replay, calibration and evaluation are the same code as for torch models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

#: (left (m, r), right (n, r)) of the product left · rightᵀ that is added to a matrix (m, n), by its name.
Factors = Mapping[str, tuple[Tensor, Tensor]]

#: (logits (n, vocabulary) float32, numbers of the n completions, place of the new token) -> the next token of each, (n,).
Choose = Callable[[np.ndarray, list[int], int], np.ndarray]

#: (tokens (k,), their values x (k, n), what tells inputs apart).
Piece = tuple[np.ndarray, np.ndarray, object]


@dataclass(frozen=True)
class Row:
    """One text of an evaluation, or one prompt and several continuations of it.

    Attributes:
        ids: token ids, (n,).
        positions: of each token in its text, (n,).
        segments: 0 for a token of the prompt; c > 0 for one of continuation c, which sees the prompt and itself, (n,).
        outputs: places among the tokens whose logits are wanted, ascending, without repetition.
        samples: completions that share the text as their prompt.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    outputs: np.ndarray
    samples: int = 1

    @property
    def sequences(self) -> int:
        """Number of continuations or completions, at least 1."""
        return max(self.samples, int(self.segments.max(initial=0)))


@dataclass
class Watch:
    """What is seen of an evaluation, and changed in it.

    Attributes:
        inputs: names of the matrices whose inputs are wanted.
        tokens: whether the inputs of each token of all rows are wanted, (Σ n,) boolean; None for all.
        change: by name of a matrix: ``change(tokens, output)`` of the tokens (k,), numbered through all rows, and the output (k, m) there;
            what it returns replaces the output, None leaves it.
        head: whether the head's inputs are wanted.
        head_logits: whether its outputs are wanted, too.
        done: called with a matrix's name and its pieces of ``found`` as soon as they are known, in place of ``found``, where the rows are
            evaluated in one piece: so not all inputs are in memory at a time.
        found: by name, pieces of (tokens (k,), x (k, n), key); matrices with the same key have the same input. Empty name: the head.
        logits: the head's own output, before what the model makes of it, in pieces (tokens, (k, vocabulary)).
    """

    inputs: frozenset[str] = frozenset()
    tokens: np.ndarray | None = None
    change: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray | None]] = field(default_factory=dict)
    head: bool = False
    head_logits: bool = False
    done: Callable[[str, Sequence[Piece]], None] | None = None
    found: dict[str, list[Piece]] = field(default_factory=dict)
    logits: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


class Engine(Protocol):
    """An inference engine with a model.

    Attributes:
        name: of the engine, such as ``"llama.cpp"``.
        matrices: shape (m, n) of the matrices that take low-rank factors, by name, as the checkpoint calls the layers.
        vocabulary: number of tokens.
        width: size d of the hidden states.
        context: tokens of the longest text.
        continuations: most continuations of a row.
        exact: whether it computes in float32, without the rounding of quantized weights, activations or caches.
    """

    name: str
    matrices: Mapping[str, tuple[int, int]]
    vocabulary: int
    width: int
    context: int
    continuations: int
    exact: bool

    def set_factors(self, folded: Factors, current: Factors) -> None:
        """Add both products to the matrices, for the evaluations that follow. ``folded`` changes seldom, ``current`` at every point."""
        ...

    def decode(self, rows: Sequence[Row], watch: Watch | None = None) -> np.ndarray:
        """Logits at the outputs of all rows, in their order, (Σ outputs, vocabulary) float32."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: Sequence[int],
        choose: Choose | None = None,
        num_samples: int = 1,
    ) -> list[list[int]]:
        """Completions, each up to and with its first stop token; number p · num_samples + s is sample s of prompt p.

        Args:
            prompts: token ids.
            max_new_tokens: most tokens of a completion.
            stops: tokens that end one.
            choose: picks the next token of each completion that goes on; None: the likeliest.
            num_samples: completions of each prompt.
        """
        ...

    def final_norm(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight g (d,), bias b (d,) of a layer norm or None) of the norm in front of the head, float32; None where there is none."""
        ...

    def head_rows(self, ids: Tensor) -> Tensor:
        """Rows of the head's weight W (vocabulary, d), of shape (*ids.shape, d), float32."""
        ...

    def head_product(self, weights: Tensor) -> Tensor:
        """weights (N, vocabulary) · W, (N, d) float32."""
        ...

    def digest(self) -> str:
        """Of everything that determines what the engine computes of token ids."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...
