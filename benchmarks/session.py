"""``python -m benchmarks gpu-session``: what a rented card is worth, within the minutes that it is lent.

Each part is a process of its own with a time limit of its own: what fails or takes too long is told of, and
the next one goes on. parts.py lists the parts.
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
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any, NamedTuple

import torch

import benchmarks
from benchmarks import report, results
from benchmarks.bounded_log import BoundedLog
from benchmarks.parts import FIRST, NAMES, PARTS, SECOND, THIRD, Part, Setting
from benchmarks.statuses import AGAIN, LEFT_OUT, TIME_OVER

GRACE = 20  # seconds from the interrupt, upon which a part writes what it has, to the end of it
FINISH = 5  # seconds at the end for what is left to read and for the summary
OVER = (TIME_OVER, AGAIN)  # in these a part ends whose time was over
LOG_BYTES = 12 * 2**20
ERROR_LINES = 6  # of what a part that failed has written to standard error, the last go to the summary
# What a part can go on from, or what a later command's summary and report are made of.
KEPT = ("results.json", "steps.json", "mnist-ladder.json", "mnist-race.json", "tuned_*.json")


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "gpu-session",
        help="what a rented card is worth",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Tests, numerics, compute-sanitizer, training steps, MNIST, tuning, benchmarks and
profiles on a card that is lent for minutes. A part that fails or takes too long
loses nothing before it and stops nothing after it, and each result is written as
soon as it is there. At most 8 files come out, each below 16 MiB and none in a
folder of its own: summary.md, log.txt, steps.json, mnist-ladder.json,
mnist-race.json, results.json, profiles.txt, and tuned_*.json, a table for
kernels/.""",
        epilog=f"""\
three commands, of less than ten minutes each, do everything:
  python -m benchmarks gpu-session --minutes 9
  python -m benchmarks gpu-session --minutes 9 --resume gpu-session \\
      --parts {",".join(SECOND)}
  python -m benchmarks gpu-session --minutes 9 --resume gpu-session \\
      --parts {",".join(THIRD)}

--list says what each part does. What was compiled is kept for the next command,
in ~/.cache/fusedmlp/gpu-session or the same folder of XDG_CACHE_HOME.
Exit status: 0 if every part was done or left out, 1 if not, 2 if nothing was
begun, 130 after an interrupt.""",
    )
    parser.add_argument(
        "--parts",
        type=_names,
        default=FIRST,
        metavar="NAME,...",
        help=f"what to do, in the order of --list (default: {','.join(FIRST)})",
    )
    parser.add_argument("--list", action="store_true", help="say what each part does, and do nothing")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("gpu-session"),
        metavar="DIR",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--resume",
        type=pathlib.Path,
        metavar="DIR",
        help="go on from the results and the table of an earlier command: they are copied from its --out",
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, metavar="N", help="all is over by then (default: %(default)g)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="the parts on the CPU, tiny, in Triton's interpreter"
    )
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
        "The seconds are estimates for an H100; in their proportion the parts share the time that there is.",
        "Parts run in this order. Without --parts: " + ", ".join(FIRST) + ".",
    ]


def _why_not(options: argparse.Namespace) -> str | None:
    """Why nothing is begun, and nothing written."""
    if not options.minutes > 0:
        return f"--minutes must be positive, got {options.minutes:g}"
    if not results.has_triton():
        return "Triton is not installed, so there are no kernels to try: pip install triton"
    if not options.dry_run and not torch.cuda.is_available():
        return "there is no CUDA device; --dry-run exercises the parts on the CPU"
    if options.resume is not None and not options.resume.is_dir():
        return f"--resume: there is no folder {options.resume}"
    if options.resume is not None and not _kept(options.resume):
        return f"--resume: {options.resume} has none of {', '.join(KEPT)}"
    if "quick" in options.parts:
        try:
            _fitting(options.out / "results.json", options.dry_run)
        except results.Unreadable as problem:
            return f"{problem}. Choose another --out, or move it away"
    return None


def _kept(folder: pathlib.Path) -> list[pathlib.Path]:
    return [file for pattern in KEPT for file in sorted(folder.glob(pattern))]


def _fitting(file: pathlib.Path, dry_run: bool) -> None:
    """Raise Unreadable unless the part that measures can go on from this file, or there is none."""
    if file.exists():
        before, found = results.read(file), results.about(_device(dry_run), dry_run)
        if dry_run:  # of which the parts have one thread
            before["device"], found["device"] = before["device"]["name"], found["device"]["name"]
        results.same_or_unreadable(before, found, file)


def _device(dry_run: bool) -> torch.device:
    return torch.device("cpu" if dry_run else "cuda")


