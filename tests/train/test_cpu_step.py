"""The CPU's step without autograd: its memory, and its products by oneDNN and in bfloat16."""

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import assert_all_right, nearby
from torch import nn
from training import CROSS_ENTROPY, OPTIMIZERS, Twins, batches, mlp, plain

import fusedmlp
from fusedmlp.dispatch import onednn
from fusedmlp.train import cpu_step

WIDTHS = (784, 256, 128, 128, 10)


def data(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, WIDTHS[0]), torch.randint(0, WIDTHS[-1], (rows,))


def peak(run: Callable[[], object]) -> int:
    """The peak of the bytes that PyTorch's allocator gives out during this call."""
    gc.collect()  # so that no garbage of other tests is freed meanwhile, and counted
    gc.disable()
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            run()
    finally:
        gc.enable()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.thinned
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 64, 2048])
@pytest.mark.parametrize("name", ["SGD", "SGD, momentum", "Adam"])
def test_memory_is_not_above_the_plain_loops(name: str, rows: int, compute_dtype: torch.dtype | None) -> None:
    twins = Twins(mlp(dtype=torch.float32, widths=WIDTHS), OPTIMIZERS[name], compute_dtype=compute_dtype)
    x, y = data(rows)
    for _ in range(2):  # so that the optimizer has its state
        twins.step(x, y)
        twins.plain(x, y)
    for optimizer in (twins.optimizer, twins.twins):
        optimizer.zero_grad()
    assert twins.step.explain(x, y).startswith("Direct")
    ours = peak(lambda: twins.step(x, y))
    with torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype is not None):
        theirs = peak(lambda: twins.plain(x, y))
    assert theirs > rows * sum(WIDTHS[1:]) * 2  # the measurement has at least the activations
    assert ours <= theirs


