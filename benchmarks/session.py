"""``python -m benchmarks gpu-session``: run all tests and benchmarks that need a GPU within a few minutes.

Each part runs in its own process with its own time limit. A part that fails or takes too long is reported,
and the next one starts. parts.py lists the parts.
"""

import argparse
import collections
import contextlib
import datetime
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import IO, Any, NamedTuple

import torch

import benchmarks
from benchmarks import report, results
from benchmarks.bounded_log import BoundedLog
from benchmarks.parts import FIRST, NAMES, PARTS, SECOND, THIRD, Part, Setting
from benchmarks.statuses import AGAIN, LEFT_OUT, TIME_OVER

GRACE = 20  # seconds that a part has after the interrupt to write its results, before it is killed
FINISH = 5  # seconds at the end to read the last output and write the summary
OVER = (TIME_OVER, AGAIN)  # the exit statuses of a part whose time was over
LOG_BYTES = 12 * 2**20
ERROR_LINES = 6  # how many of the last lines of a failed part's standard error go to the summary
LAST_LINES = 100  # how many lines of a part's output are searched for its last paragraph
# The files that --resume copies: parts continue from them, or a later summary and report need them.
KEPT = ("results.json", "steps.json", "mnist-ladder.json", "mnist-race.json", "tuned_*.json")


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "gpu-session",
        help="run everything that needs a GPU",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Run tests, numerics, compute-sanitizer, training steps, MNIST, tuning, benchmarks
and profiles on a GPU that is rented for minutes. A part that fails or takes too
long does not affect the others, and each result is written at once. At most 8
files are written into one folder, each below 16 MiB: summary.md, log.txt,
steps.json, mnist-ladder.json, mnist-race.json, results.json, profiles.txt, and
tuned_*.json, a table for kernels/.""",
        epilog=f"""\
three commands, each of less than ten minutes, run everything:
  python -m benchmarks gpu-session --minutes 9
  python -m benchmarks gpu-session --minutes 9 --resume gpu-session \\
      --parts {",".join(SECOND)}
  python -m benchmarks gpu-session --minutes 9 --resume gpu-session \\
      --parts {",".join(THIRD)}

