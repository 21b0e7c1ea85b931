"""``python -m benchmarks.numerics``: check every result at real sizes against float64, without timing.

``--sanitize`` runs small cases under NVIDIA's compute-sanitizer, which checks every access to memory.
"""

import argparse
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import torch

from benchmarks import cases, results, sweep
from benchmarks.statuses import LEFT_OUT, TIME_OVER

FOUND = 86  # the exit status that compute-sanitizer is told to use for errors


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny cases, as in a dry run")
    parser.add_argument("--sanitize", action="store_true", help="tiny cases under compute-sanitizer")
    parser.add_argument("--only", default="fusedmlp*", metavar="PATTERN", help="contestants to check")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after this time")
    options = parser.parse_args()
    return _sanitized(options.minutes) if options.sanitize else _check(options)


def _check(options: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = cases.dry() if options.small else cases.numerics()
    end = time.monotonic() + 60 * options.minutes
    worst, count, done = (0.0, ""), 0, 0
    wrong: list[str] = []
    absent: list[str] = []
    try:
        for case in chosen:
            if time.monotonic() > end:
                break
            measured = sweep.measure(case, device, few=True, dry_run=True, timed=False, only=options.only)
            for row in measured["contestants"]:
                ratio, problem = row["error_ratio"], row["problem"]
                if row["name"] == "eager":
                    if problem:
                        absent.append(f"{case}: {problem}")
                    continue
                what = f"{case}: {row['name']}"
                verdict = problem or f"right, {ratio:.2f} times PyTorch's error"
                print(f"{what}: {verdict}", flush=True)
                count += 1
                if problem:
                    (wrong if problem.startswith("wrong") else absent).append(f"{what}: {problem}")
                elif ratio > worst[0]:
                    worst = ratio, what
            done += 1
    except KeyboardInterrupt:
        print("interrupted")
    print(f"\n{count} checks: {len(wrong)} wrong, {len(absent)} did not run")
    print(f"largest error {worst[0]:.2f} times PyTorch's own ({worst[1] or 'nothing was right'})")
    print("\n".join([*[*wrong, *absent][:5], f"{done} of {len(chosen)} cases done"]))
    if wrong or absent:
        return 1
    return TIME_OVER if done < len(chosen) else 0 if count else 1


def _sanitized(minutes: float) -> int:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not pathlib.Path(tool).exists():
        print("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
        return LEFT_OUT
    if not torch.cuda.is_available():
        print("compute-sanitizer needs a GPU")
        return LEFT_OUT
    check = [sys.executable, "-m", "benchmarks.numerics", "--small", "--only", "fusedmlp [cp]*"]
    return memcheck(tool, [*check, "--minutes", f"{minutes}"])


def memcheck(tool: str, check: list[str]) -> int:
    """Run a command under compute-sanitizer; print its output as it comes, and the verdict last."""
    # Each tensor gets its own allocation, so that an access past its end is found.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND), "--print-limit", "20", *check]
    interrupts: list[int] = []
    # An interrupt reaches the tool as well, which then prints how far it came, so keep reading.
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        with subprocess.Popen(
            command, env=environment, cwd=results.ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            told: list[str] = []
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.strip().endswith(" cases done") or "SUMMARY" in line:
                    told.append(line.strip())
            status = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    verdict = {0: "nothing found", FOUND: "FOUND something", TIME_OVER: "nothing found so far"}
    print(f"\nmemcheck: {verdict.get(status, f'exit status {status}')}", *told, sep="\n")
    return TIME_OVER if interrupts and status != FOUND else status


if __name__ == "__main__":
    raise SystemExit(main())
