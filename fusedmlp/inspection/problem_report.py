"""Write a file for a bug report: ``python -m fusedmlp --report FILE``."""

import contextlib
import io
import os
import pathlib
import platform
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable

import torch

# Environment variables that may have caused a problem.
_VARIABLES = re.compile(r"(FUSEDMLP|TRITON|TORCH|PYTORCH|CUDA|CUBLAS|NVIDIA|OMP|MKL|LD_LIBRARY_PATH|CC$)")
_NVIDIA_SMI = "nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used,compute_mode --format=csv"


class _Both(io.TextIOBase):
    """A stream that writes to the terminal and into the report."""

    def __init__(self, terminal: io.TextIOBase, report: io.TextIOBase) -> None:
        self.terminal, self.report = terminal, report

    def write(self, text: str) -> int:
        self.report.write(text)
        return self.terminal.write(text)

    def flush(self) -> None:
        self.terminal.flush()


def write(file: pathlib.Path, run: Callable[[], int]) -> int:
    """Describe this machine in ``file``, call ``run``, and add its output, its warnings and its error.

    Each line is written at once, so that a crash leaves the earlier lines in the file. Returns the exit
    status of ``run``, or 1 if it raised. Raises OSError if the file cannot be written.
    """
    with file.open("w", encoding="utf-8", buffering=1) as report:
        report.write(f"$ {' '.join(['python -m fusedmlp', *sys.argv[1:]])}\n\n{machine()}\n\n")
        with (
            contextlib.redirect_stdout(_Both(sys.stdout, report)),  # type: ignore[arg-type]
            contextlib.redirect_stderr(_Both(sys.stderr, report)),  # type: ignore[arg-type]
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("always")
            try:
                status = run()
            except Exception:
                print("\nIt failed:\n")
                traceback.print_exc(file=sys.stdout)
                status = 1
        report.write(f"\nexit status {status}\n")
    print(f"\nAll of this, and more about this machine, is in {file}.")
    print("Read it before you send it: it names folders of yours.")
    return status


def machine() -> str:
    """The system, the GPUs and their driver, and the environment variables that may matter."""
    lines = [platform.platform(), f"Python {platform.python_version()}, {sys.executable}"]
    lines.append(f"PyTorch is built for CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    lines += ["", *_gpus(), ""]
    lines += [f"{name}={value}" for name, value in sorted(os.environ.items()) if _VARIABLES.match(name)]
    return "\n".join(lines).rstrip()


def _gpus() -> list[str]:
    try:
        run = subprocess.run(_NVIDIA_SMI.split(), capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi does not run: {type(error).__name__}: {error}"]
    return (run.stdout.strip() or run.stderr.strip()).splitlines()
