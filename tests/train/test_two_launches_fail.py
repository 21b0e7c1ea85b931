"""If a kernel fails, the step is done once, another way, with one warning; nothing is half updated."""

import copy
import warnings
from typing import Any

import pytest
import torch
from available import HAS_TRITON
from card import Card
from failing import ERRORS, ours
from oracle import assert_right
from torch.nn import functional as F

import fusedmlp
from fusedmlp.dispatch import predicate
from fusedmlp.train import train_step

if not HAS_TRITON:
    pytest.skip("Triton is not installed: no kernels to fail", allow_module_level=True)

from fusedmlp.kernels import KernelFailed
from fusedmlp.kernels.train_step import step

pytestmark = pytest.mark.kernels


class Trained:
    """A model trained by TrainStep, in two launches where they do not fail, and copies for the plain loop."""

    def __init__(self, device: torch.device, optimizer: str) -> None:
        self.model = torch.nn.Sequential(torch.nn.Linear(20, 17), torch.nn.ReLU(), torch.nn.Linear(17, 5)).to(
            device
        )
        self.models = [self.model, copy.deepcopy(self.model), copy.deepcopy(self.model).double()]
        self.optimizers = [OPTIMIZERS[optimizer](m.parameters()) for m in self.models]
        self.step = fusedmlp.TrainStep(self.model, F.cross_entropy, self.optimizers[0])

    def loops(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        """Do a step of PyTorch's loop in float32 and in float64, and return the losses."""
        losses = []
        for model, optimizer in zip(self.models[1:], self.optimizers[1:], strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(model[0].weight.dtype)), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    def assert_same(self) -> None:
        for parameters in zip(*(model.parameters() for model in self.models), strict=True):
            assert_right(*(p.detach() for p in parameters), floor=1e-5)
            for name, value in self.optimizers[0].state[parameters[0]].items():
                theirs = [o.state[p][name] for o, p in zip(self.optimizers, parameters, strict=True)]
                if name == "step":
                    assert value == theirs[1]
                elif value is not None:
                    assert_right(*theirs, floor=1e-5)


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def trained(device: torch.device, optimizer: str = "SGD", steps: int = 1) -> Trained:
    """A model after its first steps, so that the optimizer has its state."""
    found = Trained(device, optimizer)
    for _ in range(steps):
        x, y = batch(device)
        found.loops(x, y)
        with fusedmlp.backend("torch"):
            found.step(x, y)
    return found


def batch(device: torch.device, rows: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 20, device=device), torch.randint(0, 5, (rows,), device=device)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two-launch step takes CPU tensors for a GPU's, and the ordinary step uses no CUDA graph."""

    def on(x: Any, device_type: str) -> bool:
        return isinstance(x, torch.Tensor)

    monkeypatch.setattr(predicate, "_interpreted", lambda x: True)
    monkeypatch.setattr(train_step, "_is_on", on)
    monkeypatch.setattr(fusedmlp.TrainStep, "_why_not_graph", lambda *arguments: "graphs are left out here")


BOTH = ("_step_rows_kernel", "_step_weights_kernel")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kernel", BOTH)
def test_a_step_that_fails_is_done_another_way(
    kernel: str, optimizer: str, fail: Any, device: torch.device, as_on_a_gpu: None
) -> None:
    twins = trained(device, optimizer)
    failing = fail(step, kernel, ERRORS["launch"], number=1)
    caught: list[Any] = []
    for i in range(4):
        x, y = batch(device)
        before = twins.step.explain(x, y)
        assert before.startswith("Two launches") == (i < 2), before
        with warnings.catch_warnings(record=True) as here:
            warnings.simplefilter("always")
            loss = twins.step(x, y)
        caught += here
        assert_right(loss, *twins.loops(x, y), floor=1e-5)
    assert failing.launches == 2
    assert [text.split(":")[0] for text in ours(caught)] == ["Training goes on without the two-launch step"]
    assert [w.filename for w in caught if w.category is RuntimeWarning] == [__file__]
    assert f"Not in two launches: the Triton kernel {kernel[1:-7]} failed with RuntimeError" in before
    twins.assert_same()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("kernel", BOTH)
def test_an_epoch_that_fails_goes_on_where_it_was(
    kernel: str, number: int, optimizer: str, fail: Any, device: torch.device, as_on_a_gpu: None
) -> None:
    """Nothing is half updated, no row is left out and none is taken twice."""
    twins = trained(device, optimizer)
    images, labels = batch(device, 40)
    failing = fail(step, kernel, ERRORS["launch"], number)
    for epoch in range(2):
        generator = torch.Generator(device).manual_seed(epoch)
        order = torch.randperm(40, generator=generator, device=device)
        expected = [twins.loops(images[rows], labels[rows]) for rows in order.split(18)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses = twins.step.epoch(images, labels, 18, generator.manual_seed(epoch))
        assert len(ours(caught)) == (epoch == 0)
        for loss, both in zip(losses, expected, strict=True):
            assert_right(loss, *both, floor=1e-5)
    assert failing.launches == number + 1
    twins.assert_same()


@pytest.mark.parametrize("what", [*BOTH, "the last batch"])
def test_both_lengths_of_batch_are_built_before_an_epoch(
    what: str, device: torch.device, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that cannot be built thus fails before the first step."""
    twins = trained(device)
    images, labels = batch(device, 40)
    happened: list[tuple[str, int]] = []

    def build(kernel: Any, grid: Any, x: Any, args: Any, options: Any) -> None:
        happened.append((kernel.__name__, args[1]))
        if kernel.__name__ == what or (what == "the last batch" and args[1] == 4):
            raise KernelFailed("as a test wants")

    monkeypatch.setattr(step, "build", build)
    monkeypatch.setattr(step, "launch", lambda *arguments: pytest.fail("a step was launched"))
    with pytest.warns(RuntimeWarning, match="without the two-launch step: as a test wants"):
        twins.step.epoch(images, labels, 18)
    assert {rows for _, rows in happened} <= {18, 4}
    for x, y in [batch(device)]:
        assert "Not in two launches: as a test wants" in twins.step.explain(x, y)


def test_what_is_built_is_what_is_launched(
    device: torch.device, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = trained(device)
    images, labels = batch(device, 40)
    built: list[Any] = []
    launched: list[Any] = []
    run = step.launch

    def launch(*arguments: Any) -> None:
        launched.append(arguments)
        run(*arguments)

    monkeypatch.setattr(step, "build", lambda *arguments: built.append(arguments))
    monkeypatch.setattr(step, "launch", launch)
    twins.step.epoch(images, labels, 18)
    assert len(built) == 4
    assert len(launched) == 6

    def compiled(arguments: Any) -> tuple[Any, ...]:
        """All that Triton may specialize a kernel for, without numbers that change from step to step."""
        kernel, grid, _, args, options = arguments
        kinds = [
            None if a is None else (a.data_ptr() % 16, a.dtype) if torch.is_tensor(a) else type(a)
            for a in args
        ]
        return kernel.__name__, grid, str(kinds), str(options)

    assert set(map(compiled, built)) == set(map(compiled, launched))


@pytest.mark.parametrize("kernel", BOTH)
def test_out_of_memory_is_raised(kernel: str, fail: Any, device: torch.device, as_on_a_gpu: None) -> None:
    twins = trained(device)
    fail(step, kernel, lambda: RuntimeError("Triton Error [CUDA]: out of memory"))
    x, y = batch(device)
    with pytest.raises(torch.OutOfMemoryError):
        twins.step(x, y)
    with pytest.raises(torch.OutOfMemoryError):
        twins.step.epoch(x, y, 5)
    assert twins.step.explain(x, y).startswith("Two launches")


def test_forced_kernels_that_fail_raise(fail: Any, device: torch.device) -> None:
    """The parameters do not change."""
    twins = trained(device)
    fail(step, "_step_weights_kernel", ERRORS["shared memory"])
    before = [p.detach().clone() for p in twins.model.parameters()]
    x, y = batch(device)
    for _ in range(2):  # the kernels are tried again
        with fusedmlp.backend("triton"), pytest.raises(KernelFailed, match="out of resource"):
            twins.step(x, y)
        with fusedmlp.backend("triton"), pytest.raises(KernelFailed, match="out of resource"):
            twins.step.epoch(x, y, 5)
    assert all(torch.equal(p, was) for p, was in zip(twins.model.parameters(), before, strict=True))


@pytest.mark.parametrize("point", ["run", "end"])
def test_an_epoch_that_cannot_be_captured_goes_launch_by_launch(
    point: str, card: Card, device: torch.device, as_on_a_gpu: None
) -> None:
    """This tests only the capture, because the epoch around it needs a GPU."""
    twins = trained(device)
    two_launches = twins.step._two_launches
    card.fails_at = point

    def run() -> None:
        card.fail("run")

    with pytest.warns(RuntimeWarning, match=f"An epoch goes launch by launch, .* failed at {point}"):
        assert not two_launches._capture(run, torch.device("cuda", 0))
    card.assert_healthy()
    said = twins.step.explain(*batch(device))
    assert said.startswith("Two launches")
    assert f"not as a CUDA graph: Capturing it raised CardFailed: failed at {point}." in said
