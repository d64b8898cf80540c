"""The resident memory of training, measured in a process of its own.

The C library and MKL keep freed memory, which would count as used: the environment makes them return it to the system.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from zotune.memory.estimate import measure
from zotune.memory.shapes import build
from zotune.memory.workload import Workload
from zotune.training.peak_memory import PeakMemory

#: glibc returns allocations above so many bytes at once, and MKL its work space.
_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "MKL_DISABLE_FAST_MM": "1",
}


def process_peak(workload: Workload) -> int:
    """Bytes by which a training process grows at its peak, over one that has loaded its libraries.

    Raises:
        MemoryError: the process failed.
    """
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "zotune.memory.process"]
    done = subprocess.run(command, input=workload.to_json(), env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise MemoryError(f"the measured process failed: {reason[0]}")
    return int(json.loads(done.stdout.splitlines()[-1])["added"])


def growth(workload: Workload) -> int:
    """Bytes by which this process grows while steps run, the model included.

    Building a model may take more for a moment: a head is made before it is tied to the embedding. That does not count.
    """
    memory = PeakMemory(torch.device("cpu"))
    before = memory.baseline
    model = build(workload.config, workload.dtype, masked=workload.masked)
    memory.start()
    measure(workload, model=model, ledger=False)
    return memory.peak() - before


def main() -> None:
    """The measured process: reads a workload (JSON) from standard input and prints the bytes by which it grew."""
    from transformers import GPT2Config

    workload = Workload.from_json(sys.stdin.read())
    # First on a toy model, for the buffers and code of the libraries.
    toy = GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=1000, n_positions=64, bos_token_id=0, eos_token_id=0)
    measure(workload.with_(config=toy, batch_size=2, sequence_length=32, scored=None, masked=False), ledger=False)
    print(json.dumps({"added": growth(workload)}))


if __name__ == "__main__":
    main()
