"""On every route a label that is not a valid class raises an error that names it, and is not trained on."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from training import CROSS_ENTROPY, OPTIMIZERS, Twins, assert_close, batches, mlp

import fusedmlp
from fusedmlp.train import wrong_labels

WRONG = [5, -1, 2**40]
KINDS = ["SGD", "SGD, momentum", "Adam", "AdamW"]


def network(device: torch.device) -> nn.Module:
    return fusedmlp.MLP(12, [16, 9], 5, device=device)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]})


def assert_equal(one: Any, two: Any) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.fixture
def step(request: pytest.FixtureRequest, device: torch.device) -> Any:
    """A TrainStep in two launches, with an optimizer that has its state."""
    model = network(device)
    made = fusedmlp.TrainStep(model, CROSS_ENTROPY, OPTIMIZERS[request.param](model.parameters()))
    with fusedmlp.backend("triton"):
        made(*data(device, 6))
        yield made


def data(device: torch.device, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 12, device=device), torch.randint(0, 5, (rows,), device=device)


def seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(3)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("step", "wrong"), [*zip(KINDS, [5, -1, 2**40, 2**31], strict=True)], indirect=["step"]
)
def test_an_epoch_stops_before_the_label(step: Any, wrong: int, device: torch.device) -> None:
    """Parameters and optimizer state are those before the wrong step, and training can go on."""
    x, y = data(device, 20)
    assert step.explain(x[:6], y[:6]).startswith("Two launches")
    order = torch.randperm(20, generator=seeded(device), device=device)
    twin = copy.deepcopy((step._model, step._optimizer.state_dict()))
    y[order[13]], right = wrong, y[order[13]].clone()  # in the third step of four
    shown = f"label {2**31 - 1} or more" if wrong >= 2**31 else f"label {wrong}"
    with pytest.raises(IndexError, match=f"{shown} at step 2 of this epoch is no class; classes are 0 to 4"):
        step.epoch(x, y, 6, seeded(device))
    stopped = everything(step._model, step._optimizer)

    step._model.load_state_dict(twin[0].state_dict())
    step._optimizer.load_state_dict(twin[1])
    for rows in order.split(6)[:2]:
        step(x[rows], y[rows])
    assert_equal(everything(step._model, step._optimizer), stopped)

    y[order[13]] = right
    losses = step.epoch(x, y, 6, seeded(device))
    assert losses.isfinite().all()
    for one, other in zip(step._model.parameters(), stopped["model"].values(), strict=True):
        assert not torch.equal(one, other)


@pytest.mark.kernels
@pytest.mark.parametrize("step", ["SGD, momentum", "Adam"], indirect=True)
def test_a_step_with_a_wrong_label_changes_nothing(step: Any, device: torch.device) -> None:
    x, y = data(device, 6)
    before = everything(step._model, step._optimizer)

    def train() -> None:
        step(x, torch.where(torch.arange(6, device=device) == 4, 7, y))
        for _ in range(100):  # on a GPU one of the next calls raises
            assert step(x, y).isnan()

    with pytest.raises(IndexError, match="label 7 at step 1 of this TrainStep is no class"):
        train()
    assert_equal(everything(step._model, step._optimizer), before)
    assert step(x, y).isfinite()


@pytest.mark.kernels
def test_the_error_counts_the_steps_before_this_route(device: torch.device) -> None:
    """PyTorch runs the first step of Adam, and the error counts it."""
    model = network(device)
    step = fusedmlp.TrainStep(model, CROSS_ENTROPY, torch.optim.Adam(model.parameters()))
    x, y = data(device, 20)
    order = torch.randperm(20, generator=seeded(device), device=device)
    y[order[13]] = -7
    with (
        fusedmlp.backend("triton"),
        pytest.raises(IndexError, match="label -7 at step 2 of this epoch"),
    ):
        step.epoch(x, y, 6, seeded(device))
    assert {int(state["step"]) for state in step._optimizer.state.values()} == {2}


class Late(wrong_labels.Labels):
    """Delays the record as a GPU does, until ``here`` is true."""

    here = False

    def _fetch(self, record: torch.Tensor) -> None:
        self._fetched, self._covered, self._event = record.clone(), len(self._steps), self

    def query(self) -> bool:
        return self.here


@pytest.mark.kernels
def test_a_record_that_comes_later() -> None:
    """The wrong step and all later ones are subtracted from the counts that those steps raised."""
    labels, record = Late(), torch.empty(1, dtype=torch.int64)
    wrong_labels.forget(record)
    old, new = [torch.tensor(40.0)], [torch.tensor(40.0)]
    for number in range(20):
        labels.look(record, 5, wait=False)
        labels.wait_for(number, old if number < 19 else new)  # as if a checkpoint had been loaded
        if number == 17:
            record.fill_(17 * 2**32 + 2**31 + 9)  # label 9 in step 17, recorded after the copy was made
    labels.here = True
    labels.look(record, 5, wait=False)
    assert [number for number, _ in labels._steps] == [16, 17, 18, 19]
    for number in range(20, 32):
        labels.wait_for(number, new)
    labels.look(record, 5, wait=False)
    with pytest.raises(IndexError, match="label 9 at step 17 of this TrainStep"):
        labels.look(record, 5, wait=False)
    assert (float(old[0]), float(new[0])) == (38.0, 27.0)
    assert wrong_labels.wrong_label(record) is None
    labels.look(record, 5, wait=True)


@pytest.mark.kernels
@pytest.mark.parametrize("step", ["SGD"], indirect=True)
def test_another_route_waits_for_the_labels(step: Any, device: torch.device) -> None:
    """So does a longer batch, which needs other memory."""
    x, y = data(device, 6)
    labels = step._two_launches._labels
    for call in (lambda: step(x.double().float().unsqueeze(0), y), lambda: step(*data(device, 9))):
        step._two_launches._workspace.wrong.fill_(2**32 + 2**31 + 6)
        labels.wait_for(1, [])
        before = everything(step._model, step._optimizer)
        with pytest.raises(IndexError, match="label 6 at step 1"):
            call()
        assert_equal(everything(step._model, step._optimizer), before)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("epoch", [False, True])
def test_on_the_cpu_pytorchs_error_is_raised(name: str, wrong: int, epoch: bool) -> None:
    twins = Twins(mlp(), OPTIMIZERS[name])
    twins.train(batches(2), "Direct")
    ((x, y),) = batches(1)
    before = everything(twins.model, twins.optimizer)
    y[2] = wrong
    with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
        twins.step.epoch(x, y, 6) if epoch else twins.step(x, y)
    assert_close(everything(twins.model, twins.optimizer), before)
    twins.train(batches(2), "Direct")
    twins.assert_same()
