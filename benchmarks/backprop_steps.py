"""What a user would pick instead of zeroth order: AdamW with backprop, of all weights or of adapters, with and without checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: name: (LoRA adapters only, gradient checkpointing)
BACKPROP: dict[str, tuple[bool, bool]] = {
    "AdamW": (False, False),
    "AdamW, checkpointing": (False, True),
    "AdamW, LoRA": (True, False),
    "AdamW, LoRA, checkpointing": (True, True),
}


def with_adapters(model: nn.Module) -> nn.Module:
    """LoRA of rank 8 where peft puts it by default: on the query and value projections."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))  # type: ignore[arg-type]


class BackpropStep:
    """A training step of AdamW: forward, backward, update; gradients are freed after each step."""

    def __init__(self, model: nn.Module, adapters: bool, checkpointing: bool, loss: Callable[[nn.Module], Callable[[Any], Tensor]]) -> None:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        if adapters:
            if checkpointing:
                model.enable_input_require_grads()  # type: ignore[operator]
            model = with_adapters(model)
        self.model = model.train()  # checkpointing is off in evaluation mode
        self.loss = loss(self.model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6)

    def step(self, batch: Any) -> None:
        with torch.enable_grad():
            self.loss(batch).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_bytes(self) -> int:
        states = self.optimizer.state.values()
        return sum(t.numel() * t.element_size() for state in states for t in state.values() if isinstance(t, Tensor))
