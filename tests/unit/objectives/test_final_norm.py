"""Output gradients behind the final norm: found by its outputs, of every kind of norm, and left out where something else stands there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from zotune import objectives
from zotune.objectives.final_norm import ModuleRows, ScaledRows
from zotune.objectives.output_gradients import recording

WIDTH, ROWS, LENGTH = 16, 5, 6
SIZES = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 30}
OPT = {"hidden_size": WIDTH, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30, "word_embed_proj_dim": 8}
#: Kind of model, its options, and the path of its final norm.
KINDS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "llama": ("LlamaConfig", SIZES, "model.norm"),
    "gemma": ("GemmaConfig", {**SIZES, "head_dim": 8, "num_key_value_heads": 2}, "model.norm"),
    "gpt2": ("GPT2Config", GPT2, "transformer.ln_f"),
    "opt, projected behind its norm": ("OPTConfig", OPT, None),
    "opt": ("OPTConfig", {**OPT, "word_embed_proj_dim": WIDTH}, "model.decoder.final_layer_norm"),
}


def model_of(kind: str) -> Any:
    config = getattr(transformers, KINDS[kind][0])(**KINDS[kind][1], initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                nn.init.uniform_(parameter, 0.4, 2.0)
    return model


def batch_of() -> dict[str, Tensor]:
    ids = torch.randint(3, 30, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    places = torch.tensor([[2, 4]]).repeat(ROWS, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "positions": places, "targets": ids.gather(1, places + 1)}


@pytest.mark.parametrize("most", [None, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_the_states_of_size_one(kind: str, most: int | None) -> None:
    model, batch, states = model_of(kind), batch_of(), []
    path = KINDS[kind][2]
    watched = model.get_output_embeddings() if path is None else model.get_submodule(path)
    loss = objectives.objective("lm", model)
    handle = watched.register_forward_pre_hook(lambda _module, args: states.append(args[0]))
    losses = loss(batch)
    handle.remove()
    (wanted,) = torch.autograd.grad(losses.sum(), states)
    if path is not None:
        wanted = wanted * states[0].detach().square().mean(dim=2, keepdim=True).sqrt()
    wanted = wanted[torch.arange(ROWS).unsqueeze(1), batch["positions"]]
    with torch.no_grad(), recording(most) as recorder:
        loss(batch)
    assert torch.allclose(torch.cat(recorder.gradients), wanted.flatten(0, 1)[:most], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("centered", [False, True])
def test_an_engines_form_is_that_of_the_module(centered: bool) -> None:
    draw = torch.Generator().manual_seed(2)
    norm = nn.LayerNorm(WIDTH, eps=1e-9) if centered else nn.RMSNorm(WIDTH, eps=1e-9)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0, generator=draw)
    rows, gradients = (torch.randn(4, WIDTH, generator=draw) for _ in range(2))
    module = ModuleRows(norm, rows)
    z = norm(rows).detach()
    form = ScaledRows(z, norm.weight.detach(), norm.bias.detach() if centered else None)  # type: ignore[union-attr]
    assert bool(module.gives(3 * z)) and bool(form.gives(z))
    sizes = rows.var(dim=1, unbiased=False).sqrt() if centered else rows.square().mean(dim=1).sqrt()
    scale = rows.square().mean(dim=1).sqrt() / sizes  # a layer norm's u has the variance 1, its module's input the mean square 1
    assert torch.allclose(scale.unsqueeze(1) * form.behind(gradients), module.behind(gradients), rtol=1e-4, atol=1e-5)
    assert not bool(module.gives(z + 0.1)) and not bool(ScaledRows(2 * z, form.weight, form.bias).gives(2 * z))
    assert not bool(ScaledRows(z, torch.zeros(WIDTH)).gives(z))
