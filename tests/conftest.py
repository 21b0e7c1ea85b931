"""Setup of all tests. Kernels run on the GPU if there is one, else in Triton's interpreter if it is there."""

import atexit
import operator
import os
import shutil
import tempfile
from typing import Any

import faster_interpreter
import pytest
import torch
from available import HAS_TRITON

if HAS_TRITON and not torch.cuda.is_available():
    # This must be set before the kernels are imported, because Triton reads it when it decorates them.
    os.environ["TRITON_INTERPRET"] = "1"
    faster_interpreter.install()

# Tests must neither read nor change the tables of measurements that a user has on this machine.
os.environ["XDG_CACHE_HOME"] = _CACHE = tempfile.mkdtemp(prefix="fusedmlp-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

torch.set_num_threads(1)  # pytest-xdist uses the cores, and results must not depend on the order of sums


pytest.register_assert_rewrite("converted", "inspected")  # their asserts then tell what differs
pytest_plugins = ["card", "compatibility", "failing", "networks"]


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("thinned") and not runs_by_default(item):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("kernels") and not HAS_TRITON:
            item.add_marker(pytest.mark.skip(reason="Triton is not installed: no kernels to run"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def runs_by_default(item: Any) -> bool:
    """Whether this is one of the combinations that a thinned test runs by default.

    They are as many as the longest list of values has. In the i-th one each parameter has its i-th value, and
    the shorter lists begin again. Parameters of fixtures do not count: those are combined with all of them.
    """
    places, counts = [], []
    for names, values in (marker.args for marker in item.iter_markers("parametrize")):
        given = [item.callspec.params[name] for name in ([names] if isinstance(names, str) else names)]
        lists = [[value] if isinstance(names, str) else value for value in values]
        places.append(next(i for i, one in enumerate(lists) if all(map(operator.is_, one, given))))
        counts.append(len(lists))
    return any([i % count for count in counts] == places for i in range(max(counts)))


@pytest.fixture
def device() -> torch.device:
    """The device of the kernels: CPU tensors in the interpreter where there is no GPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many random cases ran and how many kernels were built: the counts of tests do not tell."""
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
