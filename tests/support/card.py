"""A stand-in for the CUDA graphs of ``torch.cuda``, so that the code that captures them runs without a GPU.

It keeps the order in which torch 2.11 does things, and so what a failure at each point leaves half done.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

# Where a capture can fail: at the start; once the allocator serves the graph's pool; in the captured code;
# when the capture ends; after the pool has been ended; when only the graph itself is left to make.
POINTS = ("enter", "begin", "run", "end", "epilogue", "instantiate")


class CardFailed(RuntimeError):
    """The error that PyTorch raises when a capture fails."""


class Stream:
    def __init__(self, device: int) -> None:
        self.device = torch.device("cuda", device)
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.append(other)


class Generator:
    """The default generator. From torch 2.12 on it stays usable after a failed capture."""

    def __init__(self, card: "Card") -> None:
        self.card, self.capturing, self.device = card, False, torch.device("cpu")
        self.replaced = False

    def clone_state(self) -> str:
        return "a clone"

    def graphsafe_set_state(self, state: str) -> None:
        assert state == "a clone"
        self.capturing, self.replaced = False, True


class Graph:
    def __init__(self) -> None:
        self.run: Callable[[], None] | None = None
        self.owns_pool: tuple[int, int] | None = None
        self.card: Card | None = None

    def reset(self) -> None:
        if self.owns_pool is not None and self.card is not None:
            self.card.release(0, self.owns_pool)
            self.owns_pool = None

    __del__ = reset


class Card:
    """The state of the process that a capture must restore, and the point at which the next capture fails."""

    def __init__(self) -> None:
        self.device = 0
        self.streams = {0: Stream(0), 1: Stream(1)}
        self.at_first = dict(self.streams)
        self.generators = (Generator(self), Generator(self))
        self.pools: dict[tuple[int, int], int] = {}  # how many use each
        self.serving: list[tuple[int, int]] = []  # pools that the allocator takes memory from
        self.fails_at: str | None = None
        self.generator_heals = False
        self.captures = 0
        self.captured_on: list[Stream] = []

    def fail(self, point: str) -> None:
        if self.fails_at == point:
            self.fails_at = None
            raise CardFailed(f"failed at {point}")

    def new_pool(self) -> tuple[int, int]:
        return (0, len(self.pools) + 1)

    def end(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.serving:
            raise CardFailed("endAllocatePool: not currently recording to mempool_id")
        self.serving.remove(pool)

    def release(self, device: int, pool: tuple[int, int]) -> None:
        self.pools[pool] -= 1
        assert self.pools[pool] >= 0, "a pool was released twice"

    def assert_healthy(self) -> None:
        assert self.device == 0
        assert self.streams == self.at_first
        assert self.serving == []
        assert not any(generator.capturing for generator in self.generators)

    @contextlib.contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        before, self.device = self.device, torch.device(device).index or 0
        try:
            yield
        finally:
            self.device = before

    def current_stream(self, device: Any = None) -> Stream:
        return self.streams[self.device if device is None else torch.device(device).index or 0]

    def set_stream(self, stream: Stream) -> None:
        self.device = stream.device.index
        self.streams[self.device] = stream

    @contextlib.contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream(stream.device)
        with self.on_device(stream.device):
            self.set_stream(stream)
            try:
                yield
            finally:
                self.set_stream(before)


def graph_class(card: Card) -> type:
    class graph:  # by the name of what it stands for
        def __init__(
            self, cuda_graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
        ) -> None:
            assert stream is not None, "PyTorch's own stream is on the device that captured first"
            assert stream.device.index == card.device
            assert capture_error_mode == "thread_local"
            self.graph, self.stream = cuda_graph, stream
            self.pool = card.new_pool() if pool is None else pool

        def __enter__(self) -> None:
            card.fail("enter")
            self.before = card.current_stream()
            card.set_stream(self.stream)
            card.generators[card.device].capturing = True
            card.pools[self.pool] = 1
            card.serving.append(self.pool)
            card.fail("begin")
            card.captures += 1
            card.captured_on.append(self.stream)

        def __exit__(self, *_: object) -> None:
            generator = card.generators[card.device]
            if card.generator_heals:
                generator.capturing = False
            card.fail("end")
            card.end(card.device, self.pool)
            card.fail("epilogue")
            generator.capturing = False
            self.graph.card, self.graph.owns_pool = card, self.pool
            card.fail("instantiate")
            card.set_stream(self.before)

    return graph


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    from fusedmlp.torch_tools import cuda_graph

    card = Card()
    for name, stand_in in {
        "device": card.on_device, "stream": card.on_stream, "set_stream": card.set_stream,
        "current_stream": card.current_stream, "current_device": lambda: card.device,
        "Stream": lambda device=None: Stream(card.current_stream(device).device.index),
        "graph": graph_class(card), "CUDAGraph": Graph, "graph_pool_handle": card.new_pool,
        "default_generators": card.generators,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", card.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", card.release, raising=False)
    monkeypatch.setattr(cuda_graph, "_draws", lambda generator: not generator.capturing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return card
