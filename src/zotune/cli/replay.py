"""`zotune replay`: base model + journal = the trained model."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from zotune.cli.parser import CommandParser
from zotune.optim.journal import Journal, verify
from zotune.optim.replay import checked_header, replay
from zotune.tasks.model_kind import kind_of_record
from zotune.tasks.sentence_pairs import FILES, MODULES
from zotune.training import run_folder, schemes
from zotune.training.arguments import ModelArguments
from zotune.training.checkpoint import contents, storage
from zotune.training.loading import load_model, load_tokenizer, plan_model
from zotune.training.quiet import quiet_libraries
from zotune.training.schemes import Scheme
from zotune.weights import quantized_linear, trainable_scales
from zotune.weights.computed_linear import is_computed
from zotune.weights.offload import stream_of
from zotune.weights.offload.loading import PLACES

#: Files of a processor of images or sound.
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "chat_template.jinja")
#: Options of a rebuilt model.
_OF_A_MODEL = (
    "output_dir", "step", "merge", "offload", "max_memory", "offload_blocks", "offload_dir", "use_cpu", "trust_remote_code",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Runs `zotune replay`."""
    parser = CommandParser(
        "zotune replay",
        "Rebuilds the trained weights of a run from its base model and its journal, and saves a model that transformers loads. "
        "Bit-exact on the type of device that the run used.",
    )
    parser.add_argument("base", nargs="?", help="the base model: a folder or a hub id (not needed with --verify)")
    parser.add_argument("journal", help="the run's journal, or its folder")
    parser.add_argument("--output_dir", help="folder for the rebuilt model; must not exist or be empty")
    parser.add_argument("--step", type=int, help="number of steps to replay (default: all)")
    parser.add_argument("--merge", action="store_true", help="merge a trained LoRA adapter into the base model's weights")
    parser.add_argument("--verify", action="store_true", help="only check the journal's checksums and order; writes nothing")
    parser.add_argument("--offload", choices=PLACES, help="keep the model's blocks in host memory (cpu) or in its own files (disk)")
    parser.add_argument("--max_memory", metavar="SIZE", help="with --offload: memory, such as 18GiB; decides how many blocks stay")
    parser.add_argument("--offload_blocks", nargs="+", metavar="NAME", help="with --offload: name of the model's list of blocks")
    parser.add_argument("--offload_dir", metavar="DIR", help="with --offload disk: folder for a scratch file of the trained weights")
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the base model")
    args = parser.parse(argv)
    path = Path(args.journal).expanduser()
    path = path / run_folder.JOURNAL_FILE if path.is_dir() else path
    if not path.is_file() and (path.parent / run_folder.RUN_FILE).is_file():
        raise ValueError(f"{path.parent} has no journal: a run of a first-order method, or of one without steps, cannot be replayed.")
    if args.verify:
        idle = [name for name in _OF_A_MODEL if getattr(args, name) not in (None, False)]
        if idle:
            raise ValueError(f"--verify only checks the journal, so --{idle[0]} would have no effect: leave one of them out.")
        found = verify(path)
        if not found.ok:
            raise ValueError(found.message)
        print(f"{path}: {found.message}")
        return 0
    if args.base is None:
        raise ValueError("zotune replay takes the base model and the journal: zotune replay BASE JOURNAL --output_dir DIR.")
    output = new_folder(args.output_dir, "zotune replay", "rebuilt")
    if args.merge and args.offload is not None:
        raise ValueError("--merge writes every weight of the model at once, wherever it is: leave --offload out.")
    quiet_libraries()
    journal = Journal.open(path)
    where = {name: getattr(args, name) for name in ("max_memory", "offload_blocks", "offload_dir")}
    model, tokenizer = base_model(
        args.base,
        journal,
        path.parent,
        trust_remote_code=args.trust_remote_code,
        use_cpu=args.use_cpu,
        offload=args.offload or "no",
        **where,
    )
    if args.merge and not hasattr(model, "peft_config"):
        raise ValueError("--merge puts a LoRA adapter into the weights, and this run trained none: leave --merge out.")
    optimizer = replay(model, journal, until=args.step)
    steps = optimizer.steps
    optimizer.remove_hooks()
    model = trainable_scales.dequantize(model)
    if args.merge:
        model = merged(model)
    with storage.draft(output) as folder:
        if is_computed(model):
            save_adapter(folder, model, run_folder.adapter_facts(optimizer), path.parent)
        else:
            contents.save_model(folder, model if stream_of(model) is not None else model.cpu())
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            save_beside(folder, path.parent)
    print(f"{output}: {args.base} after {steps} of {len(journal)} steps of {journal.header['method']}.")
    return 0


