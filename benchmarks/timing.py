"""How long something takes: with launching, and on the device alone; and how fast the device is at best."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.cases import DTYPES, arithmetic
from fusedmlp.torch_tools import cuda_graph

Run = Callable[[int], Any]  # of the i-th of the rotated inputs


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(times: Sequence[float]) -> dict[str, float | int]:
    """Median, 20th and 80th percentile, and of how many rounds."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "low": ordered[round(0.2 * last)],
        "high": ordered[round(0.8 * last)],
        "rounds": len(ordered),
    }


def clock(device: torch.device) -> tuple[Callable[[], float], str]:
    """What tells the time, and in words: one thread's own is not disturbed by others on a busy machine."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.thread_time, "the thread's own CPU time"
    return time.perf_counter, "wall time"


def _microseconds(run: Run, calls: int) -> float:
    now, _ = clock(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    synchronize()
    begin = now()
    for i in range(calls):
        run(i)
    synchronize()
    return 1e6 * (now() - begin) / calls


def with_launching(
    runs: dict[str, Run], rounds: int, milliseconds: float
) -> dict[str, dict[str, float | int]]:
    """Microseconds a call of each, called back to back; contestants take turns, so that drift hits all."""
    calls = {}
    for name, run in runs.items():
        _microseconds(run, 2)
        calls[name] = max(1, min(2000, int(1e3 * milliseconds / _microseconds(run, 2))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_microseconds(run, calls[name]))
    return {name: spread(several) for name, several in times.items()}


def on_the_device(runs: dict[str, Run], rounds: int, calls: int) -> dict[str, dict[str, float | int] | str]:
    """Microseconds a call of each, replayed from a CUDA graph, in turns; or why it could not be captured."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    found: dict[str, dict[str, float | int] | str] = {}
    for name, run in runs.items():
        graph = _captured(run, calls)
        if isinstance(graph, str):
            found[name] = graph
        else:
            graphs[name] = graph
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


def _captured(run: Run, calls: int) -> torch.cuda.CUDAGraph | str:
    """A graph of several calls, or why there is none; a capture that fails harms none that comes later."""

    def several() -> None:  # no call's results are kept, so the graph needs the memory of one
        for i in range(calls):
            run(i)

    try:
        warm_up_on_a_side_stream(run)
        graph, _ = cuda_graph.capture(several, torch.device("cuda", torch.cuda.current_device()))
    except cuda_graph.CaptureFailed as failure:
        return str(failure)
    except Exception as error:  # whatever a contestant does on another stream
        synchronize()
        return first_line(error)
    return graph


def warm_up_on_a_side_stream(run: Run) -> None:
    """What capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            run(i)
    torch.cuda.current_stream().wait_stream(stream)


def first_line(error: BaseException) -> str:
    said = str(error).strip()
    return f"{type(error).__name__}: {said.splitlines()[0]}" if said else type(error).__name__


def ceilings(device: torch.device) -> dict[str, Any]:
    """GB/s of a large copy, and TFLOP/s of a large product of random numbers in each arithmetic."""
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
