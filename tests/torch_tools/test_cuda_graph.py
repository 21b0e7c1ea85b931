"""A failed capture leaves the process as it was, wherever it fails; GPU tests check PyTorch's state too."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from card import POINTS, Card, CardFailed, Stream

from fusedmlp.torch_tools import cuda_graph

HERE = torch.device("cuda", 0)


@pytest.mark.parametrize("heals", [False, True], ids=["torch 2.11", "newer"])
@pytest.mark.parametrize("point", POINTS)
def test_everything_is_put_back(point: str, heals: bool, card: Card) -> None:
    card.fails_at, card.generator_heals = point, heals

    def run() -> int:
        if point == "run":
            card.fails_at = "end"  # as in CUDA, a forbidden call makes the end of the capture fail too
            raise ValueError("the model's own words\nand more of them")
        return 7

    with pytest.raises(cuda_graph.CaptureFailed) as failure:
        cuda_graph.capture(run, HERE)
    expected = "ValueError: the model's own words" if point == "run" else f"CardFailed: failed at {point}"
    assert str(failure.value) == expected
    card.assert_healthy()
    # Other graphs share the generator's state, so it must be repaired, not replaced.
    assert not any(generator.replaced for generator in card.generators)
    # PyTorch cannot release a pool that it has ended but not yet given to the graph.
    assert sum(card.pools.values()) == (1 if point == "epilogue" else 0)
    graph, result = cuda_graph.capture(lambda: 8, HERE)
    assert result == 8
    graph.reset()
    card.assert_healthy()


def test_the_generator_is_replaced_if_nothing_else_helps(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator is replaced only if the capture that should repair it fails too."""
    card.fails_at = "end"
    put_back = cuda_graph._put_back

    def failing_again(*arguments: Any) -> None:
        card.fails_at = "enter"
        put_back(*arguments)

    monkeypatch.setattr(cuda_graph, "_put_back", failing_again)
    with pytest.raises(cuda_graph.CaptureFailed):
        cuda_graph.capture(lambda: None, HERE)
    card.assert_healthy()
    assert card.generators[0].replaced


def test_an_interrupt_goes_through(card: Card) -> None:
    def run() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cuda_graph.capture(run, HERE)
    card.assert_healthy()


def test_the_stream_is_on_the_graphs_device(card: Card) -> None:
    """PyTorch's capture stream is on the device that captured first; graphs of others would be empty."""
    for index in (0, 1):
        cuda_graph.capture(lambda: None, torch.device("cuda", index))
    assert [stream.device.index for stream in card.captured_on] == [0, 1]
    mine = Stream(1)
    cuda_graph.capture(lambda: None, torch.device("cuda", 1), mine)  # type: ignore[arg-type]
    assert card.captured_on[-1] is mine
    card.assert_healthy()


@pytest.mark.parametrize("point", ["run", "end"])
def test_nothing_of_a_failed_capture_is_kept(point: str, card: Card) -> None:
    """Tensors are freed even if the model keeps its error: the step without a graph needs the memory."""
    card.fails_at = point
    made: list[weakref.ref[torch.Tensor]] = []
    kept: list[Exception] = []

    def deeper(tensor: torch.Tensor) -> torch.Tensor:
        if point == "run":
            raise ValueError
        return tensor * 2

    def run() -> torch.Tensor:
        tensor = torch.ones(3)
        made.append(weakref.ref(tensor))
        try:
            result = deeper(tensor)
        except ValueError as error:
            kept.append(error)
            raise
        made.append(weakref.ref(result))
        return result

    gc.disable()
    try:
        with pytest.raises(cuda_graph.CaptureFailed) as failure:
            cuda_graph.capture(run, HERE)
        assert made
        assert all(reference() is None for reference in made)
        assert failure.value.__context__ is None
    finally:
        gc.enable()


def test_one_capture_at_a_time(card: Card) -> None:
    inside: list[int] = []

    def run() -> None:
        inside.append(1)
        assert sum(inside) == 1
        time.sleep(0.05)
        inside.append(-1)

    failures: list[BaseException] = []

    def in_a_thread() -> None:
        try:
            cuda_graph.capture(run, HERE)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=in_a_thread) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert card.captures == 4


@pytest.mark.parametrize("raises", [False, True])
def test_work_beside_is_waited_for_even_if_it_raises(
    raises: bool, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[Any] = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: recorded.append((tensor, stream))
    )
    stream, x = Stream(0), torch.ones(2)
    usual: Any = card.current_stream()
    try:
        with cuda_graph.beside(stream, x):  # type: ignore[arg-type]
            assert card.current_stream() is stream
            assert stream.waited_for == [usual]
            if raises:
                raise CardFailed
    except CardFailed:
        assert raises
    assert usual.waited_for == [stream]
    assert recorded == [(x, stream)]
    card.assert_healthy()


HEALTHY = """
import gc, warnings
import torch
from fusedmlp.torch_tools import cuda_graph

device = torch.device("cuda", torch.cuda.current_device())
x = torch.randn(64, 64, device=device)
older, noise = cuda_graph.capture(lambda: torch.rand(8, device=device), device)  # draws at each replay
usual = torch.cuda.current_stream()

def looks(): return x * 2 if (x @ x).sum().item() > 0 else x
def raises(): y = x @ x; torch.rand(4, device=device); raise ValueError("of the model")
def lost(): side = torch.cuda.Stream(); side.wait_stream(torch.cuda.current_stream()); \\
    torch.cuda.stream(side).__enter__(); return x + 1

gc.collect(); torch.cuda.synchronize(); torch.cuda.empty_cache()
allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
for failing in (looks, raises, lost, looks):
    state = torch.cuda.get_rng_state()
    try:
        cuda_graph.capture(failing, device)
    except cuda_graph.CaptureFailed as failure:
        print(failing.__name__, failure)
    else:
        raise SystemExit(f"{failing.__name__} was captured")
    assert torch.cuda.current_stream() == usual, failing
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.equal(torch.cuda.get_rng_state(), state), failing
    torch.manual_seed(3); one = torch.randn(5, device=device)
    torch.manual_seed(3); assert torch.equal(one, torch.randn(5, device=device))
    torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(4); older.replay(); first = noise.clone()
    torch.manual_seed(5); older.replay(); other = noise.clone()
    torch.manual_seed(4); older.replay(); assert torch.equal(first, noise)
    assert not torch.equal(first, other)  # the older graph draws from the same generator as before
    del one, first, other
    gc.collect(); torch.cuda.synchronize(); torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= allocated + 4096, torch.cuda.memory_allocated() - allocated
    assert torch.cuda.memory_reserved() <= reserved + 2**21, torch.cuda.memory_reserved() - reserved
    graph, product = cuda_graph.capture(lambda: x @ x, device)
    graph.replay()
    torch.testing.assert_close(product, x @ x)
    torch.ones(3).pin_memory().to(device, non_blocking=True)
    del graph, product
print("healthy")
"""


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_process_healthy() -> None:
    """This runs in its own process: if it fails, later tests in the same process could not be trusted."""
    run = subprocess.run([sys.executable, "-c", HEALTHY], capture_output=True, text=True, timeout=300)
    assert run.stdout.endswith("healthy\n"), run.stdout + run.stderr
    assert run.stdout.startswith("looks ")


@pytest.mark.gpu
def test_a_second_device_has_its_own_graphs() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for index in (0, 1):
        x = torch.ones(4, device=torch.device("cuda", index))
        graph, y = cuda_graph.capture(lambda x=x: x * 3, x.device)  # type: ignore[misc]
        x.fill_(2)
        graph.replay()
        assert y.tolist() == [6.0] * 4
