"""The sweep: check every contestant of every case against float64, and time those that are accurate."""

import argparse
import fnmatch
import gc
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

import fusedmlp
from benchmarks import cases, contestants, report, results, timing
from benchmarks.cases import Case
from benchmarks.statuses import AGAIN, TIME_OVER
from fusedmlp.torch_tools.warn import first_line

UNMEASURED = ("problem", "error_ratio", "wall_us", "device_us", "tflops", "gbps", "peak_bytes")


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="measure (the default)",
        description="Measure layers, MLPs and training steps with PyTorch (eager, torch.compile, CUDA "
        "graphs) and with fusedmlp. Each result is checked against float64 before it is timed. Writes "
        "results.json, results.md and plots. Without a GPU it measures a few cases, which take minutes.",
        epilog="example: python -m benchmarks --quick --only 'mlp*' --only '*tf32'",
    )
    quick = "a few cases of each kind, under 5 minutes"
    parser.add_argument("--quick", action="store_true", help=quick)
    only = "only cases whose name in --list matches, such as 'mlp*' or '*65536x256*'; can be repeated"
    parser.add_argument("--only", action="append", metavar="PATTERN", help=only)
    out = (
        "default: benchmarks/results/DEVICE-DATE; cases that it has already, of this device, commit and "
        "versions, are kept and not measured again"
    )
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help=out)
    minutes = "begin no case after this time (default: no limit; 4 with --quick)"
    parser.add_argument("--minutes", type=float, metavar="N", help=minutes)
    parser.add_argument("--list", action="store_true", help="print the cases and measure nothing")
    dry_run = "tiny cases on the CPU in Triton's interpreter: runs all of the code; the times mean nothing"
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    no_report = "write results.json only; 'report' can make the rest later"
    parser.add_argument("--no-report", action="store_true", help=no_report)
    parser.set_defaults(run=run)


def _chosen(options: argparse.Namespace) -> list[Case]:
    if options.dry_run:
        found = cases.dry()
    elif options.quick:
        found = cases.quick() if torch.cuda.is_available() else cases.on_a_cpu()[::2]
    else:
        found = cases.sweep() if torch.cuda.is_available() else cases.on_a_cpu()
    if options.only:
        found = [case for case in found if any(_matches(str(case), p) for p in options.only)]
    return found


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name.lower(), pattern.lower())


def run(options: argparse.Namespace) -> int:
    if options.minutes is not None and not options.minutes > 0:
        print(f"--minutes must be positive, got {options.minutes:g}", file=sys.stderr)
        return 2
    if options.dry_run and results.has_triton() and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads TRITON_INTERPRET when it is imported, and torch may have imported it already.
        environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run([sys.executable, "-m", "benchmarks", *sys.argv[1:]], env=environment).returncode
    chosen = _chosen(options)
    if not chosen:
        print(f"no case matches {' or '.join(options.only)}; --list shows them all", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(map(str, chosen)))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = results.about(device, options.dry_run)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", found["device"]["name"]).strip("-")
    folder = options.out or results.ROOT / "benchmarks" / "results" / f"{slug}-{found['date'][:10]}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    try:
        _keep(found, file)
    except results.Unreadable as problem:
        print(f"{problem}. Choose another --out, or move the file away", file=sys.stderr)
        return 2
    done = {results.name_of(case) for case in found["cases"]}
    waiting = [case for case in chosen if str(case) not in done]
    status = _measure_all(waiting, found, file, device, options)
    if found["cases"]:
        for path in [] if options.no_report else report.write(found, folder):
            print(f"wrote {path}")
        done = {results.name_of(case) for case in found["cases"]}
        count = f"{sum(str(case) in done for case in chosen)} of {len(chosen)} cases done"
        print("\n".join(["", *report.headline(found), count]))
    return status


def _keep(found: dict[str, Any], file: pathlib.Path) -> None:
    """Keep the cases that the file has; raises Unreadable if they are of another device or version."""
    if not file.exists():
        return
    before = results.read(file)
    results.same_or_unreadable(before, found, file)
    found["cases"], found["ceilings"] = before["cases"], before["ceilings"]
    print(f"{file} has {len(found['cases'])} cases already, measured from {before['date']} on")
    found["date"] = before["date"]


def _measure_all(
    waiting: list[Case], found: dict[str, Any], file: pathlib.Path, device: torch.device, options: Any
) -> int:
    began = time.monotonic()
    minutes = options.minutes or (4.0 if options.quick else float("inf"))
    try:
        if found["ceilings"]["copy_gbps"] is None:
            found["ceilings"] = timing.ceilings(device)
        progress = tqdm(waiting, unit="case", disable=None, dynamic_ncols=True)
        for case in progress:
            if time.monotonic() - began > 60 * minutes:
                print(f"{minutes:g} minutes are over: stopped before {case}", file=sys.stderr)
                return TIME_OVER
            progress.set_description(str(case))
            measured = measure(case, device, options.quick, options.dry_run)
            found["cases"].append(measured)
            results.write(found, file)
            if not _alive():
                print(f"the device failed in {case}: repeat the same command to continue", file=sys.stderr)
                return AGAIN
    except KeyboardInterrupt:
        print("interrupted; finished cases are kept, repeat the command to continue", file=sys.stderr)
        return 130
    return 0


