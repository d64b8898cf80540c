"""`zotune push`: a finished run as a repository of the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from zotune.cli.parser import CommandParser
from zotune.io.sizes import size_text
from zotune.publishing import PublishedFiles, Upload, model_card, upload
from zotune.publishing.files import CARD


def main(argv: Sequence[str]) -> int:
    """Runs `zotune push`."""
    parser = CommandParser(
        "zotune push",
        "Pushes a finished run to the Hugging Face Hub in one commit: the model with a card, journal, record, summary and curve. Absolute "
        "paths are taken out; checkpoints and completions stay. Log in with `hf auth login`, or set HF_TOKEN.",
    )
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("repo", help="the repository: user/name; it is created where it does not exist")
    parser.add_argument("--base_model", help="name of the base model on the hub, where the run had it in a local folder")
    parser.add_argument("--license", help="the license to state, such as apache-2.0")
    parser.add_argument("--dataset", help="name of the data set on the hub, for the card")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to (default: the main one); created where it does not exist")
    parser.add_argument("--dry_run", action="store_true", help="print the files and the card, and push nothing")
    args = parser.parse(argv)
    to = Upload(args.repo, private=args.private, revision=args.revision)
    run = Path(args.run).expanduser()
    if args.dry_run:
        with prepared(run, to, args.base_model, args.license, args.dataset) as files:
            for path in files.paths:
                print(f"{size_text(path.stat().st_size):>10}  {path.relative_to(files.folder).as_posix()}")
            print(f"\n{CARD}:\n\n{(files.folder / CARD).read_text(encoding='utf-8')}", end="")
    else:
        print(f"{to.repo}: {push_run(run, to, args.base_model, args.license, args.dataset)}")
    return 0


def push_run(run: Path, to: Upload, base: str | None = None, license: str | None = None, dataset: str | None = None) -> str:
    """Pushes a finished run with its card; the commit's address."""
    with prepared(run, to, base, license, dataset) as files:
        if files.base is None:
            print(
                f"The base model was the local folder {files.local_base!r}: others cannot load it by that name. If it is on the hub, give "
                "--base_model (`zotune push --help`)."
            )
        return upload(files, to, f"{files.summary['method']} on {files.summary['data']}, by zotune")


@contextlib.contextmanager
def prepared(run: Path, to: Upload, base: str | None, license: str | None, dataset: str | None) -> Iterator[PublishedFiles]:
    """What is published of a run, its card with it, for the time of the context."""
    with tempfile.TemporaryDirectory(prefix="zotune-push-") as folder:
        files = PublishedFiles(run, Path(folder), base=base)
        files.add_card(model_card(files, to.repo, license=license, dataset=dataset))
        yield files
