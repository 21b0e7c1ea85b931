"""CUDA graphs whose failed capture harms nobody: afterwards the process is as it was.

PyTorch leaves a capture that fails half ended. In torch 2.11 the caller stays on the capture's stream, the
allocator goes on serving the graph's memory pool, and the default generator believes that it is still being
captured, so that every ``randn`` and every dropout raises from then on. The C++ behind this was read in
``aten/src/ATen/cuda/CUDAGraph.cpp`` and ``CUDAGeneratorImpl.cpp``.
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

# PyTorch's allocator of pinned memory keeps a pointer to a graph whose capture has failed, so the graph has
# to stay. It is empty, and there are few of them: a route is closed after its first failure.
_failed_graphs: list[torch.cuda.CUDAGraph] = []


class CaptureFailed(RuntimeError):
    """A graph could not be captured, for the reason in the message. Nothing else has changed."""


def why_not_capture() -> str | None:
    """None if this process may capture graphs at all, else the reason."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        count = distributed.get_world_size()
        return f"this is one of {count} processes, and a replay would leave out what they tell each other"
    return None


def capture(
    run: Callable[[], Result], device: torch.device, stream: "torch.cuda.Stream | None" = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture what ``run`` launches on ``device``: the graph, and what ``run`` returned.

    The capture has a memory pool of its own, and a stream of its own if none is given. What ``run`` returned
    is computed by each replay. Other threads may use the GPU meanwhile, but not capture: they wait.

    Whatever ``run`` or PyTorch raises, CaptureFailed is raised in its place, once all is as it was: the
    current stream and device, the allocator, the default generator. Nothing is kept of the graph and of the
    frames in which it failed, so the caller may compute the same without a graph. KeyboardInterrupt goes
    through.

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
    """The same on the current device; the reason if it failed, which holds on to nothing."""
    reasons: list[str] = []  # the first is the cause, the others come of it

    def noted() -> Result:
        try:
            return run()
        except Exception as error:
            reasons.append(first_line(error))
            raise

    before = torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    captured = False
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = noted()
        captured = True
        return graph, result
    except Exception as error:
        reasons.append(first_line(error))
        _forget_frames(error)
        return reasons[0]
    finally:
        if not captured:
            torch.cuda.set_stream(before)
            _put_back(graph, pool, stream)


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the frames hold in which this error was raised: tensors in the graph's memory.

    They would go with the error, but somebody may have kept that.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _put_back(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], stream: "torch.cuda.Stream") -> None:
    """End what the failed capture has left begun, on the current device."""
    device = torch.cuda.current_device()
    # It raises where the capture itself came as far as this; then the graph lets go of its pool in reset().
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    graph.reset()
    _failed_graphs.append(graph)
    generator = torch.cuda.default_generators[device]
    if _draws(generator):
        return
    # The generator's state believes that it is being captured. A capture that succeeds ends that, and leaves
    # the state in place, in which other graphs have a part.
    scratch = torch.zeros(1, device=generator.device)
    stream.wait_stream(torch.cuda.current_stream())
    small = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local")
    with contextlib.suppress(RuntimeError), small:
        scratch.zero_()
    if not _draws(generator):
        generator.graphsafe_set_state(generator.clone_state())


def _draws(generator: torch.Generator) -> bool:
    """Whether random numbers can be drawn; those that are drawn to find out are drawn again later."""
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
    """Inside, work goes to ``stream``: after what was launched before, and before what is launched later.

    tensors: of the current stream, which are used inside.
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
