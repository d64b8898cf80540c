"""The processes of `torchrun --nproc-per-node N tests/SCRIPT OUT ...` at the cost of one start.

`python tests/helpers/forked.py SCRIPT N OUT ... -- SCRIPT N OUT ...` runs one after the other. Torch and the rest are imported once, and
the processes fork from that before any of them has computed anything. N+R instead of N: under torchrun's agent, with R restarts.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import traceback
from itertools import groupby
from pathlib import Path

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


if __name__ == "__main__":
    sys.exit(max(main(*job) for last, job in groupby(sys.argv[1:], key=lambda word: word == "--") if not last))