--list shows what each part does. Compiled kernels are kept for the next command,
in ~/.cache/fusedmlp/gpu-session or the same folder of XDG_CACHE_HOME.
Exit status: 0 if every part was done or left out, 1 if not, 2 if nothing was
started, 130 after an interrupt.""",
    )
    parser.add_argument(
        "--parts",
        type=_names,
        default=FIRST,
        metavar="NAME,...",
        help=f"the parts to run, in the order of --list (default: {','.join(FIRST)})",
    )
    parser.add_argument("--list", action="store_true", help="show what each part does, and run nothing")
    out, folder = pathlib.Path("gpu-session"), pathlib.Path
    parser.add_argument("--out", type=folder, default=out, metavar="DIR", help="default: %(default)s")
    resume = "copy results and tables from the --out of an earlier command, and continue from them"
    parser.add_argument("--resume", type=folder, metavar="DIR", help=resume)
    minutes = "end everything after this time (default: %(default)g)"
    parser.add_argument("--minutes", type=float, default=9.0, metavar="N", help=minutes)
    dry_run = "run the parts with tiny sizes on the CPU, in Triton's interpreter"
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    parser.set_defaults(run=run)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        said = f"there is no part {', '.join(unknown)}" if unknown else "no part is named"
        raise argparse.ArgumentTypeError(f"{said}; there are {', '.join(NAMES)}")
    return names


def run(options: argparse.Namespace) -> int:
    if options.list:
        print("\n".join(_list()))
        return 0
    problem = _why_not(options)
    if problem is not None:
        print(problem, file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    cache = _cache(options.dry_run)
    for line in _take_up(options.resume, out, cache, options.dry_run):
        print(line)
    chosen = [part for part in PARTS if part.name in options.parts]
    return go(chosen, out, cache, benchmarks.BEGAN + 60 * options.minutes, options.dry_run)


def _list() -> list[str]:
    lines = [f"{'part':<10} {'seconds':>7}  what it does"]
    lines += [f"{part.name:<10} {part.seconds:>7g}  {part.what}" for part in PARTS]
    return [
        *lines,
        "",
        "The seconds are estimates for an H100; the parts share the available time in proportion to them.",
        f"Parts run in this order. The default is {', '.join(FIRST)}.",
    ]


def _why_not(options: argparse.Namespace) -> str | None:
    """Why the command cannot start; then nothing is written. None if it can."""
    if not options.minutes > 0:
        return f"--minutes must be positive, got {options.minutes:g}"
    if not results.has_triton():
        return "Triton is not installed, so there are no kernels to measure: pip install triton"
    if not options.dry_run and not torch.cuda.is_available():
        return "there is no CUDA device; --dry-run runs the parts on the CPU"
    if options.resume is not None and not options.resume.is_dir():
        return f"--resume: there is no folder {options.resume}"
    if options.resume is not None and not _kept(options.resume):
        return f"--resume: {options.resume} has none of {', '.join(KEPT)}"
    if "quick" in options.parts:
        try:
            _fitting(options.out / "results.json", options.dry_run)
        except results.Unreadable as problem:
            return f"{problem}. Choose another --out, or move the file away"
    return None


def _kept(folder: pathlib.Path) -> list[pathlib.Path]:
    return [file for pattern in KEPT for file in sorted(folder.glob(pattern))]


def _fitting(file: pathlib.Path, dry_run: bool) -> None:
    """Raise Unreadable if the part "quick" cannot continue from this file; a missing file is fine."""
    if file.exists():
        before, found = results.read(file), results.about(_device(dry_run), dry_run)
        if dry_run:  # its parts use one thread, so the numbers of threads differ
            before["device"], found["device"] = before["device"]["name"], found["device"]["name"]
        results.same_or_unreadable(before, found, file)


def _device(dry_run: bool) -> torch.device:
    return torch.device("cpu" if dry_run else "cuda")


def _cache(dry_run: bool) -> pathlib.Path:
    """A folder for compiled kernels and for the session's own tuning table.

    It stays after the command, so that the next one on the same machine does not compile again.
    """
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache").resolve()
    cache = caches / "fusedmlp" / "gpu-session" / ("dry-run" if dry_run else "")
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    return cache


def _take_up(resume: pathlib.Path | None, out: pathlib.Path, cache: pathlib.Path, dry_run: bool) -> list[str]:
    """Copy the earlier command's files to where the parts look for them; returns messages."""
    from fusedmlp.kernels import tuning_table  # imports Triton

    here = tuning_table.where(None if dry_run else torch.cuda.current_device())
    table = cache / "fusedmlp" / tuning_table.users_file(here).name
    if resume is None:
        table.unlink(missing_ok=True)  # left by an earlier session, perhaps with other kernels
        return []
    said = []
    for file in _kept(resume):
        if (out / file.name).exists():
            continue
        if file.name == "results.json":
            try:
                _fitting(file, dry_run)
            except results.Unreadable as problem:
                said.append(f"not taken: {problem}")
                continue
        shutil.copyfile(file, out / file.name)
        said.append(f"taken from {resume}: {file.name}")
    shipped = out / tuning_table.shipped_file(here).name
    if not table.exists() and tuning_table.read(shipped, here, exact=True) is not None:
        table.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shipped, table)
    return said


class Outcome(NamedTuple):
    part: Part
    verdict: str
    good: bool
    seconds: float
    said: list[str]


def go(parts: Sequence[Part], out: pathlib.Path, cache: pathlib.Path, end: float, dry_run: bool) -> int:
    """Run the parts, and finish before time.monotonic() reaches ``end``.

    Returns 0 if all parts were done or left out, 130 after an interrupt, otherwise 1.
    """
    summary = out / "summary.md"
    before = summary.read_text(encoding="utf-8") + "\n" if summary.exists() else ""
    head = _head(dry_run)
    environment = _environment(cache, dry_run)
    outcomes: list[Outcome] = []
    interrupted = False
    with BoundedLog(out / "log.txt", LOG_BYTES) as log:
        try:
            for i, part in enumerate(parts):
                left = end - GRACE - FINISH - time.monotonic()
                limit = left * part.seconds / sum(later.seconds for later in parts[i:])
                log.begin_section(len(parts) - i)
                if limit < 1:
                    outcomes.append(Outcome(part, "no time was left", False, 0.0, []))
                else:
                    which = f"{i + 1} of {len(parts)}: {part.name}"
                    print(f"{which}, {_time(limit)} at most: {part.what}", flush=True)
                    outcomes.append(_run(part, Setting(out, limit / 60, dry_run), environment, log))
                    print(f"    {outcomes[-1].verdict}, {_time(outcomes[-1].seconds)}", flush=True)
                results.replace_file(summary, before + _page(head, outcomes, out))
        except KeyboardInterrupt:
            interrupted = True
            for part in parts[len(outcomes) :]:
                verdict = "not begun" if outcomes and outcomes[-1].verdict == "interrupted" else "interrupted"
                outcomes.append(Outcome(part, verdict, False, 0.0, []))
    page = _page(head, outcomes, out)
    results.replace_file(summary, before + page)
    print(f"\n{page}", end="")
    return 130 if interrupted else 0 if all(outcome.good for outcome in outcomes) else 1


