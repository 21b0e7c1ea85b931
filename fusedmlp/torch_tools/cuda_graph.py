"""Capture CUDA graphs such that a failed capture leaves the process as it was.

PyTorch itself does not end a failed capture completely. In torch 2.11 the capture's stream stays current, the
allocator keeps allocating from the graph's memory pool, and the default generator still acts as if it were
captured, so that every later ``randn`` or dropout raises. See ``aten/src/ATen/cuda/CUDAGraph.cpp`` and
``CUDAGeneratorImpl.cpp``.
"""

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from fusedmlp.torch_tools.warn import first_line

Result = TypeVar("Result")

_one_at_a_time = threading.Lock()  # PyTorch captures one graph at a time in a process

# PyTorch's allocator of pinned memory keeps a pointer to a graph whose capture failed, so failed graphs must
# stay alive. They are empty, and few, as no caller tries again after a failure.
_failed_graphs: list[torch.cuda.CUDAGraph] = []


class CaptureFailed(RuntimeError):
    """A graph could not be captured; the message has the reason. Nothing else has changed."""


def why_not_capture() -> str | None:
    """Why this process must not capture graphs, or None."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = torch.distributed.get_world_size()
        if count > 1:
            return f"This is one of {count} processes, and a replay would leave out their communication."
    return None


def capture(
    run: Callable[[], Result], device: torch.device, stream: "torch.cuda.Stream | None" = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture what ``run`` launches on ``device``, and return the graph and what ``run`` returned.

    Each replay computes that result again. The capture has its own memory pool and, if none is given, its own
    stream. Other threads may use the GPU meanwhile; their captures wait. ``run`` is called once.

    Raises CaptureFailed if ``run`` or PyTorch raises. By then the current stream and device, the allocator
    and the default generator are as before, and no memory of the graph or of the failed frames is kept, so
    the caller can compute the same without a graph. A KeyboardInterrupt is raised as it is.

    >>> graph, y = capture(lambda: model(x), x.device)
    >>> graph.replay()
    """
    with _one_at_a_time, torch.cuda.device(device):
        found = _capture(run, torch.cuda.Stream() if stream is None else stream)
    if isinstance(found, str):
        raise CaptureFailed(found)
    return found


def _capture(
    run: Callable[[], Result], stream: "torch.cuda.Stream"
) -> tuple[torch.cuda.CUDAGraph, Result] | str:
    """Capture on the current device. If that fails, return the reason: an error would hold tensors."""
    cause: list[str] = []  # what run raised: PyTorch then raises an error of its own

    def run_and_note() -> Result:
        try:
            return run()
        except Exception as error:
            cause.append(first_line(error))
            raise

    before = torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    captured = False
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = run_and_note()
        captured = True
        return graph, result
    except Exception as error:
        _forget_frames(error)
        return cause[0] if cause else first_line(error)
    finally:
        if not captured:
            torch.cuda.set_stream(before)
            _put_back(graph, pool, stream)


def _forget_frames(error: BaseException | None) -> None:
    """Clear the frames of an error that the model may keep: they hold tensors in the graph's memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _put_back(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], stream: "torch.cuda.Stream") -> None:
    """Undo what a failed capture on the current device has left behind."""
    device = torch.cuda.current_device()
    # These calls raise if PyTorch made them already; then graph.reset() releases the pool.
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    graph.reset()
    _failed_graphs.append(graph)
    generator = torch.cuda.default_generators[device]
    if _draws(generator):
        return
    # The generator still acts as if it were captured. A capture that succeeds ends that, and it keeps the
    # generator's state object, which other graphs share.
    scratch = torch.zeros(1, device=generator.device)
    stream.wait_stream(torch.cuda.current_stream())
    small = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local")
    with contextlib.suppress(RuntimeError), small:
        scratch.zero_()
    if not _draws(generator):
        generator.graphsafe_set_state(generator.clone_state())


def _draws(generator: torch.Generator) -> bool:
    """True if random numbers can be drawn; the generator's state does not change."""
    state = generator.get_state()
    try:
        torch.empty(1, device=generator.device).uniform_(generator=generator)
    except RuntimeError:
        return False
    finally:
        generator.set_state(state)
    return True


@contextlib.contextmanager
def beside(stream: "torch.cuda.Stream", *tensors: torch.Tensor) -> Iterator[None]:
    """Inside, launches go to ``stream``, in order with earlier and later launches on the current stream.

    tensors: those that were made on the current stream and are used inside.
    """
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)
        for tensor in tensors:
            tensor.record_stream(stream)