def _cache(dry_run: bool) -> pathlib.Path:
    """A folder of the user's own, for what is compiled and for a table of measurements that is the session's.

    It outlives the command, so that the next one on the same machine compiles nothing anew.
    """
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache").resolve()
    cache = caches / "fusedmlp" / "gpu-session" / ("dry-run" if dry_run else "")
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    return cache


def _take_up(resume: pathlib.Path | None, out: pathlib.Path, cache: pathlib.Path, dry_run: bool) -> list[str]:
    """Copy what there is to go on from to where the parts look for it; what was done, in words."""
    from fusedmlp.kernels import tuning_table  # imports Triton

    here = tuning_table.where(None if dry_run else torch.cuda.current_device())
    table = cache / "fusedmlp" / tuning_table.users_file(here).name
    if resume is None:
        table.unlink(missing_ok=True)  # of the last time, perhaps of other kernels
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
    """Run the parts, and be done at ``end`` of time.monotonic().

    0 if all did what they should, 130 after an interrupt, else 1.
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
                    print(
                        f"{i + 1} of {len(parts)}: {part.name}, {_time(limit)} at most: {part.what}",
                        flush=True,
                    )
                    outcomes.append(_run(part, Setting(out, limit / 60, dry_run), environment, log))
                    print(f"    {outcomes[-1].verdict}, {_time(outcomes[-1].seconds)}", flush=True)
                _write(summary, before + _page(head, outcomes, out))
        except KeyboardInterrupt:
            interrupted = True
            for part in parts[len(outcomes) :]:
                verdict = "not begun" if outcomes and outcomes[-1].verdict == "interrupted" else "interrupted"
                outcomes.append(Outcome(part, verdict, False, 0.0, []))
    page = _page(head, outcomes, out)
    _write(summary, before + page)
    print(f"\n{page}", end="")
    return 130 if interrupted else 0 if all(outcome.good for outcome in outcomes) else 1


def _environment(cache: pathlib.Path, dry_run: bool) -> dict[str, str]:
    """What the parts' processes have: the checkout's packages without an install, and the session's cache."""
    path = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(results.ROOT), *([path] if path else [])]),
        "XDG_CACHE_HOME": str(cache),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "COLUMNS": "80",
        "TQDM_MININTERVAL": "60",  # the log is no terminal
        "PYTHONFAULTHANDLER": "1",  # where a crash happened
    }
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return environment


def _run(part: Part, setting: Setting, environment: dict[str, str], log: BoundedLog) -> Outcome:
    """One part, its output into the log as it comes."""
    began = time.monotonic()
    said: collections.deque[str] = collections.deque(maxlen=part.lines)
    errors: collections.deque[str] = collections.deque(maxlen=ERROR_LINES)
    while True:
        left = 60 * setting.minutes - (time.monotonic() - began)
        command = part.command(setting._replace(minutes=left / 60))
        log.write(f"\n{'#' * 80}\n# {part.name}: {part.what}\n# {' '.join(command)}\n\n")
        status = _output(command, left, environment, log, said, errors)
        if status != AGAIN or time.monotonic() - began > 60 * setting.minutes:
            break
    verdict = _verdict(status, said)
    log.write(f"\n# {part.name}: {verdict}\n")
    good = status in (0, LEFT_OUT)
    lines = [*said] if good or status in OVER else [*said, *errors]
    return Outcome(part, verdict, good, time.monotonic() - began, lines)


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
    command: list[str],
    seconds: float,
    environment: dict[str, str],
    log: BoundedLog,
    said: collections.deque[str],
    errors: collections.deque[str],
) -> int:
    """Run it, in a group of processes of its own; its exit status, or TIME_OVER if it had to be stopped.

    said: the end of the last paragraph of its standard output; errors: of its standard error.
    """
    process = subprocess.Popen(
        command, cwd=results.ROOT, env=environment, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip

    def read(stream: IO[str], hear: Callable[[str], None]) -> None:
        for line in stream:
            log.write(line)
            hear(line)

    paragraph = True

    def hear(line: str) -> None:
        nonlocal paragraph
        if line.strip():
            if paragraph:
                said.clear()
            said.append(line.rstrip())
        paragraph = not line.strip()

    def hear_error(line: str) -> None:
        if line.strip():
            errors.append(line.rstrip())

    assert process.stdout is not None
    assert process.stderr is not None
    streams = ((process.stdout, hear), (process.stderr, hear_error))
    readers = [threading.Thread(target=read, args=pair, daemon=True) for pair in streams]
    for reader in readers:
        reader.start()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return TIME_OVER
    finally:  # also after an interrupt
        if process.poll() is None:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        _signal(process, signal.SIGKILL)  # and whatever it has started
        process.wait()
        for reader in readers:
            reader.join(FINISH / 3)


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
    """A part's last lines are indented by four, which Markdown shows as they are."""
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


def _write(file: pathlib.Path, text: str) -> None:
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)
