"""Small real tokenizers of the kinds that chat models have, trained on a few sentences, each with the chat template of its kind."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the film was good and the end was not so good",
    "was it good ? it was . less so , the plot is dull",
    "a user asks : what is the weather in Paris ? it is 21 degrees and sunny",
    "INST SYS user assistant system tool call function name arguments result",
] * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TINYLLAMA = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
PHI3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
QWEN = (
    "{% if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] if m['content'] else '' }}"
    "{% for call in m['tool_calls'] or [] %}{{ '<call>' + call['function'] | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _finished(backend: Tokenizer, template: str, added: list[AddedToken], **special: str) -> Any:
    backend.add_special_tokens(added)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


def _sentencepiece(template: str, *added: AddedToken, normalizer: Any = None, pre_tokenizer: Any = None) -> Any:
    """BPE with bytes for unknown letters and a mark at the start of words, as Llama and Mistral have it."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if pre_tokenizer is None:
        backend.normalizer = normalizer or prepend
    else:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    words = [f" {word}" for line in CORPUS for word in line.split()]  # as training on whole words
    backend.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False)
    )
    return _finished(backend, template, list(added), unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _byte_level(template: str, *added: AddedToken, trim: bool = True) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    from tokenizers import processors

    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    return _finished(backend, template, list(added), eos_token="<|im_end|>", pad_token="<|im_end|>")


def _unigram(template: str) -> Any:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    letters = sorted(set("".join(CORPUS)) | set('<|>/_[]{}":\n'))
    backend.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=200, initial_alphabet=letters, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    return _finished(backend, template, [], unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _special(*names: str, **how: bool) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False, **how) for name in names]


@cache
def _made(kind: str) -> Any:
    roles = _special("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", rstrip=True)
    qwen = _special("<|im_start|>", "<|im_end|>")
    return {
        "llama2": lambda: _sentencepiece(LLAMA2),
        "tinyllama": lambda: _sentencepiece(TINYLLAMA),
        "phi3": lambda: _sentencepiece(PHI3, *roles),
        "metaspace-first": lambda: _sentencepiece(TINYLLAMA, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
        "unigram": lambda: _unigram(TINYLLAMA),
        "byte-level": lambda: _byte_level(QWEN, *qwen),
        "byte-level-untrimmed": lambda: _byte_level(QWEN, *qwen, trim=False),
        "generation": lambda: _byte_level(GENERATION, *qwen),
    }[kind]()


KINDS = ("llama2", "tinyllama", "phi3", "metaspace-first", "unigram", "byte-level", "byte-level-untrimmed", "generation")


def chat_tokenizer(kind: str) -> Any:
    """A tokenizer with a chat template, by kind; made once, the template as it was."""
    tokenizer = _made(kind)
    return tokenizer
