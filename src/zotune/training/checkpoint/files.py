"""The files of a checkpoint: their names, the version of their format, their JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

#: Version of the files of checkpoints and runs; raise it when a file's keys, names or meaning change.
FORMAT = 4

STATE_TENSORS = "zotune_state.safetensors"
STATE = "zotune_state.json"
BLOCK_TENSORS = "zotune_state-block-{}.safetensors"
SCHEDULER = "scheduler.json"
RNG = "rng_state.json"
TRAINER_STATE = "trainer_state.json"
ARGUMENTS = "training_args.json"
MANIFEST = "zotune_manifest.json"

WEIGHTS_INDEX = "model.safetensors.index.json"

#: Of a GGUF model: its adapter, the adapter's Modelfile, and which file the model is.
GGUF_ADAPTER, MODELFILE, GGUF_SOURCE = "adapter.gguf", "Modelfile", "zotune_gguf.json"


def other_format(path: str | os.PathLike[str], found: Any) -> str | None:
    """Why a folder of format ``found`` is refused, in one sentence with the fix; None for the present format."""
    if found == FORMAT:
        return None
    if isinstance(found, int) and found > FORMAT:
        return f"{path} was written by a later version of zotune (format {found}; this one reads {FORMAT}): upgrade zotune."
    return (
        f"{path} was written by an earlier version of zotune (format {found}; this one reads {FORMAT}): use that version, or start a new "
        "run in another output_dir, from its weights (--model_name_or_path) where they shall be kept."
    )


def save_json(path: Path, content: Any) -> None:
    """Writes JSON; floats keep every bit."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_json(path: Path) -> Any:
    """Reads a JSON file; ValueError where it is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: resume from another checkpoint.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): resume from another checkpoint.") from None
