"""The parts of ``python -m benchmarks gpu-session``: what each does, and the command that does it.

To add a part, append it to PARTS.
"""

import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple


class Setting(NamedTuple):
    """What a part's command is made of: where its files go, and how many minutes it has."""

    out: pathlib.Path
    minutes: float
    dry_run: bool

    @property
    def dry(self) -> list[str]:
        return ["--dry-run"] if self.dry_run else []

    @property
    def within(self) -> list[str]:
        """The part begins nothing new near the end of its time."""
        return ["--minutes", f"{0.9 * self.minutes:.2f}"]


class Part(NamedTuple):
    """One process with a time limit of its own; two parts may share a name, and then run one after the other.

    seconds: what it should take on an H100. The time of a session is divided by these among the parts that
    are still to come, so what one leaves the others have. lines: how many lines at most of the last paragraph
    that it prints go to the summary. What a part's exit status says, statuses.py lists.
    """

    name: str
    what: str
    seconds: float
    command: Callable[[Setting], list[str]]
    lines: int = 1


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def _tests(marked: str, dry_run: bool, a_file: str) -> list[str]:
    """On all cores, because most of the time goes to compiling kernels; of a dry run the names in one file.

    Whatever can run without a GPU CI has run when it comes to a dry run.
    """
    if dry_run:
        how = ["--collect-only", "-q", a_file]
    elif importlib.util.find_spec("xdist"):
        how = ["-n", str(len(os.sched_getaffinity(0)))]
    else:
        how = []
    return _python("pytest", "-rfE", "-p", "no:cacheprovider", "-m", marked, *how)


def _mnist(*arguments: str) -> list[str]:
    return [sys.executable, "examples/train_mnist.py", *arguments]


def _smoke(s: Setting) -> list[str]:
    # With so few steps the usual learning rate of 0.001 does not reach the bar of 97 %.
    return _mnist("--epochs", "3", "--batch-size", "512", "--lr", "0.003")


def _gpu(s: Setting) -> list[str]:
    return _tests("gpu", s.dry_run, "tests/torch_tools/test_cuda_graph.py")


def _steps(s: Setting) -> list[str]:
    return _python("benchmarks.step_kernels", "--output", str(s.out / "steps.json"), *s.dry)


def _ladder(s: Setting) -> list[str]:
    size = (
        ["--epochs", "1", "--batch-size", "6000"] if s.dry_run else ["--epochs", "2", "--batch-size", "512"]
    )
    return _mnist("--ladder", *size, "--log", str(s.out / "mnist-ladder.json"))


def _race(s: Setting) -> list[str]:
    return _mnist("--race", "--seeds", "1" if s.dry_run else "10", "--log", str(s.out / "mnist-race.json"))


def _kernels(s: Setting) -> list[str]:
    return _tests("kernels and not gpu", s.dry_run, "tests/kernels/test_kernels.py")


def _numerics(s: Setting) -> list[str]:
    return _python("benchmarks.numerics", *s.within, *(["--small"] if s.dry_run else []))


def _sanitize(s: Setting) -> list[str]:
    return _python("benchmarks.numerics", "--sanitize", *s.within)


def _tuning(s: Setting) -> list[str]:
    return _python("benchmarks.tuned", "--out", str(s.out), *s.within, *s.dry)


def _quick(s: Setting) -> list[str]:
    return _python("benchmarks", "run", "--quick", "--no-report", "--out", str(s.out), *s.within, *s.dry)


def _profiles(s: Setting) -> list[str]:
    return _python("benchmarks.profiles", "--out", str(s.out), "--cases", "1" if s.dry_run else "6")


PARTS = (
    Part("smoke", "MNIST as in the README, 3 epochs: TrainStep.epoch against the loop", 60, _smoke, lines=12),
    Part("gpu", "the tests that need a GPU", 110, _gpu, lines=10),
    Part("steps", "a training step's forms: launches, graphs, the persistent one", 180, _steps, lines=50),
    Part("mnist", "MNIST, the ladder: 2 epochs of each way to train", 120, _ladder, lines=24),
    Part("mnist", "MNIST, the race to 98 % with 10 seeds", 30, _race, lines=8),
    Part("kernels", "the kernels' tests, compiled by Triton, not interpreted", 240, _kernels, lines=10),
    Part("numerics", "every result at real sizes against float64", 150, _numerics, lines=8),
    Part("sanitize", "small cases under compute-sanitizer's memcheck", 100, _sanitize, lines=6),
    Part("tuning", "fusedmlp.tune in bfloat16, TF32 and float32", 240, _tuning, lines=3),
    Part("quick", "the most telling benchmarks against the best of PyTorch", 220, _quick, lines=8),
    Part("profiles", "profiles of the cases that are farthest from the floor", 40, _profiles, lines=8),
)
FIRST = ("smoke", "gpu", "steps", "mnist")  # of three commands that fit into ten minutes each
SECOND = ("kernels", "numerics", "sanitize")
THIRD = ("tuning", "quick", "profiles")
NAMES = tuple(dict.fromkeys(part.name for part in PARTS))
