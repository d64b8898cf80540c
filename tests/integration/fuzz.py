"""Give every reader of files altered and generated inputs: `make fuzz SECONDS=600`.

Each reader runs in a process of its own with bounded memory. An input must end within a time of the processor, in a result or in one
sentence with exit code 2. All else is a finding: it is printed, and its input kept.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml

import mutations
from mutations import as_json, documents, texts
from zotune.io.failures import WRONG, explain

#: Processor seconds of an input, seconds without a new input, and bytes beside those of the imports.
SECONDS, WALL, MEMORY = 30.0, 300.0, 3 << 30
LONGEST_SENTENCE = 2100


class Target(NamedTuple):
    """A reader: how inputs are drawn, and what reads one."""

    generate: Callable[[Random], bytes]
    read: Callable[[bytes], Any]


def rows(folder: Path, packed: bool) -> Target:
    from chat_tokenizers import chat_tokenizer
    from zotune.tasks.encoding import Encoder
    from zotune.tasks.sources import read_jsonl

    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    chat = [{"role": "user", "content": "was it good?"}, {"role": "assistant", "content": "it was.", "weight": 1, "tool_calls": [call]}]
    detail = [{"begin_offset": 0, "end_offset": 2, "train": False}]
    seeds = [
        {"text": "the film was good"},
        {"prompt": "the film was", "completion": " good", "id": 3},
        {"messages": chat, "tools": [{"type": "function", "function": {"name": "f"}}], "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [{"role": "system", "content": "a user"}, *chat, chat[0], {**chat[1], "train_detail": detail, "tool_calls": None}]},
    ]
    one = documents(seeds, as_json)

    def generate(draw: Random) -> bytes:
        lines = [one(draw) if draw.random() < 0.5 else as_json(draw.choice(seeds)).encode() for _ in range(draw.randint(1, 4))]
        data = b"\n".join(lines) * draw.choice((1, 1, 1, 50))
        if not packed:
            return data
        data *= draw.choice((1, 1, 1, 1000)) if len(data) < 20_000 else 1
        return mutations.altered(gzip.compress(data), [data], draw) if draw.random() < 0.3 else gzip.compress(data)

    encoder = Encoder(chat_tokenizer("byte-level"), limit=60, truncate=True)
    path = folder / ("a.jsonl.gz" if packed else "a.jsonl")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = read_jsonl(path)
        encoder.completions(found.select(range(min(len(found), 200))))

    return Target(generate, read)


def config(folder: Path) -> Target:
    from zotune.training import run_config

    seeds = [
        {"model_name_or_path": "m", "task": "sst2", "learning_rate": 1e-3, "trainable": ["layers"], "options": [" a", " b"], "num_dev": 5},
        {"method": "lozo", "rank": 2, "interval": 5, "scheme": "lora", "lora_target_modules": ["q"], "method_args": {"rank": 2}},
        {"chat_template_kwargs": {"a": 1}, "lr_scheduler_kwargs": {"a": 1}, "max_steps": 5, "eval_steps": 0.5, "offload": "no", "seed": 1},
    ]
    parser, path = run_config.option_parser(), folder / "run.yaml"
    words = ["--config", str(path), "--output_dir", str(folder / "out"), "--use_cpu"]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        run_config.parse(words, parser)

    return Target(documents(seeds, yaml.safe_dump), read)


def task(folder: Path) -> Target:
    from zotune.tasks import loader

    names = ("sst2", "squad", "copa", "record", "winogrande")
    seeds = [yaml.safe_load((Path(loader.__file__).parent / f"{name}.yaml").read_text()) for name in names]
    path = folder / "my.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = loader.load(path)
        row = dict.fromkeys(found.columns, "a text. " * 20) | {found.label_column: next(iter(found.labels), "a text.")}
        found.render(row)
        found.encoder_texts(row)

    return Target(documents(seeds, yaml.safe_dump), read)


def grid(folder: Path) -> Target:
    from zotune.bench import grid as grid_file
    from zotune.bench.plan import cells

    text = (
        "models: [a/b, {model: c, label: d, options: {dtype: float32}}]\ntasks: [sst2, rte]\nseeds: [0, 1]\nbudget: {steps: 10}\n"
        "methods: [lozo, {method: mezo, grid: {learning_rate: [1e-6, 1e-7]}, tasks: [sst2], budget: {sequences: 5000}}]\n"
        "options: {num_dev: 5}\npublished: [{source: x, columns: [sst2, rte], model: d, rows: {lozo: [1, 2]}}]\n"
    )
    path = folder / "g.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        cells(grid_file.load(path))

    return Target(documents([yaml.safe_load(text)], yaml.safe_dump), read)


def run_file(folder: Path) -> Target:
    from trainer_cases import tiny_llama
    from zotune.training import run_folder, schemes
    from zotune.training.arguments import EvalDataArguments
    from zotune.training.checkpoint.storage import FORMAT

    data = {"task": "sst2", "data_dir": None, "eval_file": None, "template": None, "options": None, "max_length": 5, "truncate": False}
    scheme = {"scheme": "full", "trainable": [r"layers\.(0)\."], "lora_r": 8}
    seeds = [
        {"format": FORMAT, "model": "m", "scheme": scheme, "data_arguments": data, "dtype": "float32", "classes": None, "before": {"a": 1}}
    ]
    path, model = folder / run_folder.RUN_FILE, tiny_llama()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        found = run_folder.read_run(folder)
        for part, kind in (("scheme", schemes.Scheme), ("data_arguments", EvalDataArguments)):
            if isinstance(found.get(part), dict):
                try:
                    made = kind(**found[part])
                except TypeError:  # its user says it in a sentence
                    continue
                if part == "scheme" and made.scheme == "full":
                    schemes.apply(model, made)

    return Target(documents(seeds, as_json), read)


def journal(folder: Path) -> Target:
    import toys
    from zotune import ZerothOrder
    from zotune.optim.journal import Journal, verify
    from zotune.optim.replay import replay

    seeds, path = [], folder / "j"
    for method in ("lozo-e", "mezo-adam", "lozo-g"):
        path.unlink(missing_ok=True)
        model = toys.classifier()
        try:
            optimizer = ZerothOrder(model, toys.method(method, eps="auto"), lr="auto", journal=path)
        except ValueError:
            optimizer = ZerothOrder(model, toys.method(method), lr=1e-3, journal=path)
        for step in range(4):
            optimizer.step(toys.loss_function(model), toys.batch(seed=step))
        seeds.append(path.read_bytes())

    def generate(draw: Random) -> bytes:
        from zlib import compress, crc32

        seed = draw.choice(seeds)
        if draw.random() < 0.4:
            return mutations.altered(seed, seeds, draw)
        if draw.random() < 0.4:  # a header of other content, with its checksum
            length = struct.unpack_from("<I", seed, 4)[0]
            header = as_json(mutations.exchanged(json.loads(seed[8 : 8 + length]), draw)).encode()
            return seed[:4] + struct.pack("<I", len(header)) + header + struct.pack("<I", crc32(header)) + seed[12 + length :]
        records = []
        for _ in range(draw.choice((1, 2, 300))):
            event = mutations.exchanged({"event": draw.choice(("eps", "observed", "measured", "scales", "fold")), "value": 1}, draw)
            payload = as_json(event).encode()[:65_000]
            kind = draw.choice((1, 2, 3))
            body = struct.pack("<BH", kind, 0)[:1] + struct.pack("<H", len(p := compress(payload) if kind == 3 else payload)) + p
            records.append(body + struct.pack("<I", crc32(body)))
        return seed + b"".join(records)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        verify(path)
        list(Journal.open(path).records())
        replay(toys.classifier(), path)

    return Target(generate, read)


def checkpoint(folder: Path) -> Target:
    from trainer_cases import StopAt, choice_rows, tiny_llama, trainer
    from zotune.training.checkpoint import storage

    options: dict[str, Any] = {"max_steps": 4, "train_dataset": choice_rows(20), "forward_batching": "batched", "save_steps": 2}
    options |= {"save_strategy": "steps"}
    with contextlib.suppress(KeyboardInterrupt):
        trainer(folder / "good", callbacks=[StopAt(3)], **options).train()
    files = sorted(path for path in (folder / "good/checkpoint-2").iterdir() if path.is_file() and path.suffix in (".json", ".safetensors"))
    content = {path.name: path.read_bytes() for path in files}
    by_value = {name: documents([json.loads(data)], as_json) for name, data in content.items() if name.endswith(".json")}
    good = list(content.values())

    def generate(draw: Random) -> bytes:
        name = draw.choice(list(content))
        if name in by_value:
            return name.encode() + b"\0" + by_value[name](draw)
        changed = by_value[name](draw) if name in by_value else mutations.altered(content[name], good, draw)
        return name.encode() + b"\0" + changed

    def read(data: bytes) -> None:
        name, _, changed = data.partition(b"\0")
        here = folder / "run"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(folder / "good", here)
        (here / "checkpoint-2" / name.decode()).write_bytes(changed)
        if name.decode() != storage.MANIFEST:
            storage.write_manifest(here / "checkpoint-2")
        trainer(here, tiny_llama(), **options).train(resume_from_checkpoint=True)

    return Target(generate, read)


def adapter(folder: Path) -> Target:
    from trainer_cases import tiny_llama
    from zotune.training import schemes
    from zotune.training.loading import explained

    here = folder / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seeds = []
        for scheme in ("prompt", "prefix", "lora"):
            options = {"lora_r": 2} if scheme == "lora" else {"num_virtual_tokens": 2}
            schemes.apply(tiny_llama(), scheme, **options).save_pretrained(folder / scheme)
            seeds.append(json.loads((folder / scheme / "adapter_config.json").read_text()))
    shutil.copytree(folder / "lora", here)

    def read(data: bytes) -> None:
        for scheme in ("prompt", "prefix", "lora"):
            if f'"{scheme}'.encode() in data.lower():
                shutil.copy(folder / scheme / "adapter_model.safetensors", here)
        (here / "adapter_config.json").write_bytes(data)
        explained(str(here), lambda: schemes.load_adapter(tiny_llama(), here))

    return Target(documents(seeds, as_json), read)


def template(folder: Path) -> Target:
    import chat_tokenizers
    from zotune.tasks.encoding import Encoder
    from zotune.tasks.sources import Rows

    names = ("LLAMA2", "TINYLLAMA", "PHI3", "QWEN", "GENERATION")
    seeds = [getattr(chat_tokenizers, name).encode() for name in names]
    tokenizer = chat_tokenizers.chat_tokenizer("byte-level")
    chat = [{"role": "user", "content": "was it good?"}, {"role": "assistant", "content": "it was."}]

    def read(data: bytes) -> None:
        tokenizer.chat_template = data.decode("utf-8", "replace")
        Encoder(tokenizer, limit=100, truncate=True).completions(Rows([{"messages": chat * 2}], "x", [1]))

    return Target(texts(seeds), read)


def tools(folder: Path) -> Target:
    from zotune.tasks.chat import read_tools

    path = folder / "tools.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_tools(path)

    return Target(documents([[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]], as_json), read)


def model(folder: Path) -> Target:
    from trainer_cases import tiny_llama
    from zotune.training.arguments import ModelArguments
    from zotune.training.loading import plan_model

    tiny_llama().save_pretrained(folder / "model")
    path = folder / "model/config.json"
    arguments = ModelArguments(str(folder / "model"))

    def read(data: bytes) -> None:
        path.write_bytes(data)
        plan_model(arguments, "zotune eval")

    return Target(documents([json.loads(path.read_text())], as_json), read)


def gguf_model(folder: Path) -> Target:
    import numpy as np

    from gguf_checkpoints import tokenizer
    from gguf_files import write_model, write_tokenizer
    from zotune.engines.gguf.file import GGUFFile
    from zotune.tasks.gguf_tokenizer import gguf_tokenizer

    seeds = [write_model(folder / "model.gguf").read_bytes()]
    seeds += [write_tokenizer(folder / "vocabulary.gguf", tokenizer(kind)).read_bytes() for kind in ("gpt-2", "llama")]
    path = folder / "input.gguf"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        file = GGUFFile(path)
        assert all(np.prod(matrix.shape) > 0 for matrix in file.matrices)
        file.rows(file.head, [0, file.vocabulary_size - 1])
        file.digest()
        gguf_tokenizer(file)("the film was good")

    return Target(lambda draw: mutations.altered(draw.choice(seeds), seeds, draw), read)


def gguf_adapter(folder: Path) -> Target:
    import numpy as np

    from gguf_files import write_model
    from zotune.engines.gguf.adapter import read_adapter, write_adapter
    from zotune.engines.gguf.file import GGUFFile

    file = GGUFFile(write_model(folder / "model.gguf"))
    factors = {matrix.name: tuple(np.ones((size, 2), np.float32) for size in matrix.shape) for matrix in file.matrices[:3]}
    path = folder / "adapter.gguf"
    write_adapter(path, file, factors, {"base": "0" * 32})
    seed = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_adapter(path, file)

    return Target(lambda draw: mutations.altered(seed, [seed], draw), read)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "rows": lambda folder: rows(folder, False),
    "packed rows": lambda folder: rows(folder, True),
    "options": config,
    "task": task,
    "grid": grid,
    "run file": run_file,
    "journal": journal,
    "checkpoint": checkpoint,
    "adapter": adapter,
    "model": model,
    "chat template": template,
    "tools": tools,
    "gguf model": gguf_model,
    "gguf adapter": gguf_adapter,
}


def work(name: str, seed: int, first: int, folder: Path, progress: mmap.mmap, seconds: float) -> None:
    """The life of a reader's process: inputs from ``first`` on, for some seconds."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    log = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    os.chdir(folder)
    target = TARGETS[name](folder)
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    number, findings, refused, slowest, start = first, 0, 0, 0.0, time.monotonic()
    while time.monotonic() < start + seconds:
        data = target.generate(Random(f"{seed}/{name}/{number}"))
        (folder / "input").write_bytes(data)
        begin = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            target.read(data)
        except BaseException as error:
            text, code = explain(error) or ("", 0)
            refused += code == WRONG
            if code != WRONG or not text or len(text) > LONGEST_SENTENCE:
                findings += keep(folder, name, number, data, traceback.format_exc())
        signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - begin)
        number += 1
        progress[:40] = struct.pack("<QQQdd", number, findings, refused, time.monotonic() - start, slowest)


