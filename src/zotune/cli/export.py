"""`zotune export`: a finished run as an adapter of PEFT, one whole model, or a GGUF file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from zotune.cli.parser import CommandParser
from zotune.cli.replay import merged, new_folder, save_beside
from zotune.io.sizes import size_text
from zotune.publishing.finished import finished
from zotune.publishing.made_up import made_up_inputs
from zotune.tasks.model_kind import kind_of_record
from zotune.training import run_folder
from zotune.training.arguments import ModelArguments
from zotune.training.checkpoint import contents, storage
from zotune.training.checkpoint.files import GGUF_ADAPTER
from zotune.training.loading import load_model, load_tokenizer, plan_model
from zotune.training.quiet import quiet_libraries

FORMS = ("peft", "merged", "gguf")
#: Part of the change of the logits that may be lost without a warning.
TOLERANCE = 0.05


def main(argv: Sequence[str]) -> int:
    """Runs `zotune export`."""
    parser = CommandParser(
        "zotune export",
        "Writes a finished run in another form: peft, a LoRA adapter of the base model; merged, one model without an adapter; gguf, one "
        "file for llama.cpp and Ollama. The logits of an adapter are compared with those of the run.",
    )
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--to", choices=FORMS, required=True, help="the form")
    parser.add_argument("--output_dir", required=True, help="folder for the adapter or model; of a GGUF file, the file")
    parser.add_argument("--base", help="the base model, where it is no longer where the run had it")
    parser.add_argument("--rank", type=int, help="with --to peft: rank of the adapter (default: what the update needs, at most 64)")
    parser.add_argument("--outtype", help="with --to gguf: how weights are stored (default: f16; see `zotune convert --help`)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    args = parser.parse(argv)
    if args.rank is not None and (args.to != "peft" or args.rank < 1):
        raise ValueError("--rank is of --to peft, and at least 1." if args.to != "peft" else f"--rank must be at least 1, not {args.rank}.")
    if args.outtype is not None and args.to != "gguf":
        raise ValueError(f"--outtype is of --to gguf: leave it out with --to {args.to}.")
    quiet_libraries()
    source = Source(Path(args.run).expanduser(), args.base, args.trust_remote_code)
    if args.to == "gguf":
        print(_to_gguf(source, Path(args.output_dir).expanduser(), args.outtype or "f16"))
        return 0
    output = new_folder(args.output_dir, "zotune export", args.to)
    with storage.draft(output) as folder:
        told = _to_peft(source, folder, args.rank) if args.to == "peft" else _to_merged(source, folder)
    print(f"{output}: {told}")
    return 0


class Source:
    """A finished run, its trained model and its base model."""

    def __init__(self, run: Path, base: str | None, trust_remote_code: bool) -> None:
        self.run, self.record = run, finished(run, "export")
        if not (run / storage.MANIFEST).is_file():
            raise ValueError(f"the run in {run} left no model, so there is nothing to export.")
        self.base = base or str(self.record.get("base_model") or "")
        self.trust = trust_remote_code
        self.adapter = (run / "adapter_config.json").is_file()
        self.engine = (run / GGUF_ADAPTER).is_file()

    def arguments(self, name: str) -> ModelArguments:
        return ModelArguments(name, dtype=self.record.get("dtype") or "auto", trust_remote_code=self.trust)

    def load(self, name: str) -> tuple[nn.Module, list[str]]:
        """A model in evaluation mode, and its parameters that the files lack."""
        plan = plan_model(self.arguments(name), "zotune export")
        with torch.random.fork_rng(devices=[]):
            kind = kind_of_record(self.record, self.run / run_folder.RUN_FILE)
            model, fresh = load_model(plan, self.arguments(name), torch.device("cpu"), kind=kind)
        return model.eval(), fresh

    def save_tokenizer(self, folder: Path) -> None:
        tokenizer = load_tokenizer(plan_model(self.arguments(str(self.run)), "zotune export"), self.arguments(str(self.run)))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _to_merged(source: Source, folder: Path) -> str:
    if source.engine:
        raise ValueError(
            "a GGUF file and its adapter are merged by llama.cpp: llama-export-lora -m BASE.gguf --lora adapter.gguf -o OUT.gguf."
        )
    model, _ = source.load(str(source.run))
    if source.adapter:
        model = merged(model)
    contents.save_model(folder, model)
    source.save_tokenizer(folder)
    save_beside(folder, source.run)
    return f"the model of {source.run}, {size_text(sum(p.numel() * p.element_size() for p in model.parameters()))}."


def _to_gguf(source: Source, out: Path, outtype: str) -> str:
    if source.engine:
        if out.exists():
            raise ValueError(f"{out} is there already: name another file.")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.run / GGUF_ADAPTER, out)
        return f"{out}: the adapter of {source.run}, for the GGUF file that it was trained on."
    from zotune.engines.gguf.convert import convert

    with tempfile.TemporaryDirectory(prefix="zotune-export-") as place:
        folder = Path(place) / "merged"
        folder.mkdir()
        _to_merged(source, folder)
        convert(folder, out, outtype)
    return f"{out}: the model of {source.run}, {outtype}, {size_text(out.stat().st_size)}."


def _to_peft(source: Source, folder: Path, rank: int | None) -> str:
    if source.engine or source.adapter:
        if rank is not None:
            raise ValueError("the run trained an adapter, which is exported as it is: leave --rank out.")
        made = source.run / "peft" if source.engine else source.run
        if not (made / "adapter_config.json").is_file():
            raise ValueError(f"{source.run} has no adapter for the original checkpoint: the names of its layers are unknown.")
        for path in (made / "adapter_config.json", made / "adapter_model.safetensors"):
            shutil.copyfile(path, folder / path.name)
        if not source.engine:
            source.save_tokenizer(folder)
        return f"the adapter of {source.run}, as it was trained."
    from zotune.publishing.adapter import adapter_of

    if not source.base:
        raise ValueError(f"{source.run} does not name its base model: give it with --base.")
    (base, fresh), (trained, _) = source.load(source.base), source.load(str(source.run))
    made_up = made_up_inputs(trained)
    before, wanted = _outputs(base, made_up), _outputs(trained, made_up)
    factored = adapter_of(base, trained, rank, fresh)
    for config in factored.model.peft_config.values():
        config.base_model_name_or_path = source.base
    factored.model.save_pretrained(folder, save_embedding_layers=False)  # their factors are saved in any case
    (folder / "README.md").unlink(missing_ok=True)
    source.save_tokenizer(folder)
    lost = float((_outputs(factored.model.eval(), made_up) - wanted).norm() / (wanted - before).norm().clamp_min(1e-30))
    told = f"an adapter of rank {factored.rank} for {source.base}. Of the update ‖ΔW‖ it lacks {factored.error:.2g}"
    if factored.errors:
        told += f" (most in {factored.worst}, {factored.errors[factored.worst]:.2g})"
    told += f"; of the change of the outputs, on made-up inputs, {lost:.2g}."
    if factored.biases:
        told += " Biases go along (PEFT's bias=all), and stay when the adapter is disabled; vLLM does not read those."
    if factored.whole:
        told += f" {len(factored.whole)} modules go along whole, for vectors that were trained in them; vLLM does not read those."
    if lost > TOLERANCE:
        told += " That is much: a higher --rank keeps more, and --to merged all."
    return told


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or the last states of a model without them."""
    found = model(**inputs)
    return (found.logits if "logits" in found else found.last_hidden_state).float()
