"""Commands, called in the tests' own process where nothing but that they are processes would be lost."""

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

ROOT = pathlib.Path(__file__).parent.parent


def call(main: Callable[[], int], *arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    """What a command would return and print. Starting a process and importing PyTorch takes it seconds."""
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
    """``python -m benchmarks``, or one of its modules, on a CPU: beside a GPU in a process that sees none."""
    if torch.cuda.is_available():
        command = [sys.executable, "-m", module, *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment)
    return call(importlib.import_module(module).main, *arguments)
