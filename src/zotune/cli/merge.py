"""`zotune merge`: base model + several journals = one model, the average of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zotune.cli.parser import CommandParser
from zotune.cli.replay import base_model, new_folder, save_adapter
from zotune.optim.journal import Journal
from zotune.optim.merge import merge
from zotune.optim.replay import checked_header
from zotune.training import run_folder
from zotune.training.checkpoint import contents, storage
from zotune.training.quiet import quiet_libraries
from zotune.weights.computed_linear import is_computed
from zotune.weights.trainable_scales import dequantize


def main(argv: Sequence[str]) -> int:
    """Runs `zotune merge`."""
    parser = CommandParser(
        "zotune merge",
        "Averages the trained weights of several runs of one base model, each rebuilt from its journal, and saves a model that "
        "transformers loads. Independent workers can so train one model by exchanging journals.",
    )
    parser.add_argument("base", help="the base model: a folder or a hub id")
    parser.add_argument("journals", nargs="+", help="the runs' journals, or their folders")
    parser.add_argument("--weights", nargs="+", type=float, help="the weight of each run, such as its number of examples (default: equal)")
    parser.add_argument("--output_dir", help="folder for the merged model; must not exist or be empty")
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the base model")
    args = parser.parse(argv)
    output = new_folder(args.output_dir, "zotune merge", "merged")
    paths = [Path(word).expanduser() for word in args.journals]
    journals = [Journal.open(path / run_folder.JOURNAL_FILE if path.is_dir() else path) for path in paths]
    if args.weights is not None and len(args.weights) != len(journals):
        raise ValueError(f"there are {len(journals)} journals and {len(args.weights)} --weights: give one per journal.")
    bases = [checked_header(journal)["base"] for journal in journals]
    other = next((journal for journal in journals if journal.header["base"] != bases[0]), None)
    if other is not None:
        raise ValueError(f"{other.path} began with another model than {journals[0].path}: only runs of one base can be merged.")
    quiet_libraries()
    model, tokenizer = base_model(
        args.base, journals[0], journals[0].path.parent, trust_remote_code=args.trust_remote_code, use_cpu=args.use_cpu
    )
    merge(model, journals, args.weights)
    model = dequantize(model)
    with storage.draft(output) as folder:
        if is_computed(model):
            facts = {"method": "merge", "runs": len(journals), "steps": sum(map(len, journals))}
            save_adapter(folder, model, facts, journals[0].path.parent)
        else:
            contents.save_model(folder, model.cpu())
            tokenizer.save_pretrained(folder)
    steps = ", ".join(f"{len(journal)} of {journal.header['method']}" for journal in journals)
    print(f"{output}: {args.base} after the steps of {len(journals)} runs ({steps}), averaged.")
    return 0
