"""The file results.json: what it records of the machine, how it is read, and which times are compared."""

import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

import fusedmlp
from benchmarks.cases import Case
from benchmarks.timing import clock

ROOT = pathlib.Path(__file__).parents[1]
FORMAT = 1
NOISE = 0.98  # a ratio between this and its reciprocal is called equal, whatever the spread


class Unreadable(ValueError):
    """Why a file cannot be used as results."""


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def about(device: torch.device, dry_run: bool) -> dict[str, Any]:
    """The head of a file of results: the device, the versions, the commit, the command."""
    cuda = device.type == "cuda"
    commit = _said_by("git", "rev-parse", "HEAD")
    changed = bool(_said_by("git", "status", "--porcelain", "--untracked-files=no"))
    driver = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks {' '.join(sys.argv[1:])}".strip(),
        "commit": commit and commit + (" with changes" if changed else ""),
        "dry_run": dry_run,
        "device": {
            "name": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
            "type": device.type,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else None,
            "memory_gb": round(torch.cuda.get_device_properties(device).total_memory / 2**30)
            if cuda
            else None,
            "driver": driver and driver.splitlines()[0],
            "threads": torch.get_num_threads(),
            "clock": clock(device)[1],
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton") if has_triton() else None,
            "cuda": torch.version.cuda,
            "fusedmlp": fusedmlp.__version__,
        },
        "ceilings": {"copy_gbps": None, "tflops": {}},
        "cases": [],
    }


def _said_by(*command: str) -> str | None:
    """What a command prints; None if it fails, or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip() or None) if done.returncode == 0 else None


def _cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def write(results: dict[str, Any], file: pathlib.Path) -> None:
    replace_file(file, json.dumps(results, indent=1) + "\n")


def replace_file(file: pathlib.Path, text: str) -> None:
    """Write a file so that a reader, or an interrupt, finds the old text or the new, never a part."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)


def same_or_unreadable(before: dict[str, Any], found: dict[str, Any], file: pathlib.Path) -> None:
    """Raise Unreadable unless both are of the same device, versions and commit."""
    for what in ("device", "versions", "commit", "dry_run"):
        if before.get(what) != found[what]:
            raise Unreadable(f"{file} has results of another {what}: {before.get(what)}")


def read(file: pathlib.Path) -> dict[str, Any]:
    """The checked content of a file; raises Unreadable with the file's name and the reason."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unreadable(f"{file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{file} cannot be read ({error})") from None
    except ValueError as error:
        raise Unreadable(f"{file} is not JSON ({error}): is it cut off?") from None
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise Unreadable(f"{file} is not a results.json of python -m benchmarks")
    if found["format"] != FORMAT:
        raise Unreadable(f"{file} has format {found['format']}, and this version reads {FORMAT}")
    try:
        for case in found["cases"]:
            name_of(case)
            for row in case["contestants"]:
                assert isinstance(row["name"], str)
                for what in ("wall_us", "device_us"):
                    assert row[what] is None or all(row[what][key] > 0 for key in ("median", "low", "high"))
        device = found["device"]
        ", ".join((device["name"], device["clock"], found["date"], found["versions"]["torch"]))
        found["ceilings"]["tflops"].get("float32")
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise Unreadable(f"{file} has an invalid entry ({what})") from None
    return found


def case_of(entry: dict[str, Any]) -> Case:
    return Case(entry["what"], entry["rows"], tuple(entry["widths"]), entry["dtype"])


def name_of(entry: dict[str, Any]) -> str:
    return str(case_of(entry))


def short(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"


def best(
    case: dict[str, Any], family: str, clock: str = "wall_us", graph: bool | None = None
) -> dict[str, Any] | None:
    """The fastest contestant of a family by a clock.

    graph: True for those in a CUDA graph only, False for the others only, None for all.
    """
    rows = [
        row
        for row in case["contestants"]
        if row["family"] == family and row[clock] is not None and graph in (None, row["graph"])
    ]
    return min(rows, key=lambda row: row[clock]["median"], default=None)


def named(case: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((row for row in case["contestants"] if row["name"] == name), None)


Comparison = tuple[str, str, str, bool]
# Heading, our contestant, the clock, and whether it is compared with PyTorch in a CUDA graph or without.
COMPARISONS: tuple[Comparison, ...] = (
    ("auto", "fusedmlp auto", "wall_us", False),
    ("in a graph", "fusedmlp in a graph", "wall_us", True),
    ("kernels alone", "fusedmlp chain", "device_us", False),
)


class Pair(NamedTuple):
    """Our contestant and PyTorch's fastest; ratio: PyTorch's time divided by ours; its verdict."""

    ours: dict[str, Any]
    torchs: dict[str, Any]
    ratio: float
    verdict: str


def pair(case: dict[str, Any], comparison: Comparison) -> Pair | None:
    """Compare our contestant with PyTorch's fastest in one case; None if one of them has no time."""
    _, name, clock, graph = comparison
    ours, torchs = named(case, name), best(case, "torch", clock, graph)
    if ours is None or ours[clock] is None or torchs is None:
        return None
    ratio = torchs[clock]["median"] / ours[clock]["median"]
    told = "equal" if NOISE <= ratio <= 1 / NOISE else verdict(torchs[clock], ours[clock])
    return Pair(ours, torchs, ratio, told)


def pairs(cases: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Comparison, Pair]]:
    """All comparisons of these cases that have times."""
    for case, comparison in itertools.product(cases, COMPARISONS):
        found = pair(case, comparison)
        if found is not None:
            yield case, comparison, found


def verdict(old: dict[str, float], new: dict[str, float]) -> str:
    """Compare two times: "equal" if their ranges from the 20th to the 80th percentile overlap."""
    if new["high"] < old["low"]:
        return "faster"
    return "slower" if new["low"] > old["high"] else "equal"


def floor_us(case: dict[str, Any], ceilings: dict[str, Any]) -> tuple[float, str] | None:
    """The least microseconds at the measured ceilings, and whether FLOPs or bytes set it; None if unmeasured.

    The bytes count every layer's tensors, so kernels that keep a layer's output on the chip can need less.
    """
    tflops = ceilings["tflops"].get(case["dtype"])
    if tflops is None or ceilings["copy_gbps"] is None:
        return None
    by_flops = 1e-6 * case["flops"] / tflops
    by_bytes = 1e-3 * case["least_bytes"] / ceilings["copy_gbps"]
    return (by_flops, "FLOPs") if by_flops > by_bytes else (by_bytes, "bytes")


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