def keep(folder: Path, name: str, number: int, data: bytes, why: str) -> int:
    """Saves a finding beside the reader's folder."""
    place = folder.parent / "findings" / f"{name.replace(' ', '-')}-{number}"
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(data)
    place.with_suffix(".txt").write_text(why)
    return 1


def fuzz(name: str, seconds: float, seed: int, folder: Path) -> int:
    """One reader for some seconds; the number of findings."""
    here = folder / name.replace(" ", "-")
    here.mkdir(parents=True, exist_ok=True)
    progress = mmap.mmap(-1, 40)
    first = findings = inputs = killed = refused = 0
    slowest = spent = 0.0
    while spent < seconds:
        progress[:40] = struct.pack("<QQQdd", first, 0, 0, 0.0, 0.0)
        child = os.fork()
        if child == 0:
            try:
                work(name, seed, first, here, progress, seconds - spent)
                os._exit(0)
            except BaseException:
                (here / "error").write_text(traceback.format_exc())
                os._exit(1)
        last, since = first, time.monotonic()
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            time.sleep(0.1)
            now = struct.unpack("<QQQdd", progress[:40])[0]
            last, since = (now, time.monotonic()) if now != last else (last, since)
            if time.monotonic() - since > WALL:
                os.kill(child, signal.SIGKILL)
        number, found, no, used, slow = struct.unpack("<QQQdd", progress[:40])
        inputs, findings, refused, slowest = inputs + number - first, findings + found, refused + no, max(slowest, slow)
        spent += used + (time.monotonic() - since if os.WIFSIGNALED(done[1]) else 0)  # a stopped input has not reported its time
        status = done[1]
        if os.WIFSIGNALED(status):
            killed += 1
            findings += keep(here, name, number, (here / "input").read_bytes(), f"stopped by signal {os.WTERMSIG(status)}: time or memory")
        elif os.WEXITSTATUS(status):
            print((here / "error").read_text())
            return findings + 1
        first = number + 1
    print(f"{name}: {inputs} inputs, {refused} refused, {killed} stopped, {findings} findings, slowest {slowest:.1f} s", flush=True)
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description="Give the readers of files altered and generated inputs.")
    parser.add_argument("--seconds", type=float, default=60, help="per reader (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(TARGETS), help="readers (default: all)")
    parser.add_argument("--keep", type=Path, help="folder for the findings (default: a new one)")
    options = parser.parse_args()
    for module in ("peft", "trainer_cases", "zotune.training.run_config", "zotune.bench.plan"):  # once, before the processes fork
        importlib.import_module(module)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="zotune-fuzz-"))
    found = sum(fuzz(name, options.seconds, options.seed, folder) for name in options.only or TARGETS)
    print(f"seed {options.seed}: {found} findings" + (f", kept in {folder / 'findings'}" if found else ""))
    if not found and options.keep is None:
        shutil.rmtree(folder)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