def save_adapter(folder: Path, model: Any, facts: dict[str, Any], run: Path) -> None:
    """The files of a GGUF model's adapter, as the run in the folder ``run`` saves them."""
    from zotune.training import gguf_models

    chats = (run / run_folder.RUN_FILE).is_file() and bool(run_folder.read_run(run).get("chats"))
    gguf_models.save(folder, model, facts, checkpoint_too=True, chat=chats)


def save_beside(folder: Path, run: Path) -> None:
    """Files by which libraries load a model of sentences, or of images, as in the folder of its ``run``."""
    names = FILES if (run / MODULES).is_file() else PROCESSOR
    for name in names:
        if (run / name).is_file() and not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(run / name, folder / name)


def new_folder(name: str | None, command: str, what: str) -> Path:
    """The folder of ``--output_dir``.

    Raises:
        ValueError: none is given.
        FileExistsError: it is not empty.
    """
    if name is None:
        raise ValueError(f"{command} needs --output_dir: the folder for the {what} model.")
    folder = Path(name).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; choose another --output_dir.")
    return folder


def merged(model: nn.Module) -> nn.Module:
    """The model with its LoRA adapter merged into its weights.

    Raises:
        ValueError: the adapter is a prefix or prompt.
    """
    if not hasattr(model, "merge_and_unload"):
        raise ValueError("--merge puts a LoRA adapter into the weights; a prefix or prompt is none: leave --merge out.")
    merge: Any = quantized_linear.dequantize(model).merge_and_unload
    return merge()


def base_model(base: str, journal: Journal, folder: Path, *, trust_remote_code: bool, use_cpu: bool, **where: Any) -> tuple[nn.Module, Any]:
    """The base model before the first step, in the run's dtype and bits, with the run's initial head or adapter, and its tokenizer.

    ``where``: options of :class:`ModelArguments` for offloading.
    """
    run = run_folder.read_run(folder) if (folder / run_folder.RUN_FILE).is_file() else {}
    header = checked_header(journal)
    stored = {dtype for group in header["groups"] for _, _, dtype in group["parameters"]}
    dtype: Any = run.get("dtype") or next(iter(stored), None)
    if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(f"{folder} says that the run's weights were {dtype!r}, which is no dtype.")
    given = run.get("model_arguments")
    bits = given.get("quantize") if isinstance(given, dict) else None
    options = ModelArguments(base, dtype=dtype, trust_remote_code=trust_remote_code, quantize=bits, **where)
    on_gpu = torch.cuda.is_available() and not use_cpu and "cpu" not in header["device"]
    device = torch.device("cuda" if on_gpu else "cpu")
    plan = plan_model(options, "zotune replay")
    tokenizer = None if plan.gguf is not None else load_tokenizer(plan, options)  # an adapter is saved without one
    adapter = folder / run_folder.ADAPTER_FOLDER
    if adapter.is_dir():
        plan = dataclasses.replace(plan, adapter=str(adapter))
    model, _ = load_model(plan, options, device, kind=kind_of_record(run, folder / run_folder.RUN_FILE))
    if run and plan.adapter is None:
        try:
            scheme = Scheme(**run.get("scheme", {}))
        except TypeError as error:
            raise ValueError(f"{folder / run_folder.RUN_FILE} is damaged: its scheme is none ({error}).") from error
        schemes.apply(model, scheme)  # a head that was untied
    head = folder / run_folder.HEAD_FILE
    if head.is_file():
        model.load_state_dict(load_file(head), strict=False)
    return (model if stream_of(model) is not None else model.to(device)), tokenizer
