"""Steps in CUDA graphs, tested without a GPU: when they are rehearsed, captured, replayed and given up.

Only the graph itself is a stand-in. A replay computes what a GPU would, in the memory of the capture.
"""

import copy
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from card import POINTS, Card, CardFailed
from torch import nn
from training import CROSS_ENTROPY, assert_counted, batches, plain, versions, written

import fusedmlp
from fusedmlp.torch_tools import cuda_graph
from fusedmlp.train import graph_step

Result = Any


class Replayed:
    """A stand-in for a captured step: capturing it changes no parameter, replaying it runs the step."""

    def __init__(self, run: Callable[[], Result], tensors: list[torch.Tensor], model: nn.Module) -> None:
        self.run, self.model = run, model
        before = [tensor.detach().clone() for tensor in tensors]
        self.loss = run()
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        self.grads = [p.grad for p in model.parameters()]

    def replay(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        self.loss.copy_(self.run())
        for parameter, grad in zip(self.model.parameters(), self.grads, strict=True):
            if grad is not None:
                grad.copy_(parameter.grad)


class Seeing(nn.Module):
    """A model that notes the addresses of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 9), nn.Linear(9, 5)
        self.factor = 1.0
        self._seen: list[int] = []

    def forward(self, x: torch.Tensor) -> Any:
        self._seen.append(x.data_ptr())
        return self.last(torch.tanh(self.first(x)) * self.factor)


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}


class Steps:
    """A model trained by Graphs, and its twin trained by the plain loop."""

    def __init__(self, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = Seeing()
        self.twin = copy.deepcopy(self.model)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.twins = OPTIMIZERS[optimizer](self.twin.parameters())
        self.step = fusedmlp.TrainStep(self.model, CROSS_ENTROPY, self.optimizer)
        self.graphs = self.step._graphs
        self.captures = 0
        real = cuda_graph.capture

        def capture(run: Callable[[], Result], *where: Any) -> Any:
            """Run the real capture, for what it does on a failure, and return the stand-in for its graph."""
            self.captures += 1
            replayed: list[Replayed] = []
            state = [t for s in self.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
            tensors = [*self.model.parameters(), *state]

            def recorded() -> Result:
                replayed.append(Replayed(run, tensors, self.model))
                return replayed[0].loss

            _, loss = real(recorded, *where)
            return replayed[0], loss

        monkeypatch.setattr(cuda_graph, "capture", capture)

    def train(self, count: int, rows: int = 6) -> list[bool]:
        """Train both models alike, and return for each step whether it ran in the caller's memory."""
        own = []
        for x, y in batches(count, rows, dtype=torch.float32):
            self.model._seen.clear()
            ours = self.graphs(x, y, self.step._forward_backward, self.step._update)
            own.append(x.data_ptr() in self.model._seen)
            torch.testing.assert_close(ours, plain(self.twin, CROSS_ENTROPY, self.twins, x, y))
        for one, two in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            torch.testing.assert_close(one, two)
        return own


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_warm_up_begins_anew_when_a_graph_is_stale(
    optimizer: str, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps run in the caller's memory, one rehearses in the graph's memory, and the next is captured."""
    steps = Steps(optimizer, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps.train(5) == [True, True, False, False, False]
        assert steps.captures == 1
        steps.model.factor = steps.twin.factor = 2.0
        assert steps.train(5) == [True, True, False, False, False]
        assert steps.captures == 2
        state = copy.deepcopy(steps.twins.state_dict())
        steps.optimizer.load_state_dict(copy.deepcopy(state))
        anew = optimizer.endswith("fused")  # else the graph has no optimizer step in it
        assert steps.train(5) == ([True, True, False, False, False] if anew else [False] * 5)
        assert steps.train(4, rows=3) == [True, True, False, False]  # another batch size
        assert steps.train(2) == [False, False]
    card.assert_healthy()


@pytest.mark.parametrize("name", ["SGD", "SGD, fused", "Adam", "Adam, fused"])
def test_a_replay_raises_versions(name: str, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay raises the version of each tensor that it writes to, and of none that it only reads.

    A batch norm's statistics are left out, because PyTorch itself does not raise their versions.
    """

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.norm = nn.Linear(7, 5), nn.BatchNorm1d(7)
            self.factor: torch.Tensor
            self.register_buffer("factor", torch.ones(()))
            self.total = torch.zeros(())
            self._seen: list[int] = []

        def forward(self, x: torch.Tensor) -> Any:
            self.total.add_(1)
            return self.last(self.norm(x)) * self.factor

    monkeypatch.setattr(sys.modules[__name__], "Seeing", Counting)
    steps = Steps(name, monkeypatch)
    steps.train(4)
    assert steps.captures == 1
    model = steps.model
    tensors = written(model, steps.optimizer)
    tensors |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    tensors |= {"batches": model.norm.num_batches_tracked, "total": model.total}
    replay = _Uncounted(tensors)
    graph = next(iter(steps.graphs.graphs.values())).graph
    monkeypatch.setattr(graph, "replay", replay.around(graph.replay))
    before, factor = versions(tensors), model.get_buffer("factor")._version
    x, y = batches(1, dtype=torch.float32)[0]
    steps.graphs(x, y, steps.step._forward_backward, steps.step._update)
    assert_counted(before, tensors)
    assert model.get_buffer("factor")._version == factor


class _Uncounted:
    """Makes the stand-in's replay raise no versions, like a real replay."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def around(self, replay: Callable[[], None]) -> Callable[[], None]:
        def uncounted() -> None:
            before = versions(self.tensors)
            with torch.autograd._unsafe_preserve_version_counter(tuple(self.tensors.values())):
                replay()
            assert versions(self.tensors) == before

        return uncounted


def test_a_learning_rate_reaches_a_captured_update(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps("Adam, fused", monkeypatch)
    for i in range(8):
        for optimizer in (steps.optimizer, steps.twins):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + i)
        steps.train(1)
    assert steps.captures == 1


@pytest.mark.parametrize("optimizer", ["SGD", "Adam, fused"])
@pytest.mark.parametrize("point", POINTS)
def test_a_failed_capture_costs_one_warning_and_no_step(
    point: str, optimizer: str, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(optimizer, monkeypatch)
    steps.train(3)
    card.fails_at = point
    if point == "run":
        forward, card.fails_at = Seeing.forward, None

        def fails_in_a_capture(model: Seeing, x: torch.Tensor) -> Any:
            if card.serving:
                card.fails_at = "end"
                raise CardFailed("failed at run")
            return forward(model, x)

        monkeypatch.setattr(Seeing, "forward", fails_in_a_capture)
        steps.graphs.graphs.clear()  # the class's forward is in the fingerprint
        steps.graphs.seen.clear()
        steps.train(3)
    with pytest.warns(
        RuntimeWarning, match=f"runs without a CUDA graph from now on. .*CardFailed: failed at {point}"
    ) as caught:
        assert steps.train(1) == [True]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    card.assert_healthy()
    assert not steps.graphs.graphs
    x, y = batches(1, dtype=torch.float32)[0]
    assert f"failed at {point}" in str(steps.step._why_not_graph(x, y))
    # Gradients of the failed capture are gone with the graph's memory, so these must be new ones.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in steps.model.parameters())


def test_a_model_that_counts_its_calls_is_given_up(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps("SGD", monkeypatch)
    forward = Seeing.forward

    def counting(model: Seeing, x: torch.Tensor) -> Any:
        model.calls = getattr(model, "calls", 0) + 1
        return forward(model, x)

    monkeypatch.setattr(Seeing, "forward", counting)
    x, y = batches(1, dtype=torch.float32)[0]
    for _ in range(2):
        steps.graphs(x, y, steps.step._forward_backward, steps.step._update)
    with pytest.warns(RuntimeWarning, match="changes attributes of the model"):
        steps.graphs(x, y, steps.step._forward_backward, steps.step._update)
    assert "changes attributes" in str(steps.step._why_not_graph(x, y))
    assert steps.captures == 0


def test_an_error_of_the_user_is_raised(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised in every step of the warm-up, and no graph is captured."""
    steps = Steps("SGD", monkeypatch)
    wrong = torch.randn(6, 7), torch.full((6,), 77)
    for _ in range(5):
        with pytest.raises(IndexError, match="out of bounds"):
            steps.graphs(*wrong, steps.step._forward_backward, steps.step._update)
    assert steps.captures == 0
    steps.graphs.seen.clear()
    assert steps.train(4) == [True, True, False, False]
    card.assert_healthy()


def test_the_backend_is_in_the_fingerprint() -> None:
    """A graph keeps the kernels or PyTorch's operators that it was captured with."""
    model = Seeing()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    found = []
    for name in ("auto", "torch", "triton"):
        with fusedmlp.backend(name):  # type: ignore[arg-type]
            found.append(graph_step.fingerprint(model, CROSS_ENTROPY, optimizer, False))
    assert len(set(found)) == 3


@pytest.fixture
def alone(tmp_path: Any) -> Any:
    """A process group of one process."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    del os.environ["GLOO_SOCKET_IFNAME"]


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not available")
def test_parallel_models_are_refused(alone: None) -> None:
    model = Seeing()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    x, y = batches(1, dtype=torch.float32)[0]

    def reason(model: nn.Module) -> str | None:
        return graph_step.why_not(model, CROSS_ENTROPY, optimizer, x, y)

    assert reason(model) is None
    ddp = nn.parallel.DistributedDataParallel(model)
    assert "parallel by DistributedDataParallel" in str(reason(ddp))
    assert "parallel by DistributedDataParallel" in str(reason(nn.Sequential(ddp)))
    assert "parallel by DataParallel" in str(reason(nn.DataParallel(model)))
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(Seeing(), mesh=dist.init_device_mesh("cpu", (1,)))
    assert "parallel by FSDPModule" in str(reason(sharded))


def test_a_world_of_several_processes_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Seeing()
    x, y = batches(1, dtype=torch.float32)[0]
    step = fusedmlp.TrainStep(model, CROSS_ENTROPY, OPTIMIZERS["SGD"](model.parameters()))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    assert "one of 4 processes" in str(step._why_not_graph(x, y))
    assert "one of 4 processes" in str(step._two_launches.why_no_replay())


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (OPTIMIZERS["SGD"], {}, None),
        (OPTIMIZERS["SGD"], {"scaler": torch.amp.GradScaler("cpu", enabled=False)}, "GradScaler"),
        (OPTIMIZERS["SGD"], {"accumulate": 2}, "accumulated"),
        (torch.optim.LBFGS, {}, "LBFGS computes the loss as often"),
    ],
)
def test_steps_that_no_graph_can_repeat(
    make: Any, options: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "why_not_capture", lambda: None)
    model = Seeing()
    x, y = batches(1, dtype=torch.float32)[0]
    step = fusedmlp.TrainStep(model, CROSS_ENTROPY, make(model.parameters()), **options)
    said = step._why_not_graph(x, y)
    assert said is None if reason is None else reason in str(said), said


def test_an_interrupted_capture_leaves_no_gradients(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would lie in the freed memory of the graph. The step can be tried again."""
    steps = Steps("SGD", monkeypatch)
    steps.train(3)
    capture = cuda_graph.capture

    def interrupted(run: Callable[[], Result], *where: Any) -> Any:
        def and_then() -> Result:
            run()
            raise KeyboardInterrupt

        return capture(and_then, *where)

    monkeypatch.setattr(cuda_graph, "capture", interrupted)
    x, y = batches(1, dtype=torch.float32)[0]
    with pytest.raises(KeyboardInterrupt):
        steps.graphs(x, y, steps.step._forward_backward, steps.step._update)
    assert all(p.grad is None for p in steps.model.parameters())
    card.assert_healthy()
    monkeypatch.setattr(cuda_graph, "capture", capture)
    assert steps.train(2) == [False, False]
