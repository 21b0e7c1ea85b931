"""How long a call takes, with launching and on the device alone, and how fast the device is at best."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.cases import DTYPES, arithmetic
from fusedmlp.torch_tools import cuda_graph
from fusedmlp.torch_tools.warn import first_line

Run = Callable[[int], Any]  # called with the number of an input


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(times: Sequence[float]) -> dict[str, float | int]:
    """Median, 20th and 80th percentile of the rounds' times, and the number of rounds."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "low": ordered[round(0.2 * last)],
        "high": ordered[round(0.8 * last)],
        "rounds": len(ordered),
    }


def clock(device: torch.device) -> tuple[Callable[[], float], str]:
    """The clock, and its name. CPU time of a single thread does not count other work on the machine."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.thread_time, "the thread's own CPU time"
    return time.perf_counter, "wall time"


def _repeat(run: Run, calls: int) -> None:
    for i in range(calls):  # keeps no results, so a graph of all calls needs the memory of one
        run(i)


def _microseconds(run: Run, calls: int) -> float:
    now, _ = clock(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    synchronize()
    begin = now()
    _repeat(run, calls)
    synchronize()
    return 1e6 * (now() - begin) / calls


def with_launching(runs: dict[str, Run], rounds: int, milliseconds: float) -> dict[str, Any]:
    """Microseconds per call of each, called back to back. They take turns, so drift slows all alike."""
    calls = {}
    for name, run in runs.items():
        _microseconds(run, 2)
        calls[name] = max(1, min(2000, int(1e3 * milliseconds / _microseconds(run, 2))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_microseconds(run, calls[name]))
    return {name: spread(several) for name, several in times.items()}


def on_the_device(runs: dict[str, Run], rounds: int, calls: int) -> dict[str, Any]:
    """Microseconds per call of each, replayed from a CUDA graph, in turns; or why it cannot be captured."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    found: dict[str, Any] = {}
    device = torch.device("cuda", torch.cuda.current_device())
    for name, run in runs.items():
        several = functools.partial(_repeat, run, calls)
        try:
            warm_up_on_a_side_stream(run)
            graphs[name], _ = cuda_graph.capture(several, device)
        except Exception as error:  # from the warm-up, or CaptureFailed; the others go on
            synchronize()
            found[name] = str(error) if isinstance(error, cuda_graph.CaptureFailed) else first_line(error)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds + 1):  # the first warms up
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(1e3 * begin.elapsed_time(end) / calls)
    return found | {name: spread(several[1:]) for name, several in times.items()}


def warm_up_on_a_side_stream(run: Run) -> None:
    """Call ``run`` three times, as PyTorch recommends before a capture."""
    with cuda_graph.beside(torch.cuda.Stream()):
        _repeat(run, 3)


def ceilings(device: torch.device) -> dict[str, Any]:
    """GB/s of a large copy, and TFLOP/s of a large product of random matrices in each arithmetic."""
    cuda = device.type == "cuda"
    source = torch.randn(2**28 if cuda else 2**24, device=device)
    target = torch.empty_like(source)
    rounds, milliseconds = 5, 20
    copying = with_launching({"copy": lambda _: target.copy_(source)}, rounds, milliseconds)
    size = 8192 if cuda else 1024
    products = {}
    for name, dtype in DTYPES.items() if cuda else [("float32", torch.float32)]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)

        def multiply(_: int, a: Any = a, b: Any = b, product: Any = product) -> None:
            torch.mm(a, b, out=product)

        with arithmetic(name):
            best = with_launching({name: multiply}, rounds, milliseconds)[name]["low"]
        products[name] = 2e-6 * size**3 / best
    return {"copy_gbps": 2e-3 * source.nbytes / copying["copy"]["low"], "tflops": products}
