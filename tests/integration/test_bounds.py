"""Small files that would take hours or gigabytes are refused in a sentence, within seconds."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from chat_tokenizers import chat_tokenizer
from trainer_cases import tiny_llama
from zotune.bench import grid
from zotune.cli.main import main
from zotune.io import safe_yaml
from zotune.io.failures import explain
from zotune.io.limited import Limited, LimitError
from zotune.memory import shapes
from zotune.tasks import loader, sources
from zotune.tasks.chat import chat_of
from zotune.tasks.chat_template import ChatTemplate
from zotune.training import bounds, run_config, schemes
from zotune.training.arguments import ModelArguments
from zotune.training.loading import plan_model

SECONDS = 5.0


@contextmanager
def refused(message: str, seconds: float = SECONDS) -> Iterator[None]:
    begin = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        yield
    assert time.process_time() - begin < seconds
    assert len(str(caught.value)) <= 2100 and "\n" not in str(caught.value)


# -- rows -----------------------------------------------------------------------------------------------------------------------------

BOMBS = {
    "rows": ((b'{"a": "' + b"x" * 200 + b'"}\n') * 100_000, "unpacks to more than 100 times its bytes"),
    "blank lines": (b"\n" * 30_000_000, "has more blank lines than rows"),
    "blanks": (b" \n" * 10_000_000, "has more blank lines than rows"),
    "empty objects": (b"{}\n" * 10_000_000, "line 1 holds an object without columns"),
    "a long line": (b'{"a": "' + b"x" * (1 << 26), "line 1 is longer than 67108864 bytes"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_packed_rows_of_many_times_their_bytes_are_refused(kind: str, tmp_path: Path) -> None:
    content, message = BOMBS[kind]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content, 6))
    with refused(message, 15):
        sources.read_jsonl(tmp_path / "a.jsonl.gz")


def test_rows_take_the_memory_of_their_bytes(tmp_path: Path) -> None:
    content = b"".join(b'{"text": "%d", "label": %d}\n' % (number, number % 2) for number in range(50_000))
    (tmp_path / "a.jsonl").write_bytes(content)
    tracemalloc.start()
    rows = sources.read_jsonl(tmp_path / "a.jsonl")
    some = rows.select(range(0, 50_000, 2)).select([3, 1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(content) + 1_000_000
    assert list(some) == [{"text": "6", "label": 0}, {"text": "2", "label": 0}] and some.where(0).endswith("line 7")
    assert rows.columns == ["text", "label"] and rows[-1] == {"text": "49999", "label": 1} and len(rows[1:4]) == 3


def test_a_byte_order_mark_and_blank_lines_leave_the_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n' + b"\n" * 900 + b'{"a": 2}')
    rows = sources.read_jsonl(tmp_path / "a.jsonl")
    assert list(rows) == [{"a": 1}, {"a": 2}] and rows.where(1).endswith("line 902")


# -- YAML, grids, tasks ---------------------------------------------------------------------------------------------------------------

DOCUMENTS = {
    "base 60": "a: 1" + ":1" * 250_000,
    "base 60 with a point": "a: 1" + ":1" * 250_000 + ".5",
    "digits": "a: " + "9" * 250_000,
    "a list": "[" + "a," * 500_000 + "]",
    "a longer list": "[" + "a," * 2_000_000 + "]",
    "depth": "[" * 1_000_000,
    "anchors": "".join(f"a{n}: &a{n} 1\n" for n in range(60_000)),
    "merges": "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_yaml_that_does_not_end_is_refused(kind: str) -> None:
    with refused(r"^my\.yaml"):
        safe_yaml.parse(DOCUMENTS[kind], "my.yaml")


BASE = "models: [a]\ntasks: [sst2]\nbudget: {steps: 1}\n"
GRIDS = {
    "cells": (BASE + f"methods: [{{method: mezo, grid: {{a: {[*range(999)]}, b: {[*range(999)]}, c: {[*range(999)]}}}}}]", "9970029"),
    "axes": (
        f"models: {[f'm{n}' for n in range(9000)]}\ntasks: {[f't{n}' for n in range(9000)]}\nbudget: {{steps: 1}}\nmethods: [a]",
        "81000000",
    ),
    "seeds": (BASE + f"seeds: {[*range(15_000)]}\nmethods: [mezo]", "15000 runs"),
    "names": (BASE.replace("[a]", f"[{'a' * 400_000}]") + f"methods: [{{method: mezo, models: [{'b' * 400_000}]}}]", "unknown"),
    "code": (BASE + "methods: [mezo]\noptions: {trust-remote-code: true}", "'trust_remote_code' can be set on the command line only"),
    "code of a model": (BASE.replace("[a]", "[{model: a, options: {trust_remote_code: true}}]") + "methods: [mezo]", "command line only"),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_a_grid_without_end_or_with_code_is_refused(kind: str, tmp_path: Path) -> None:
    text, message = GRIDS[kind]
    (tmp_path / "g.yaml").write_text(text)
    with refused(message):
        grid.load(tmp_path / "g.yaml")


def test_the_command_lets_code_of_the_models_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "g.yaml").write_text(BASE + "methods: [mezo]\n")
    for words, said in (([], False), (["--trust_remote_code"], True)):
        assert main(["bench", str(tmp_path / "g.yaml"), "--dry_run", "--output_dir", str(tmp_path / "out"), *words]) == 0
        assert ("--trust_remote_code=true" in capsys.readouterr().out) == said


def test_a_file_of_options_does_not_let_code_run(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model_name_or_path: x\ntrust_remote_code: true\n")
    with refused(r"run\.yaml: trust_remote_code can be set on the command line only"):
        run_config.parse(["--config", str(tmp_path / "run.yaml"), "--output_dir", "x"])
    (tmp_path / "run.yaml").write_text("model_name_or_path: x\ntrust_remote_code: false\n")
    config = run_config.parse(["--config", str(tmp_path / "run.yaml"), "--output_dir", "x", "--trust_remote_code", "--use_cpu"])
    assert config.model.trust_remote_code


TASK = "name: x\ncolumns: [s]\nlabel: l\nlabels: {0: a, 1: b}\n"
SQUARES = ", ".join(f"{old}: '{new * 1000}'" for old, new in zip("abcdefg", "bcdefgh", strict=True))
TEMPLATES = {
    "megabytes": (f"templates: {{p: {{prompt: '{'{s} ' * 1_200_000}', options: [a, b]}}}}", "is longer than the 1048576 bytes"),
    "a long prompt": (f"templates: {{p: {{prompt: '{'{s} ' * 50_000}', options: [a, b]}}}}", "has 200000 characters, and at most 65536"),
    "replacements": (
        f"derived: {{d: {{column: s, replace: {{{SQUARES}}}}}}}\ntemplates: {{p: {{prompt: '{{d}} is:', options: [' a', ' b']}}}}",
        "makes a text of more than 4194304 characters",
    ),
    "repetitions": (f"templates: {{p: {{prompt: '{'{s}' * 20_000} is:', options: [' a', ' b']}}}}", "makes a text of more than 4194304"),
    "rules": (
        f"derived: {{d: {{column: s, apply: [{'lower,' * 200}]}}}}\ntemplates: {{p: {{prompt: '{{d}}:', options: [a, b]}}}}",
        "'derived' must be",
    ),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_prompt_without_end_is_refused(kind: str, tmp_path: Path) -> None:
    text, message = TEMPLATES[kind]
    (tmp_path / "t.yaml").write_text(TASK + text)
    with refused(message):
        loader.load(tmp_path / "t.yaml").render({"s": "a" * 1000, "l": 1})


# -- templates and patterns that run --------------------------------------------------------------------------------------------------

ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "memory": "{{ 'x' * 2 ** 33 }}",
    "doubling": "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 2) if n > 1 else 1 }}{% endmacro %}{{ f(60) }}",
    "five megabytes": "{{ messages[0]['content'] }}" + "{% if x %}y{% endif %}" * 230_000,
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_chat_template_without_end_is_stopped(kind: str) -> None:
    class Tokenizer:
        chat_template = ENDLESS[kind]

        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            from transformers.utils.chat_template_utils import render_jinja_template

            return render_jinja_template([messages], chat_template=self.chat_template)[0][0]

    template = ChatTemplate(Tokenizer())
    template._limited.seconds, template._limited.memory = 0.5, 1 << 28
    chat = chat_of({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with refused("the tokenizer's chat template"):
        template.text(chat)
    template.close()


def test_a_stopped_call_leaves_the_next_one_whole() -> None:
    def work(number: int) -> int:
        if number < 0:
            raise KeyError("negative")
        while number > 5:
            pass
        return number

    with Limited(work, "it", seconds=0.2) as limited:
        assert limited(3) == 3
        with pytest.raises(LimitError, match=r"^it takes more than 0.2 s of processor time or 1024 MiB"):
            limited(6)
        assert limited(4) == 4
        with pytest.raises(ValueError, match="negative"):
            limited(-1)
        assert limited(5) == 5


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*(.*)*(.*)*(.*)*x$", "(" * 500 + ")" * 500, "a" * 2000, "("])
def test_a_pattern_without_end_is_refused(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zotune.io.limited.SECONDS", 0.5)
    monkeypatch.setattr(Limited.__init__, "__kwdefaults__", {"seconds": 0.5, "memory": 1 << 28})
    model = tiny_llama()
    model.add_module("a" * 40 + "b", model.lm_head)
    with refused("--trainable|regular expression"):
        schemes.apply(model, "full", trainable=[pattern])


# -- adapters and models --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    schemes.apply(tiny_llama(), "lora", lora_r=2).save_pretrained(folder)
    return folder


EVIL = "(([a-z0-9_.]+)*)*!"
ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "target_modules": ({"target_modules": EVIL}, "regular expressions"),
    "exclude_modules": ({"exclude_modules": EVIL}, "regular expressions"),
    "rank_pattern": ({"rank_pattern": {EVIL: 2}}, "regular expressions"),
    "alpha_pattern": ({"alpha_pattern": {EVIL: 2}}, "regular expressions"),
    "layers_pattern": ({"layers_pattern": EVIL, "layers_to_transform": [0]}, "regular expressions"),
    "modules_to_save": ({"modules_to_save": [EVIL]}, "regular expressions"),
    "no pattern": ({"rank_pattern": {"(": 2}}, "is not a regular expression"),
    "iterations": ({"init_lora_weights": "pissa_niter_1000000000"}, "at most 100"),
    "iterations of what": ({"init_lora_weights": "pissa_niter_x"}, "at most 100"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 10**9}}, "at most 100"),
    "rank": ({"r": 10**9}, "largest dimension"),
    "a rank of a pattern": ({"rank_pattern": {"q_proj": 10**9}}, "largest dimension"),
    "layers": ({"peft_type": "PREFIX_TUNING", "num_layers": 20_000, "token_dim": 64}, "largest dimension"),
    "copies of layers": ({"layer_replication": [[0, 2]] * 10_000}, "20000 layers"),
    "another module": ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "imports another module"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_asks_for_too_much_is_refused(kind: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limited.__init__, "__kwdefaults__", {"seconds": 0.5, "memory": 1 << 28})
    changes, message = ADAPTERS[kind]
    content = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, **changes}))
    save_file(load_file(adapter / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    with refused(message):
        schemes.load_adapter(tiny_llama(), tmp_path)


def test_an_adapter_on_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    content = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, "base_model_name_or_path": str(adapter)}))
    with refused("an adapter itself: merge that into its own base first"):
        plan_model(ModelArguments(str(tmp_path)), "zotune eval")


def test_an_adapter_as_it_was_saved_is_loaded(adapter: Path) -> None:
    schemes.load_adapter(tiny_llama(), adapter)


def test_a_model_of_more_layers_than_tensors_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    bounds.check_model(model.config, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 20_000}))
    with refused(r"num_hidden_layers is 20000, and the files hold \d+ tensors"):
        plan_model(ModelArguments(str(tmp_path)), "zotune eval")
    with refused("num_hidden_layers is 20000, and at most 2000 are possible"):
        shapes.config_of(str(path))


def test_chats_are_encoded_while_the_parent_holds_files(tmp_path: Path) -> None:
    """The child of a template closes what it inherits: a lock of the parent ends with the parent."""
    template = ChatTemplate(chat_tokenizer("byte-level"))
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        chat = chat_of({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
        assert template.text(chat)
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    template.close()


def test_a_file_name_without_end_is_one_short_sentence() -> None:
    said = explain(OSError(errno.ENAMETOOLONG, "File name too long", "a" * 60_000))
    assert said is not None and said[1] == 2 and said[0].startswith("File name too long: aaa") and len(said[0]) < 1000
