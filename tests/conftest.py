"""Where kernels run: on the GPU if there is one, else in Triton's interpreter, else not at all."""

import atexit
import os
import shutil
import tempfile
from typing import Any

import faster_interpreter
import pytest
import torch
from available import HAS_TRITON

if HAS_TRITON and not torch.cuda.is_available():
    # Before anything imports the kernels: Triton reads it when it decorates them.
    os.environ["TRITON_INTERPRET"] = "1"
    faster_interpreter.install()

# What a user has measured on this machine changes no test, and no test changes that.
os.environ["XDG_CACHE_HOME"] = _CACHE = tempfile.mkdtemp(prefix="fusedmlp-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

torch.set_num_threads(1)  # pytest-xdist uses the cores; and sums in one order


pytest_plugins = ["card", "compatibility", "failing", "networks"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("kernels") and not HAS_TRITON:
            item.add_marker(pytest.mark.skip(reason="Triton is not installed: no kernels to run"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> torch.device:
    """The device of the kernels: CPU tensors in the interpreter where there is no GPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many random cases and how many builds there were, which the counts of tests do not say."""
    count = {False: 0, True: 0}
    on_stub: dict[int, str] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for key, value in report.user_properties:
                    if key == "random cases":
                        kernels, cases = value
                        count[kernels] += cases
                    if key == "builds and launches":
                        arch, builds, launches = value
                        on_stub[arch] = f"sm_{arch} {builds} and {launches}"
    if any(count.values()):
        terminalreporter.write_line(
            f"{sum(count.values())} random cases: {count[False]} on PyTorch's operators, "
            f"{count[True]} where the kernels can run"
        )
    if on_stub:
        counts = ", ".join(on_stub[arch] for arch in sorted(on_stub))
        terminalreporter.write_line(f"builds and launches on a stub of the driver: {counts}")
