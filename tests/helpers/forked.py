"""The processes of `torchrun --nproc-per-node N tests/SCRIPT OUT ...` at the cost of one start.

`python tests/helpers/forked.py SCRIPT N OUT ... -- SCRIPT N OUT ...` runs one after the other. Torch and the rest are imported once, and
the processes fork from that before any of them has computed anything. N+R instead of N: under torchrun's agent, with R restarts.
A job that fails is run once more: connections were seen to break on a busy machine, and what fails twice is ours.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import socket
import sys
import traceback
from itertools import groupby
from pathlib import Path

import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def main(script: str, count: str, out: str, *words: str) -> int:
    processes, restarts = map(int, count.split("+")) if "+" in count else (int(count), 0)
    run = importlib.import_module(Path(script).stem).main
    if restarts:
        # The workers would find the addresses of those before the restart in the store that the agent shares with them.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        config = LaunchConfig(1, 1, processes, run_id="none", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
        config.max_restarts, config.monitor_interval = restarts, 0.02
        elastic_launch(config, run)(Path(out), *words)
        return 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                run(Path(out), *words)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


def leave() -> None:
    """Ends a process's part: no process closes its connections while another still receives over them."""
    with contextlib.suppress(RuntimeError):  # the last message of all may meet a closed connection, after which nothing is received
        dist.barrier()
    dist.destroy_process_group()


def succeeds(script: str, count: str, out: str, *words: str) -> bool:
    """Whether a job succeeds, at its second attempt where need be."""
    for attempt in (1, 2):
        try:
            if main(script, count, out, *words) == 0:
                return True
        except Exception:
            traceback.print_exc()
        print(f"attempt {attempt} of {script} {count} {out} failed", file=sys.stderr, flush=True)
        if attempt == 1:
            shutil.rmtree(out)
            Path(out).mkdir()
    return False


if __name__ == "__main__":
    sys.exit(not all(succeeds(*job) for last, job in groupby(sys.argv[1:], key=lambda word: word == "--") if not last))
