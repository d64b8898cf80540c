"""Small random checkpoints with tokenizers of the kinds that llama.cpp has, to be converted to GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from paths import ROOT

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SPECIAL = ("<unk>", "<s>", "</s>")
#: A page of varied text: contractions, numbers, runs of spaces, code, other scripts, emoji.
PAGE = (
    "It's 1234567 o'clock; they'LL pay $3.50 (or 1,000 €) at 12:30pm…\n\n\n  def f(x):\n\t\treturn x ** 2  # naïve café\r\n"
    "Straße, Привет мир, 東京は晴れ, 안녕하세요, שלום, ١٢٣, ½, x²  —  “quoted” don't DON'T\t \n 🙂🙃👩‍👧 a\u00a0b   trailing  "
)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokenizer(pre: str) -> PreTrainedTokenizerFast:
    """A small tokenizer trained on the README, of the kind that llama.cpp calls ``pre``, or ``llama`` for SentencePiece's pieces."""
    made = _pieces() if pre == "llama" else _byte_level(pre)
    before = [("<s>", 1)] if pre != "qwen2" else []
    made.post_processor = processors.TemplateProcessing(single=" ".join([*(name for name, _ in before), "$A"]), special_tokens=before)
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template="{{ messages }}"
    )


def _byte_level(pre: str) -> Tokenizer:
    made = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    splits = {"qwen2": _WORDS + _REST, "llama-bpe": _WORDS + "{1,3}" + _REST, "smaug-bpe": _WORDS + "{1,3}" + _REST}
    steps: list[Any] = [pre_tokenizers.Split(Regex(splits[pre]), "isolated")] if pre in splits else []
    steps += [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in splits)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    made.decoder = decoders.ByteLevel()
    made.normalizer = normalizers.NFC() if pre == "qwen2" else None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        _text(), trainers.BpeTrainer(vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    )
    return made


def _pieces() -> Tokenizer:
    """Like Llama 2's: pieces in the order of their merging, every way to merge two into a third listed."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trained.train_from_iterator(_text(), trainers.BpeTrainer(vocab_size=500, show_progress=False))
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    pieces = [piece for piece in learned if len(piece) > 1]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *(piece for piece in learned if len(piece) == 1)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    splits = [(piece[:at], piece[at:]) for piece in pieces for at in range(1, len(piece))]
    merges = [pair for pair in splits if vocabulary.keys() >= set(pair)]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(list(SPECIAL))
    return made


def _text() -> list[str]:
    return (ROOT / "README.md").read_text(encoding="utf-8").splitlines() + [PAGE] * 3


def save_checkpoint(folder: Path, kind: str = "llama", pre: str = "gpt-2", *, shard: str = "1GB", **config: Any) -> Path:
    """Saves a small random model with its tokenizer; ``config`` overrides fields of its configuration."""
    words = tokenizer(pre)
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "max_position_embeddings": 256, "vocab_size": len(words) + 3, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False, "initializer_range": 0.2,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind](**sizes | config))
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter.data, 1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder, max_shard_size=shard)
    words.save_pretrained(folder)
    return folder
