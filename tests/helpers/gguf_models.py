"""Small random decoders as torch models and, with the same weights, as GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from zotune.engines.gguf.file import GGUFFile, to_file_rows
from zotune.engines.llama_cpp.llama import LlamaCpp, LlamaOptions
from zotune.engines.model import EngineModel

VOCABULARY, WIDTH, HIDDEN, HEADS, KV_HEADS, CONTEXT = 96, 64, 96, 4, 2, 320

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Pair:
    """A torch model and a GGUF file with the same weights."""

    torch: PreTrainedModel
    path: Path

    def fresh(self) -> PreTrainedModel:
        """A copy of the torch model, of which the matrices that an engine trains are trained."""
        copy = type(self.torch)(self.torch.config).eval()
        copy.load_state_dict(self.torch.state_dict())
        for name, parameter in copy.named_parameters():
            parameter.requires_grad_("layers" in name and parameter.dim() == 2)
        return copy

    def engine(self, **options: int | str) -> EngineModel:
        """The file in llama.cpp."""
        return EngineModel(LlamaCpp(GGUFFile(self.path), LlamaOptions(**{"n_threads": 1, **options})))


def random_decoder(kind: str = "llama", seed: int = 0, *, tied: bool = False, blocks: int = 2) -> PreTrainedModel:
    """A Llama, or a Qwen2, whose weights make its losses depend on all that comes before."""
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_hidden_layers": blocks, "max_position_embeddings": CONTEXT}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = model(
            config(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, tie_word_embeddings=tied, pad_token_id=0, **sizes)
        )
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                norm = parameter.dim() == 1 and "norm" in name
                parameter.copy_(
                    1 + 0.2 * torch.randn_like(parameter) if norm else torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
                )
    made.generation_config.pad_token_id, made.generation_config.eos_token_id = 0, None
    return made.float().eval()


def write_decoder(model: PreTrainedModel, path: Path, quantization: str = "F32") -> Pair:
    """Write a model's weights: matrices in this type, the rest in float32. Its torch weights become what the file holds."""
    config, kind = model.config, gguf.GGMLQuantizationType[quantization]
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_name("small")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if config.model_type == "llama" else {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer, _, part = name.rpartition(".")
        stored = _NAMES.get(layer)
        if stored is None:
            _, _, block, rest = layer.split(".", 3)
            stored = f"blk.{block}.{_NAMES[rest]}"
        of = heads.get(stored.rpartition(".")[2])
        if tensor.dim() == 2 and quantization != "F32":
            packed = gguf.quantize(tensor.numpy(), kind)
            tensor.copy_(torch.from_numpy(gguf.dequantize(packed, kind).reshape(tensor.shape)))
            writer.add_tensor(f"{stored}.{part}", np.ascontiguousarray(to_file_rows(packed, of)), raw_dtype=kind)
        else:
            writer.add_tensor(f"{stored}.{part}", np.ascontiguousarray(to_file_rows(tensor.numpy(), of)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Pair(model, path)


def texts(lengths: list[int], seed: int = 0, *, left: bool = False) -> dict[str, Tensor]:
    """Random token ids (R, T) of texts of these lengths, and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(ids.shape[1] - length, None) if left else slice(0, length)
        ids[row, place] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def choice_batch(lengths: list[int], options: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Prompts whose answers are single tokens, for a choice loss."""
    generator = torch.Generator().manual_seed(seed + 1)
    batch = texts(lengths, seed)
    rows = len(lengths)
    return {
        **batch,
        "positions": torch.tensor([[length - 1] for length in lengths]),
        "option_ids": torch.stack([torch.randperm(VOCABULARY - 1, generator=generator)[:options] + 1 for _ in range(rows)]),
        "answer": torch.randint(0, options, (rows,), generator=generator),
    }


def text_batch(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Texts whose every token after the first is scored, for a language-model loss."""
    batch = texts(lengths, seed)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)  # the last one, which predicts nothing, too
    return {**batch, "positions": positions, "targets": torch.nn.functional.pad(targets, (0, 1), value=-100)}