@pytest.fixture(params=["oneDNN", "PyTorch"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Compute every product by oneDNN, or none."""
    if request.param == "oneDNN" and not (torch.backends.mkldnn.is_available() and onednn._is_right()):
        pytest.skip("this PyTorch has no oneDNN")
    reason = None if request.param == "oneDNN" else "a test asks for PyTorch's"
    monkeypatch.setattr(onednn, "why_not_here", lambda: reason)
    monkeypatch.setattr(onednn, "_LEAST_PRODUCTS", 0)
    return request.param


@pytest.mark.parametrize("rows", [1, 7, 64, 4100])
def test_error_of_the_gradients_in_float32(products: str, rows: int) -> None:
    """The error is at most twice PyTorch's. With accumulate=2, .grad holds half of each gradient."""
    twins = Twins(mlp(dtype=torch.float32, widths=(784, 33, 17, 10)), OPTIMIZERS["SGD"], accumulate=2)
    exact = copy.deepcopy(twins.model).double()
    x, y = data(rows)
    assert twins.step.explain(x, y).startswith("Direct")
    loss = twins.step(x, y)

    def of(model: nn.Sequential, x: torch.Tensor) -> list[torch.Tensor]:
        loss = CROSS_ENTROPY(model(x.to(model[0].weight.dtype)), y)
        return [loss.detach(), *torch.autograd.grad(loss, [*model.parameters()])]

    def again(nudge: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        return of(nearby(twins.twin, nudge), nudge(x))

    ours = [loss, *(2 * p.grad for p in twins.model.parameters())]
    names = ["loss", *(name for name, _ in twins.model.named_parameters())]
    assert_all_right(ours, of(twins.twin, x), of(exact, x), names, again)


def test_strided_arguments(products: str) -> None:
    twins = Twins(mlp(dtype=torch.float32, widths=(784, 33, 10)), OPTIMIZERS["SGD"])
    y = torch.randint(0, 10, (14,))[::2]
    for x in (torch.randn(784, 7).t(), torch.randn(14, 784)[::2], torch.randn(1, 784).expand(7, 784)):
        assert twins.step.explain(x, y).startswith("Direct")
        torch.testing.assert_close(twins.step(x, y), twins.plain(x, y))
    torch.testing.assert_close(twins.model.state_dict(), twins.twin.state_dict())


def test_no_features() -> None:
    twins = Twins(mlp(widths=(0, 4, 5)), OPTIMIZERS["SGD, momentum"])
    data = [(torch.empty(6, 0, dtype=torch.float64), torch.randint(0, 5, (6,))) for _ in range(3)]
    twins.train(data, "Direct")
    twins.assert_same()


def test_nan_in_every_product(products: str) -> None:
    for place in range(3):
        twins = Twins(mlp(dtype=torch.float32, widths=(784, 33, 17, 10)), OPTIMIZERS["SGD"])
        for model in (twins.model, twins.twin):
            with torch.no_grad():
                model[2 * place].weight[3, 3] = float("nan")
        x, y = data(7)
        twins.step(x, y)
        twins.plain(x, y)
        for ours, theirs in zip(twins.model.parameters(), twins.twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_onednn_that_is_switched_off_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("oneDNN was asked")

    monkeypatch.setattr(onednn, "why_not_here", lambda: None)
    monkeypatch.setattr(onednn, "product", refuse)
    monkeypatch.setattr(onednn, "_LEAST_PRODUCTS", 0)
    model = mlp(dtype=torch.float32, widths=(784, 33, 10))
    step = fusedmlp.TrainStep(model, CROSS_ENTROPY, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.backends.mkldnn.flags(enabled=False):
        step(*data(7))
        assert "oneDNN" not in step.explain(*data(7))
    with fusedmlp.backend("torch"):
        step(*data(7))
        assert "oneDNN" not in step.explain(*data(7))
    assert "oneDNN" in step.explain(*data(7))
    with pytest.raises(AssertionError, match="was asked"):
        step(*data(7))


class TestBfloat16:
    @pytest.fixture(autouse=True)
    def able(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Use bfloat16 on every CPU, even if it is slow there."""
        monkeypatch.setattr(cpu_step, "why_not_bfloat16", lambda: None)

    @pytest.mark.parametrize("name", ["SGD", "SGD, momentum", "Adam"])
    def test_parameters_stay_float32_and_follow_autocast(self, name: str) -> None:
        twins = Twins(mlp(dtype=torch.float32, widths=WIDTHS), OPTIMIZERS[name], compute_dtype=torch.bfloat16)
        exact = copy.deepcopy(twins.model)
        exactly = OPTIMIZERS[name](exact.parameters())
        x, y = data(256)
        for i in range(12):
            rows = slice(i % 4 * 64, i % 4 * 64 + 64)
            ours = twins.step(x[rows], y[rows])
            right = plain(exact, CROSS_ENTROPY, exactly, x[rows], y[rows])
            twins.twins.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = CROSS_ENTROPY(twins.twin(x[rows]), y[rows])
            loss.backward()
            twins.twins.step()
            assert ours.dtype is torch.float32
            assert (ours - right).abs() < 2 * (loss - right).abs() + 0.02, (i, ours, right, loss)
        assert twins.step.explain(x, y).startswith("Direct")
        assert "bfloat16" in twins.step.explain(x, y)
        assert all(p.dtype is torch.float32 for p in twins.model.parameters())
        for key, goal in exact.state_dict().items():
            error = (twins.model.state_dict()[key] - goal).norm()
            assert error <= 2 * (twins.twin.state_dict()[key] - goal).norm() + 1e-3 * goal.norm(), key

    def test_ordinary_step_is_under_autocast(self) -> None:
        kinds = []

        class Looking(nn.Linear):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                output = super().forward(input)
                kinds.append(output.dtype)
                return output

        model = Looking(784, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = fusedmlp.TrainStep(model, CROSS_ENTROPY, optimizer, compute_dtype=torch.bfloat16)
        assert step(*data(7)).dtype is torch.float32
        assert kinds == [torch.bfloat16]

    def test_float64_stays_float64(self) -> None:
        twins = Twins(mlp(), OPTIMIZERS["SGD"], compute_dtype=torch.bfloat16)
        twins.train(batches(2), "Ordinary")
        twins.assert_same()

    def test_few_rows_are_computed_in_float32(self) -> None:
        """Below 32 rows, casting the weights takes longer than it saves."""
        twins = Twins(
            mlp(dtype=torch.float32, widths=WIDTHS), OPTIMIZERS["SGD"], compute_dtype=torch.bfloat16
        )
        x, y = data(31)
        assert "Not in bfloat16: Below 32 rows" in twins.step.explain(x, y)
        torch.testing.assert_close(twins.step(x, y), twins.plain(x, y), rtol=1e-6, atol=1e-6)
        x, y = data(32)
        assert "Products in bfloat16" in twins.step.explain(x, y)
        before = twins.twin[2].weight.detach().clone()
        assert (twins.step(x, y) - twins.plain(x, y)).abs() < 0.1
        error = (twins.model[2].weight - twins.twin[2].weight).norm() / (twins.twin[2].weight - before).norm()
        assert 1e-4 < error < 0.1

    def test_bfloat16_is_not_the_default(self) -> None:
        twins = Twins(mlp(dtype=torch.float32, widths=WIDTHS), OPTIMIZERS["SGD"])
        x, y = data(64)
        torch.testing.assert_close(twins.step(x, y), twins.plain(x, y), rtol=1e-5, atol=1e-6)
        assert "bfloat16" not in twins.step.explain(x, y)


def test_without_units_for_bfloat16_a_step_runs_in_float32_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    twins = Twins(mlp(dtype=torch.float32, widths=WIDTHS), OPTIMIZERS["SGD"], compute_dtype=torch.bfloat16)
    x, y = data(64)
    with pytest.warns(UserWarning, match="neither AMX nor AVX512-BF16") as caught:
        loss = twins.step(x, y)
    assert caught[0].filename == __file__
    torch.testing.assert_close(loss, twins.plain(x, y), rtol=1e-5, atol=1e-6)
    assert "neither AMX nor AVX512-BF16" in twins.step.explain(x, y)
    with warnings.catch_warnings():  # it warns only once
        warnings.simplefilter("error")
        twins.step(x, y)
