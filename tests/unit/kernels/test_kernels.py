"""The triton kernels give the numbers of the plain reference, bit for bit (checked by triton's interpreter, which needs no GPU)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import paths
from zotune.kernels import perturb_kernels


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install zotune[kernels])")
def test_the_kernel_equals_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when a kernel is made, so it needs a process of its own
    command = [sys.executable, "-W", "error", str(paths.HELPERS / "kernel_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "kernel equals reference" in done.stdout


def test_a_cpu_goes_without_kernels():
    assert perturb_kernels(torch.empty(3)) is None
