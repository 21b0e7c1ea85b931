"""verify compares with float64 where it can, and says where it cannot."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from inspected import Foreign, Holder, State, shown, verdicts
from torch import nn as tnn
from torch.nn import functional as F

import fusedmlp
from fusedmlp import nn
from fusedmlp.dispatch import reference
from fusedmlp.inspection import verify_runs
from fusedmlp.inspection.verify import verify


class Uncopied(nn.MLP):
    def __deepcopy__(self, memo: Any) -> Any:
        raise NotImplementedError("as planned")


def test_a_difference_without_float64_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Uncopied(5, [4], 3), torch.randn(6, 5)
    why = "Not compared with float64, which raises NotImplementedError: as planned"
    result = verify(model, x, verbose=False)
    assert result
    assert (result.notes, result.failures) == ((why,), ())
    forward = reference.mlp_forward
    monkeypatch.setattr(reference, "mlp_forward", lambda *args: [y * (1 + 1e-6) for y in forward(*args)])
    # The plain model uses our own operators too in a subclass of MLP, so make every second run differ.
    monkeypatch.setattr(verify_runs, "_on_torch_nn", lambda model: fusedmlp.backend("torch"))
    runs = iter(range(10**6))
    monkeypatch.setattr(
        reference, "mlp_forward", lambda *args: [y * (1 + 1e-6 * (next(runs) % 2)) for y in forward(*args)]
    )
    result = verify(model, x, verbose=False)
    assert not result
    assert why in result.failures
    assert "unknown" in verdicts(result).values()
    assert shown(result).startswith(("unknown: ", "WRONG: "))


def test_float64_is_float64_throughout() -> None:
    """The copy computes in float64 even if the forward casts to, or creates, less precise tensors."""
    constant = torch.randn(3)

    def code(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x).half().float() * constant + torch.full((3,), 0.1) + torch.arange(3) / 7
        return F.softmax(y, -1, dtype=torch.float32) @ torch.outer(constant, constant)

    result = verify(Holder(code, fc=nn.Linear(5, 3)), torch.randn(6, 5), verbose=False)
    assert result
    assert not result.notes
    assert 1e-6 < result.rows[0].torchs_error < 1e-2  # float64 does not make the error of float16


DRAWING: dict[str, Callable[[], tnn.Module]] = {
    "dropout": lambda: fusedmlp.fuse(Foreign()),
    "rand": lambda: Holder(lambda self, x: self.fc(x) + torch.rand(3, device=x.device), fc=nn.Linear(5, 3)),
    "uniform_": lambda: Holder(lambda self, x: self.fc(torch.empty_like(x).uniform_()), fc=nn.Linear(5, 3)),
    "rrelu": lambda: Holder(lambda self, x: F.rrelu(self.fc(x), training=True), fc=nn.Linear(5, 3)),
}


@pytest.mark.parametrize("path", ["auto", pytest.param("triton", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("name", DRAWING)
def test_models_that_draw_random_numbers_are_not_compared_with_float64(
    name: str, path: Any, x: torch.Tensor
) -> None:
    model = DRAWING[name]().to(x.device)
    why = "Not compared with float64, because the model draws random numbers: call model.eval() first."
    state = State(model, x)
    with fusedmlp.backend(path):
        result = verify(model, x, verbose=False)
    state.check()
    shown(result)
    # A result with the same bits as PyTorch's is right; any other is unknown.
    assert {row.verdict for row in result.rows} <= {"right", "unknown"}
    assert all(row.verdict == ("right" if row.error == 0 else "unknown") for row in result.rows)
    assert bool(result) == ("unknown" not in verdicts(result).values())
    assert why in (result.notes if result else result.failures)
    if path == "auto" and x.device.type == "cpu":
        assert result
    if name == "dropout":
        model.eval()
        with fusedmlp.backend(path):
            result = verify(model, x, verbose=False)
        assert result
        assert why not in result.notes
        model.train()


def test_random_numbers_and_a_difference_are_never_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Dropout(0.2))
    forward = reference.mlp_forward
    monkeypatch.setattr(reference, "mlp_forward", lambda *args: [y * (1 + 1e-6) for y in forward(*args)])
    result = verify(model, torch.randn(6, 5), verbose=False)
    assert not result
    assert verdicts(result)["output"] == "unknown"
    assert shown(result).startswith("unknown: 2 layers in 1 chain on PyTorch's operators.")
    assert "call model.eval() first." in " ".join(str(result).split())


def test_a_model_that_is_not_deterministic_is_noted() -> None:
    numbers = np.random.default_rng()
    model = Holder(lambda self, x: self.fc(x) * numbers.random(), fc=nn.Linear(5, 3))
    result = verify(model, torch.randn(6, 5), verbose=False)
    assert "Two runs of the plain model differ: something in it is not deterministic." in result.notes
