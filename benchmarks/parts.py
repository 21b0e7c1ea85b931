"""The parts of ``python -m benchmarks gpu-session``, each with its command. New ones go to PARTS."""

import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple


class Setting(NamedTuple):
    """What a part's command depends on: the folder of its files, and its time."""

    out: pathlib.Path
    minutes: float
    dry_run: bool

    @property
    def dry(self) -> list[str]:
        return ["--dry-run"] if self.dry_run else []

    @property
    def within(self) -> list[str]:
        """Begin nothing new near the end of the part's time."""
        return ["--minutes", f"{0.9 * self.minutes:.2f}"]


class Part(NamedTuple):
    """A process with its own time limit. Parts with the same name run one after the other.

    seconds: its expected time on an H100. The parts still to come share the time that is left in proportion
    to these. lines: how many lines of the last paragraph it prints go to the summary. statuses.py lists the
    exit statuses.
    """

    name: str
    what: str
    seconds: float
    command: Callable[[Setting], list[str]]
    lines: int = 1


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def _tests(marked: str, dry_run: bool, a_file: str) -> list[str]:
    """Run tests on all cores, because compiling takes most of the time. A dry run only lists one file."""
    if dry_run:
        how = ["--collect-only", "-q", a_file]
    elif importlib.util.find_spec("xdist"):
        how = ["-n", str(len(os.sched_getaffinity(0)))]
    else:
        how = []
    return _python("pytest", "-rfE", "-p", "no:cacheprovider", "-m", marked, *how)


def _mnist(*arguments: str) -> list[str]:
    return [sys.executable, "examples/train_mnist.py", *arguments]


def _ladder(s: Setting) -> list[str]:
    epochs, rows = ("1", "6000") if s.dry_run else ("2", "512")
    log = str(s.out / "mnist-ladder.json")
    return _mnist("--ladder", "--epochs", epochs, "--batch-size", rows, "--log", log)


def _race(s: Setting) -> list[str]:
    return _mnist("--race", "--seeds", "1" if s.dry_run else "10", "--log", str(s.out / "mnist-race.json"))


PARTS = (
    Part("smoke", "MNIST as in the README, 3 epochs: TrainStep.epoch against the loop", 60,
         # So few steps do not reach the bar of 97 % with the usual learning rate of 0.001.
         lambda s: _mnist("--epochs", "3", "--batch-size", "512", "--lr", "0.003"), lines=12),
    Part("gpu", "the tests that need a GPU", 110,
         lambda s: _tests("gpu", s.dry_run, "tests/torch_tools/test_cuda_graph.py"), lines=10),
    Part("steps", "a training step's forms: launches, graphs, the persistent one", 180,
         lambda s: _python("benchmarks.step_kernels", "--output", f"{s.out}/steps.json", *s.dry), lines=50),
    Part("mnist", "MNIST, the ladder: 2 epochs of each way to train", 120, _ladder, lines=24),
    Part("mnist", "MNIST, the race to 98 % with 10 seeds", 30, _race, lines=8),
    Part("kernels", "the kernels' tests, compiled by Triton instead of interpreted", 240,
         lambda s: _tests("kernels and not gpu", s.dry_run, "tests/kernels/test_kernels.py"), lines=10),
    Part("numerics", "every result at real sizes against float64", 150,
         lambda s: _python("benchmarks.numerics", *s.within, *(["--small"] if s.dry_run else [])), lines=8),
    Part("sanitize", "small cases under compute-sanitizer's memcheck", 100,
         lambda s: _python("benchmarks.numerics", "--sanitize", *s.within), lines=6),
    Part("tuning", "fusedmlp.tune in bfloat16, TF32 and float32", 240,
         lambda s: _python("benchmarks.tuned", "--out", str(s.out), *s.within, *s.dry), lines=3),
    Part("quick", "the most informative benchmarks against the best of PyTorch", 220,
         lambda s: _python(
             "benchmarks", "run", "--quick", "--no-report", "--out", str(s.out), *s.within, *s.dry
         ), lines=8),
    Part("profiles", "profiles of the cases that are farthest from the floor", 40,
         lambda s: _python(
             "benchmarks.profiles", "--out", str(s.out), "--cases", "1" if s.dry_run else "6"
         ), lines=8),
)  # fmt: skip
# The parts of three commands, each of which takes less than ten minutes.
FIRST = ("smoke", "gpu", "steps", "mnist")
SECOND = ("kernels", "numerics", "sanitize")
THIRD = ("tuning", "quick", "profiles")
NAMES = tuple(dict.fromkeys(part.name for part in PARTS))