def _alive() -> bool:
    """Whether the device still works; it does not after an illegal memory access, for instance."""
    try:
        timing.synchronize()
    except RuntimeError:
        return False
    return True


def measure(
    case: Case, device: torch.device, few: bool, dry_run: bool, timed: bool = True, only: str = "*"
) -> dict[str, Any]:
    """Measure one case: its entry in the file, with the times or the problem of each contestant.

    few, dry_run: see contestants.contestants; timed: False only checks the results; only: a pattern for the
    names of the contestants beside eager.
    """
    with cases.arithmetic(case.dtype):
        rows = _measure(case, device, few, dry_run, timed, only)
    gc.collect()
    if device.type == "cuda" and _alive():
        torch.cuda.empty_cache()
    counts = {"flops": case.flops, "least_bytes": case.least_bytes}
    return case._asdict() | counts | {"contestants": rows}


def _copies(case: Case, device: torch.device) -> int:
    """How many inputs fill the device's cache twice, so that none stays in it; 2 on a CPU."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    one = case.widths[0] * case.rows * cases.DTYPES[case.dtype].itemsize
    return max(2, min(2048, -(-2 * cache // one)))


def _measure(
    case: Case, device: torch.device, few: bool, dry_run: bool, timed: bool, only: str
) -> list[dict[str, Any]]:
    cuda = device.type == "cuda"
    compiling = not dry_run or (case.what, case.dtype) == (cases.INFERENCE, "float32")
    field = contestants.contestants(case, device, few, compiling)
    field = [one for one in field if one.name == "eager" or _matches(one.name, only)]
    rows: list[dict[str, Any]] = [dict.fromkeys(UNMEASURED) | one._asdict() for one in field]
    for row in rows:
        del row["prepare"]
    try:
        work = contestants.Work(case, device, _copies(case, device) if timed else 2)
        exact = contestants.exactly(work)
    except torch.OutOfMemoryError:
        for row in rows:
            row["problem"] = "not enough memory for the inputs and the results in float64"
        return rows
    if any(one.name.startswith("compile") for one in field):
        torch.compiler.reset()  # otherwise a module that comes again is compiled for all shapes
    runs: dict[str, timing.Run] = {}
    eagers: contestants.Results | None = None
    for one, row in zip(field, rows, strict=True):
        if cuda and not _alive():
            row["problem"] = "not run: the device had failed"
            continue
        try:
            runner, call = one.prepare(work)
            found = runner.results(call)
            if one.name == "eager":
                eagers = found
            if one.family != "other":
                row["error_ratio"], row["problem"] = contestants.check(found, eagers, exact)
            del found
            if row["problem"] is None:
                runs[one.name] = call
                row["peak_bytes"] = _peak(call) if cuda and timed and not one.graph else None
                if one.name == "fusedmlp auto":
                    row["note"] = _what_auto_does(work)
        except Exception as error:  # is reported, and the other contestants go on
            row["problem"] = first_line(error)
            if isinstance(error, torch.OutOfMemoryError):
                gc.collect()
                torch.cuda.empty_cache()
    del exact, eagers
    if timed and (not cuda or _alive()):
        try:
            _time(case, rows, runs, len(work.xs), cuda, dry_run)
        except RuntimeError as error:  # out of memory, for example
            for row in rows:
                row["problem"] = row["problem"] or f"not timed: {first_line(error)}"
    return rows


def _time(
    case: Case,
    rows: list[dict[str, Any]],
    runs: dict[str, timing.Run],
    copies: int,
    cuda: bool,
    dry_run: bool,
) -> None:
    wall = timing.with_launching(runs, 2 if dry_run else 7, 1 if dry_run else 8)
    alone: dict[str, Any] = {}
    if cuda:
        direct = {row["name"]: runs[row["name"]] for row in rows if row["name"] in runs and not row["graph"]}
        alone = timing.on_the_device(direct, 5, copies)
    for row in rows:
        if row["name"] not in wall:
            continue
        row["wall_us"] = wall[row["name"]]
        on_device = alone.get(row["name"])
        if isinstance(on_device, str):
            row["note"] = "; ".join(filter(None, [row["note"], f"no graph: {on_device}"]))
        else:
            row["device_us"] = on_device
        best = min(t["median"] for t in (row["wall_us"], row["device_us"]) if t)
        row["tflops"], row["gbps"] = 1e-6 * case.flops / best, 1e-3 * case.least_bytes / best


def _peak(call: timing.Run) -> int:
    """The peak of memory in use during one call, in bytes, beyond what was in use before."""
    timing.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    timing.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _what_auto_does(work: contestants.Work) -> str:
    """What backend("auto") runs, and why."""
    with torch.set_grad_enabled(not work.case.forward_only):
        paths = {
            f"On PyTorch's operators: {row.reason}" if row.reason else f"On the kernels: {row.basis}"
            for row in fusedmlp.explain(work.fused_model(), work.xs[0]).rows
        }
    return " ".join(sorted(paths))
