"""``python -m benchmarks.numerics``: no times, only whether every result is right, at real sizes.

With ``--sanitize`` small cases under NVIDIA's compute-sanitizer, which sees every access to memory.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import time

import torch

from benchmarks import cases, results, sweep

LEFT_OUT = 77  # exit status: this cannot run here, and the last line says why


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny cases, as in a dry run")
    parser.add_argument("--sanitize", action="store_true", help="small ones under compute-sanitizer")
    parser.add_argument("--only", default="fusedmlp*", metavar="PATTERN", help="contestants to check")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after so many")
    options = parser.parse_args()
    return _sanitized() if options.sanitize else _check(options)


def _check(options: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = cases.dry() if options.small else cases.numerics()
    end = time.monotonic() + 60 * options.minutes
    worst, count = (0.0, ""), 0
    wrong: list[str] = []
    absent: list[str] = []
    for i, case in enumerate(chosen):
        if time.monotonic() > end:
            print(f"{options.minutes:g} minutes are over: {len(chosen) - i} cases not checked")
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
    largest = f"largest error {worst[0]:.2f} times PyTorch's own ({worst[1]})"
    print(f"\n{count} checks: {len(wrong)} wrong, {len(absent)} did not run; {largest}")
    if wrong or absent:
        print("\n".join([*wrong, *absent][:5]))
    return 1 if wrong or absent or not count else 0


def _sanitized() -> int:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not pathlib.Path(tool).exists():
        print("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
        return LEFT_OUT
    if not torch.cuda.is_available():
        print("compute-sanitizer wants a GPU")
        return LEFT_OUT
    # Each tensor a piece of memory of its own, so that a step past its end is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    check = [sys.executable, "-m", "benchmarks.numerics", "--small", "--only", "fusedmlp [cp]*"]
    status = 0
    for what in ("memcheck", "racecheck"):
        command = [tool, "--tool", what, "--error-exitcode", "86", "--print-limit", "20", *check]
        run = subprocess.run(command, env=environment, cwd=results.ROOT, stdout=subprocess.PIPE, text=True)
        print(run.stdout)
        status = max(status, run.returncode)
        lines = [line for line in run.stdout.splitlines() if "SUMMARY" in line]
        print(f"{what}: {' '.join(lines) or f'exit status {run.returncode}'}", flush=True)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
