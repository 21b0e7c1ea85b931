"""Time a computation on the device alone, or with launching, as a program calls it."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fusedmlp.torch_tools import cuda_graph

Run = Callable[[], Any]


def on_device(run: Run, device: torch.device) -> Callable[[], float]:
    """A function that measures microseconds of ``run`` without launching, by replaying a CUDA graph.

    Raises CaptureFailed if ``run`` cannot be captured.
    """
    if device.type == "cpu":
        return functools.partial(_microseconds, run, 1)
    import triton

    calls = max(1, min(200, int(1e3 / _microseconds(run, 3))))  # one replay takes about a millisecond
    graph, _ = cuda_graph.capture(functools.partial(_repeat, run, calls), device)
    bench = functools.partial(triton.testing.do_bench, graph.replay, warmup=2, rep=6, return_mode="median")
    return lambda: 1e3 * bench() / calls


def wall_times(runs: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Microseconds of each run with launching, in calls back to back as in a program."""
    samples: dict[str, Callable[[], float]] = {}
    for name, run in runs.items():
        calls = 1
        if device.type != "cpu":
            _microseconds(run, 3)  # compiles the kernels and fills the caches
            calls = max(3, min(1000, int(1e4 / _microseconds(run, 3))))
        samples[name] = functools.partial(_microseconds, run, calls)
    return medians(samples, device)


def medians(samples: dict[Any, Callable[[], float]], device: torch.device) -> dict[Any, float]:
    """The median of five samples of each, taken in turns. On a CPU, where times mean nothing, one sample."""
    rounds = range(1 if device.type == "cpu" else 5)
    times = [[sample() for sample in samples.values()] for _ in rounds]
    return dict(zip(samples, map(statistics.median, zip(*times, strict=True)), strict=True))


def _microseconds(run: Run, calls: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    _repeat(run, calls)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - begin) / calls


def _repeat(run: Run, calls: int) -> None:
    for _ in range(calls):
        run()
