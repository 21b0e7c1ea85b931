"""Replace kernels by ones that fail as Triton's do, for the tests of what happens then."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from fusedmlp.dispatch import predicate


def out_of_resources() -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(262144, 166912, "shared memory")


def compilation_error() -> Exception:
    from triton.compiler.errors import CompilationError

    return CompilationError(None, None, "a number is no power of two")


def ptxas_error() -> Exception:
    from triton.runtime.errors import PTXASError

    return PTXASError("an unknown instruction")


ERRORS: dict[str, Callable[[], Exception]] = {
    "shared memory": out_of_resources,
    "compile": compilation_error,
    "ptxas": ptxas_error,
    "launch": lambda: RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
    "no C compiler": lambda: RuntimeError("Failed to find C compiler.\nPlease specify one"),
    "assertion": lambda: AssertionError(),
}


class Failing:
    """Replaces a kernel: every launch, or only the one with this number, raises an error as Triton does."""

    def __init__(self, kernel: Any, error: Callable[[], Exception], number: int | None) -> None:
        self.kernel, self.error, self.number = kernel, error, number
        self.__name__ = kernel.__name__
        self.launches = 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        if self.number in (None, self.launches - 1):
            raise self.error()
        return self.kernel[grid]

    def run(self, *arguments: Any, **options: Any) -> Any:
        """Build the kernel on a GPU without launching it."""
        return self.kernel.run(*arguments, **options)


def ours(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    """The warnings of this package alone: Triton 3.6's interpreter makes NumPy warn in every launch."""
    return [str(one.message) for one in caught if one.category is RuntimeWarning]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Failing]:
    """``fail(module, name, error, number)`` makes a kernel fail. After the test all kernels may run again."""
    monkeypatch.setattr(predicate, "failed", {})

    def put(module: Any, name: str, error: Callable[[], Exception], number: int | None = None) -> Failing:
        failing = Failing(getattr(module, name), error, number)
        monkeypatch.setattr(module, name, failing)
        return failing

    return put
