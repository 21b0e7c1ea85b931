"""Run a command inside the tests' process, for tests that do not need a new process."""

import contextlib
import importlib
import io
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import torch

ROOT = pathlib.Path(__file__).parents[2]


def call(main: Callable[[], int], *arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Call a command's ``main`` and return its status and output, as ``subprocess.run`` would.

    This saves the seconds that a new process needs to import PyTorch.
    """
    words = [main.__module__, *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", words),
    ):
        try:
            status = main()
        except SystemExit as stop:  # as Python ends a process
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=err)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def benchmarks(
    *arguments: str | pathlib.Path, module: str = "benchmarks.__main__"
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m benchmarks``, or one of its modules, on the CPU.

    Where there is a GPU, this takes a process that cannot see it.
    """
    if torch.cuda.is_available():
        command = [sys.executable, "-m", module, *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment)
    return call(importlib.import_module(module).main, *arguments)
