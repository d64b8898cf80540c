"""Configurations of small models whose memory the tests measure."""

from transformers import BertConfig, GPT2Config, LlamaConfig, OPTConfig

SMALL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODELS = {
    "gpt2": GPT2Config(n_layer=1, n_embd=96, n_head=2, vocab_size=1900, n_positions=64, **SMALL),
    "opt": OPTConfig(hidden_size=96, num_hidden_layers=1, num_attention_heads=2, ffn_dim=192, vocab_size=1700, word_embed_proj_dim=96,
                     max_position_embeddings=64, **SMALL),
    "llama": LlamaConfig(hidden_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=192,
                         vocab_size=1800, max_position_embeddings=64, **SMALL),
    "bert": BertConfig(hidden_size=96, num_hidden_layers=1, num_attention_heads=2, intermediate_size=192, vocab_size=1900,
                       max_position_embeddings=64, architectures=["BertForMaskedLM"]),
}  # fmt: skip
