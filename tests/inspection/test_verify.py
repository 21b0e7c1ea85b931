"""verify accepts models of many kinds, raises the errors of the plain model and changes nothing."""

import contextlib
import json
import pathlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from inspected import Holder, State, shown, verdicts
from torch import nn as tnn

import fusedmlp
from fusedmlp import nn
from fusedmlp.dispatch import backend_choice
from fusedmlp.inspection import verify as verify_module
from fusedmlp.inspection.verify import verify


def test_modes_of_the_caller(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = nn.MLP(5, [4], 3), torch.randn(6, 5)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            made = torch.randn(6, 5)
            state = State(model, made)
            result = verify(model, made)
            state.check()
        assert result
        assert len(result.rows) == 6
        assert capsys.readouterr().out == f"{result}\n"
    assert result.rows[0].torchs_error > 1e-4  # the error of bfloat16: autocast was on
    with torch.inference_mode():
        result = verify(nn.MLP(5, [4], 3), torch.randn(6, 5), verbose=False)
    assert result
    assert [row.name for row in result.rows] == ["output"]
    with torch.device("meta"):  # new tensors are on meta unless a device is named
        assert verify(model, x, verbose=False)
    with fusedmlp.backend("torch"):
        assert "The caller chose backend('torch')." in " ".join(
            shown(verify(model, x, verbose=False)).split()
        )


def test_without_gradients_or_outputs() -> None:
    x = torch.randn(6, 5)
    assert verify(nn.Sequential(nn.ReLU()), x, verbose=False)
    result = verify(Holder(lambda self, x: self.fc(x).detach(), fc=nn.Linear(5, 3)), x, verbose=False)
    assert result
    assert (len(result.rows), result.checks) == (1, ())
    assert "no gradients to compare" in " ".join(shown(result).split())
    model = Holder(
        lambda self, x: self.fc(x).detach() + self.fc.weight.data.add_(1).sum(), fc=nn.Linear(5, 3)
    )
    state = State(model, x)
    assert verify(model, x, verbose=False)
    state.check()
    result = verify(Holder(lambda self, x: self.fc(x).argmax(-1), fc=nn.Linear(5, 3)), x, verbose=False)
    assert not result
    assert "There is no output of floating-point numbers to compare." in result.failures
    shown(result)
    result = verify(nn.MLP(5, [4], 3, device="meta"), torch.empty(6, 5, device="meta"), verbose=False)
    assert result.failures == ("On the meta device there are no numbers to compare.",)
    assert not result


def test_compiled_and_distributed(tmp_path: pathlib.Path) -> None:
    model, x = nn.MLP(5, [4], 3), torch.randn(6, 5)
    compiled = torch.compile(model, backend="aot_eager")
    result = verify(compiled, x, verbose=False)
    assert result, shown(result)
    assert "torch.compile" in shown(result)
    assert {row.name for row in result.rows} == {row.name for row in verify(model, x, verbose=False).rows}
    assert verdicts(result)["double backward"] == "skipped"
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        assert verify(tnn.parallel.DistributedDataParallel(model), x, verbose=False)
    finally:
        torch.distributed.destroy_process_group()


def test_errors_of_the_plain_model_are_raised() -> None:
    model, x = nn.MLP(5, [4], 3), torch.randn(6, 5)
    with pytest.raises(TypeError, match=r"verify takes a torch\.nn\.Module, not function"):
        verify(shown, x)  # type: ignore[arg-type]
    narrow = torch.randn(6, 4)
    state = State(model, x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        verify(model, narrow)
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar tensor, got \(6, 3\)"):
        verify(model, x, lambda y: y)
    with pytest.raises(ValueError, match="loss_fn must return a scalar tensor, got float"):
        verify(model, x, lambda y: y.sum().item())
    with pytest.raises(ZeroDivisionError):
        verify(model, x, lambda y: 1 / 0)
    state.check()


class Restless(tnn.Module):
    """Its forward changes everything that it can."""

    def __init__(self, device: torch.device, fails: bool) -> None:
        super().__init__()
        self.fails, self.calls, self.log = fails, 0, ["made"]
        self.chain = nn.Sequential(
            nn.Linear(5, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 4), nn.BatchNorm1d(4)
        )
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.chain(x) * random.random() * np.random.rand()
        self.calls += 1
        self.log.append("called")
        self.count += 1
        x.data.mul_(2)
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)
            parameter.data.add_(0.1)
        self.chain[0].register_forward_hook(lambda *args: None)
        self.eval()
        if self.fails and len(self.log) > 1:
            raise LookupError("as planned")
        return y


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("path", ["auto", pytest.param("triton", marks=pytest.mark.kernels)])
def test_everything_is_left_as_it_was(path: Any, fails: bool, device: torch.device) -> None:
    model, x = Restless(device, fails), torch.randn(9, 5, device=device, requires_grad=True)
    model.chain[0].eval()
    x.grad = torch.randn_like(x)
    for parameter in model.chain[0].parameters():
        parameter.grad = torch.randn_like(parameter)
    model.chain[3].bias.requires_grad_(False)
    state = State(model, x)
    with fusedmlp.backend(path):
        kept = backend_choice.quiet()
        with pytest.raises(LookupError) if fails else contextlib.nullcontext():
            verify(model, x, verbose=False)
        assert backend_choice.quiet() == kept
    state.check()
    assert (model.calls, model.log) == (0, ["made"])


def test_hooks_and_optimizers_in_backward_do_not_step() -> None:
    model, x = nn.MLP(5, [4], 3), torch.randn(6, 5)
    calls = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    model[0].register_forward_hook(lambda *args: calls.append("forward"))
    state = State(model, x)
    assert verify(model, x, verbose=False)
    state.check()
    assert set(calls) == {"forward"}
    model(x).sum().backward()
    assert len(calls) > calls.count("forward")


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_are_initialized() -> None:
    model = tnn.Sequential(tnn.LazyLinear(4), tnn.LazyBatchNorm1d(), nn.LinearReLU(4, 2))
    result = verify(model, torch.randn(3, 5), verbose=False)
    assert result
    assert "1 plain torch.nn.Linear, which fusedmlp.fuse(model) changes" in " ".join(shown(result).split())
    assert type(model[0]) is tnn.Linear
    assert model[1].num_batches_tracked == 0


def test_which_leaves_are_frozen() -> None:
    few = ["x", "a", "b", "c"]
    assert len(verify_module._settings(few, frozenset(few[1:]))) == 2**4
    for count in (6, 7, 30, 500):
        leaves = [str(i) for i in range(count)]
        settings = verify_module._settings(leaves, frozenset(leaves[1:]))
        assert settings[:3] == [frozenset(leaves[1:]), frozenset(), frozenset(leaves)]
        assert 15 < len(settings) == len(set(settings)) <= 32
        if count < 10:
            assert all(frozenset(leaves) - {leaf} in settings for leaf in leaves)
            assert all(frozenset([leaf]) in settings for leaf in leaves)


def test_long_tables() -> None:
    name = "a_name_of_a_module_that_is_longer_than_anybody_would_want_to_type_" + "x" * 60
    blocks = tnn.Sequential(*(nn.LinearReLU(5, 5) for _ in range(12)))
    model = Holder(lambda self, x: getattr(self, name)(blocks(x)), blocks=blocks, **{name: nn.Linear(5, 2)})
    result = verify(model, torch.randn(3, 5), verbose=False)
    assert len(result.rows) == 2 + 26
    assert result.checks[0].runs <= 32
    text = shown(result)
    assert "  blocks.*.weight, worst of 12 " in text
    assert "xxx.bias " in text
    data = json.loads(json.dumps(result.to_dict()))
    assert data["rows"][0]["name"] == "output"
    assert data["explanation"]["rows"][0]["dtype"] == "float32"