def _environment(cache: pathlib.Path, dry_run: bool) -> dict[str, str]:
    """The environment of the parts' processes: it finds the checkout, and uses the session's cache."""
    path = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(results.ROOT), *([path] if path else [])]),
        "XDG_CACHE_HOME": str(cache),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "COLUMNS": "80",
        "TQDM_MININTERVAL": "60",  # the log is no terminal
        "PYTHONFAULTHANDLER": "1",  # prints where a crash happened
    }
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return environment


def _run(part: Part, setting: Setting, environment: dict[str, str], log: BoundedLog) -> Outcome:
    """Run one part, and write its output to the log as it comes."""
    began = time.monotonic()
    while True:
        left = 60 * setting.minutes - (time.monotonic() - began)
        command = part.command(setting._replace(minutes=left / 60))
        log.write(f"\n{'#' * 80}\n# {part.name}: {part.what}\n# {' '.join(command)}\n\n")
        status, output, errors = _output(command, left, environment, log)
        if status != AGAIN or time.monotonic() - began > 60 * setting.minutes:
            break
    last_paragraph = "\n".join(output).rstrip().rpartition("\n\n")[2]
    said = last_paragraph.splitlines()[-part.lines :]
    verdict = _verdict(status, said)
    log.write(f"\n# {part.name}: {verdict}\n")
    good = status in (0, LEFT_OUT)
    if not good and status not in OVER:
        said += [line for line in errors if line][-ERROR_LINES:]
    return Outcome(part, verdict, good, time.monotonic() - began, said)


def _verdict(status: int, said: Iterable[str]) -> str:
    if status in OVER:
        counts = [line.strip() for line in said if line.endswith(" done")]
        return ": ".join(["time was over", *counts[-1:]])
    if status == LEFT_OUT:
        return "left out"
    if status < 0:
        return f"CRASHED by signal {-status} ({signal.Signals(-status).name})"
    return "done" if status == 0 else f"FAILED with exit status {status}"


def _output(
    command: list[str], seconds: float, environment: dict[str, str], log: BoundedLog
) -> tuple[int, list[str], list[str]]:
    """Run a command in its own process group.

    Returns its exit status, or TIME_OVER if it was stopped, and the last lines of its output and errors.
    """
    process = subprocess.Popen(
        command, cwd=results.ROOT, env=environment, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    output, errors = (collections.deque[str](maxlen=LAST_LINES) for _ in range(2))

    def read(stream: IO[str], lines: collections.deque[str]) -> None:
        for line in stream:
            log.write(line)
            lines.append(line.rstrip())

    assert process.stdout is not None
    assert process.stderr is not None
    streams = ((process.stdout, output), (process.stderr, errors))
    readers = [threading.Thread(target=read, args=pair, daemon=True) for pair in streams]
    for reader in readers:
        reader.start()
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = TIME_OVER
    finally:  # also after an interrupt
        if process.poll() is None:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        _signal(process, signal.SIGKILL)  # also stops the processes that it started
        process.wait()
        for reader in readers:
            reader.join(FINISH / 3)
    return status, list(output), list(errors)


def _signal(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _head(dry_run: bool) -> list[str]:
    found = results.about(_device(dry_run), dry_run)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
    return [
        f"# gpu-session on {found['device']['name']}",
        "",
        *([f"**{report.DRY}**", ""] if dry_run else []),
        f"- {report.where(found)}",
        f"- fusedmlp {found['versions']['fusedmlp']}, commit {found['commit'] or 'unknown'}, {now}",
        f"- `{found['command']}`",
    ]


def _page(head: Sequence[str], outcomes: Sequence[Outcome], out: pathlib.Path) -> str:
    """The summary. A part's last lines are indented by four spaces, so Markdown shows them unchanged."""
    lines = list(head)
    for outcome in outcomes:
        part = outcome.part
        lines += ["", f"## {part.name}: {outcome.verdict}, {_time(outcome.seconds)}", "", f"{part.what}"]
        if outcome.said:
            lines += ["", *("    " + line[:200] for line in outcome.said)]
    if (out / "results.json").exists():
        file = out / "results.json"
        lines += ["", f"Tables and plots: `python -m benchmarks report {file} --out report`"]
    return "\n".join(lines) + "\n"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
