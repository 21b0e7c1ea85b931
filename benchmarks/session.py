"""``python -m benchmarks gpu-session``: all that a rented card is worth, in order of value.

Each part is a process of its own with a limit of its own: what fails or takes too long is told of, and the
next one goes on. To add a part, append it to PARTS.
"""

import argparse
import collections
import contextlib
import datetime
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

import torch

from benchmarks import report, results
from benchmarks.numerics import LEFT_OUT
from benchmarks.sweep import AGAIN

GRACE = 20  # seconds from the interrupt, upon which a part writes what it has, to the end of it


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
        """It begins nothing new near the end of its time."""
        return ["--minutes", f"{0.9 * self.minutes:.2f}"]


class Part(NamedTuple):
    """share: of the time, by those of the parts that are still to come, so what one leaves the others have;
    lines: of the last paragraph that it prints, how many lines at most go to the summary. A part exits with
    LEFT_OUT if it cannot run here, for the reason in its last line, and with AGAIN to be started again."""

    name: str
    share: float
    command: Callable[[Setting], list[str]]
    lines: int = 1


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def _kernels_tests(s: Setting) -> list[str]:
    files = ("tests/test_kernels.py", "tests/test_mlp.py", "tests/test_autograd.py")
    chosen = ("tests/test_kernels.py", "-k", "rounds_once") if s.dry_run else files
    return _python("pytest", "-q", "-m", "gpu or kernels", *chosen)


def _all_tests(s: Setting) -> list[str]:
    # CI has just run them when it comes to a dry run.
    how = ["--collect-only"] if s.dry_run else ["-n", "4"] if importlib.util.find_spec("xdist") else []
    return _python("pytest", "-q", "-m", "gpu or kernels", *how)


def _numerics(s: Setting) -> list[str]:
    return _python("benchmarks.numerics", *s.within, *(["--small"] if s.dry_run else []))


def _sanitizer(s: Setting) -> list[str]:
    return _python("benchmarks.numerics", "--sanitize")


def _tuning(s: Setting) -> list[str]:
    return _python("benchmarks.tuned", "--out", str(s.out), *s.within, *s.dry)


def _benchmarks(s: Setting) -> list[str]:
    return _python("benchmarks", "run", "--no-report", "--out", str(s.out), *s.within, *s.dry)


def _report(s: Setting) -> list[str]:
    return _python("benchmarks", "report", str(s.out / "results.json"), "--out", str(s.out / "report"))


def _profiles(s: Setting) -> list[str]:
    return _python("benchmarks.profiles", "--out", str(s.out), "--cases", "1" if s.dry_run else "6")


def _steps(s: Setting) -> list[str]:
    return _python("benchmarks.step_kernels", "--output", str(s.out / "steps.json"), *s.dry)


def _mnist(s: Setting, *arguments: str) -> list[str]:
    return [sys.executable, "examples/train_mnist.py", *arguments]


def _ladder(s: Setting) -> list[str]:
    size = ["--batch-size", "512", "--epochs", "1" if s.dry_run else "5"]
    return _mnist(s, "--ladder", *size, "--log", str(s.out / "mnist-ladder.json"))


def _race(s: Setting) -> list[str]:
    # The median of three: of ten seeds the worst was at 98.06 %, and other processors round otherwise.
    return _mnist(s, "--race", "--seeds", "3" if s.dry_run else "10", "--log", str(s.out / "mnist-race.json"))


PARTS = (
    Part("the kernels' tests", 2, _kernels_tests),
    Part("all tests that a GPU can run", 3, _all_tests),
    Part("numerics at real sizes against float64", 2, _numerics, lines=2),
    Part("compute-sanitizer", 2, _sanitizer, lines=2),
    Part("the training step: launches, graphs, the persistent form", 2, _steps, lines=8),
    Part("MNIST, the ladder", 2, _ladder, lines=20),
    Part("MNIST, the race to 98 %", 1, _race, lines=6),
    Part("tuning", 5, _tuning),
    Part("benchmarks", 8, _benchmarks, lines=5),
    Part("tables and plots, in report/", 1, _report, lines=0),
    Part("profiles of what is farthest from the floor", 2, _profiles, lines=7),
)


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "gpu-session",
        help="everything that a rented card is worth",
        description="Tests, numerics, compute-sanitizer, training steps, MNIST, tuning, benchmarks and "
        "profiles, in order of value. A part that fails or takes too long loses nothing before it and stops "
        "nothing after it. To be brought back from DIR: summary.md, log.txt and all *.json, of which "
        "tuned_*.json is a table for kernels/; report/ comes from results.json. With the DIR of an "
        "interrupted session tuning and benchmarks go on from there.",
        epilog="example: python -m benchmarks gpu-session --out session --minutes 28",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="N", help="default: %(default)g")
    parser.add_argument(
        "--dry-run", action="store_true", help="every part on the CPU, tiny, in Triton's interpreter"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if not options.minutes > 0:
        print(f"--minutes must be positive, got {options.minutes:g}", file=sys.stderr)
        return 2
    if not results.has_triton():
        print("Triton is not installed, so there are no kernels to try: pip install triton", file=sys.stderr)
        return 2
    if not options.dry_run and not torch.cuda.is_available():
        print("there is no CUDA device; --dry-run exercises every part on the CPU", file=sys.stderr)
        return 2
    return go(PARTS, options.out, options.minutes, options.dry_run)


class Outcome(NamedTuple):
    name: str
    verdict: str
    good: bool
    seconds: float
    said: list[str]


def go(parts: Sequence[Part], out: pathlib.Path, minutes: float, dry_run: bool) -> int:
    """Run the parts; 0 if all did what they should, 130 after an interrupt, else 1."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    cache = tempfile.mkdtemp(prefix="fusedmlp-session-")  # no table but this session's
    environment = os.environ | {"XDG_CACHE_HOME": cache}
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    end = time.monotonic() + 60 * minutes
    head = _head(dry_run)
    outcomes: list[Outcome] = []
    interrupted = False
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        try:
            for i, part in enumerate(parts):
                left = end - time.monotonic()
                limit = left * part.share / sum(later.share for later in parts[i:])
                if left < 1:
                    outcomes.append(Outcome(part.name, "no time was left", False, 0.0, []))
                else:
                    print(f"{i + 1} of {len(parts)}: {part.name}, {_time(limit)} at most", flush=True)
                    setting = Setting(out, limit / 60, dry_run)
                    outcomes.append(_run(part, setting, environment, log))
                    last = outcomes[-1]
                    print(f"    {last.verdict}, {_time(last.seconds)}", flush=True)
                _write(out / "summary.md", [*head, *_page(outcomes)])
        except KeyboardInterrupt:
            interrupted = True
            outcomes += [
                Outcome(part.name, "interrupted", False, 0.0, []) for part in parts[len(outcomes) :][:1]
            ]
            outcomes += [Outcome(part.name, "not begun", False, 0.0, []) for part in parts[len(outcomes) :]]
        finally:
            shutil.rmtree(cache, ignore_errors=True)
    page = [*head, *_page(outcomes)]
    _write(out / "summary.md", page)
    print("\n" + "\n".join(page))
    return 130 if interrupted else 0 if all(outcome.good for outcome in outcomes) else 1


def _run(part: Part, setting: Setting, environment: dict[str, str], log: IO[str]) -> Outcome:
    """One part, its output into the log as it comes."""
    began = time.monotonic()
    said: collections.deque[str] = collections.deque(maxlen=part.lines)
    while True:
        left = 60 * setting.minutes - (time.monotonic() - began)
        command = part.command(setting._replace(minutes=left / 60))
        log.write(f"\n{'#' * 80}\n# {part.name}\n# {' '.join(command)}\n\n")
        log.flush()
        status = _output(command, left, environment, log, said)
        if status != AGAIN or time.monotonic() - began > 60 * setting.minutes:
            break
    seconds = time.monotonic() - began
    if status is None:
        verdict = f"stopped after {_time(seconds)}, its time was over"
    elif status == LEFT_OUT:
        verdict = "left out"
    elif status < 0:
        verdict = f"CRASHED by signal {-status} ({signal.Signals(-status).name})"
    else:
        verdict = "done" if status == 0 else f"FAILED with exit status {status}"
    log.write(f"\n# {part.name}: {verdict}\n")
    log.flush()
    return Outcome(part.name, verdict, status in (0, LEFT_OUT), seconds, list(said))


def _output(
    command: list[str],
    seconds: float,
    environment: dict[str, str],
    log: IO[str],
    said: collections.deque[str],
) -> int | None:
    """Run it, in a group of processes of its own; its exit status, or None if its time was over."""
    process = subprocess.Popen(
        command, cwd=results.ROOT, env=environment, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
    )  # fmt: skip

    def read() -> None:
        assert process.stdout is not None
        paragraph = True
        for line in process.stdout:
            log.write(line)
            log.flush()
            if line.strip():
                if paragraph:
                    said.clear()
                said.append(line.rstrip())
            paragraph = not line.strip()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also after an interrupt
        if process.poll() is None:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        _signal(process, signal.SIGKILL)  # and whatever it has started
        process.wait()
        reader.join(10)


def _signal(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _head(dry_run: bool) -> list[str]:
    found = results.about(
        torch.device("cuda" if torch.cuda.is_available() and not dry_run else "cpu"), dry_run
    )
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
    return [
        f"# Session on {found['device']['name']}",
        "",
        *([f"**{report.DRY}**", ""] if dry_run else []),
        f"- {report.where(found)}",
        f"- fusedmlp {found['versions']['fusedmlp']}, commit {found['commit'] or 'unknown'}, {now}",
        "",
    ]


def _page(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for i, outcome in enumerate(outcomes, 1):
        lines.append(f"{i}. {outcome.name}: **{outcome.verdict}**, {_time(outcome.seconds)}")
        for line in outcome.said:
            lines += textwrap.wrap(line, 80, initial_indent="   ", subsequent_indent="     ")
    return lines


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _write(file: pathlib.Path, lines: Sequence[str]) -> None:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
