"""verify: true of what is right, false of each kind of wrong, and nothing is left behind."""

import contextlib
import json
import pathlib
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from compatibility import Route
from torch import nn as tnn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fusedmlp
from fusedmlp import nn
from fusedmlp.dispatch import autograd_function, backend_choice, predicate, reference
from fusedmlp.inspection import verify as verify_module
from fusedmlp.inspection import verify_runs
from fusedmlp.inspection.verify import verify
from fusedmlp.inspection.verify_report import Verification

ROOT = pathlib.Path(__file__).parents[2]
CHECKS = [
    "frozen parameters",
    "stride-0 gradient",
    "transposed gradient",
    "backward twice",
    "double backward",
]


class Holder(tnn.Module):
    """A model whose forward is what a test wants it to be."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.code = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.code(self, *args, **kwargs)


class Foreign(tnn.Module):
    """As others write them: the ReLU is in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = tnn.Linear(5, 4), tnn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.dropout(F.relu(self.fc1(x)), 0.4, self.training))


def shared() -> tnn.Module:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU())
    model[2].weight = model[0].weight
    return model


def frozen() -> tnn.Module:
    model = nn.MLP(5, [4], 3)
    model[0].requires_grad_(False)
    return model


def nested(self: Any, x: torch.Tensor) -> Any:
    y = self.mlp(x)
    return {"y": y, "more": (y.mean(-1), [y.argmax(-1)], None)}


def restless(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Draws random numbers, but not PyTorch's; and calls an operator that would draw those if it trained."""
    y: torch.Tensor = self.fc(x + random.random())
    return F.rrelu(y.detach(), training=False) + y * np.random.rand()


class Case(NamedTuple):
    make: Callable[[], tnn.Module]
    x: Callable[[], Any] = lambda: torch.randn(6, 5)
    loss: Callable[[Any], torch.Tensor] | None = None
    reason: str | None = None  # why its layers do not run on the kernels


RIGHT = {
    "Linear": Case(lambda: nn.Linear(5, 3)),
    "MLP": Case(lambda: nn.MLP(5, [4], 3), lambda: torch.randn(2, 3, 5, requires_grad=True)),
    "LinearReLU": Case(lambda: nn.LinearReLU(5, 3, bias=False)),
    "a fused model of others": Case(lambda: fusedmlp.fuse(Foreign().eval())),
    "BatchNorm and Dropout": Case(
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout().eval(), nn.Linear(4, 3)
        )
    ),
    "whole numbers": Case(
        lambda: tnn.Sequential(tnn.Embedding(7, 5), nn.MLP(5, [4], 3, bias=False)),
        lambda: torch.randint(7, (2, 3)),
    ),
    "nested output, keywords": Case(
        lambda: Holder(nested, mlp=nn.Linear(5, 3)), lambda: {"x": torch.randn(6, 5)}
    ),
    "a loss": Case(
        lambda: Holder(nested, mlp=nn.LinearReLU(5, 3)),
        lambda: (torch.randn(6, 5),),
        lambda output: F.cross_entropy(output["y"], torch.arange(6, device=output["y"].device) % 3),
    ),
    "shared weights": Case(shared),
    "frozen layer": Case(frozen),
    "float16": Case(lambda: nn.MLP(5, [4], 3).half(), lambda: torch.randn(6, 5).half()),
    "bfloat16": Case(lambda: nn.MLP(5, [4], 3).bfloat16(), lambda: torch.randn(6, 5).bfloat16()),
    "float64": Case(
        lambda: nn.LinearReLU(5, 3).double(),
        lambda: torch.randn(6, 5).double(),
        reason="There are kernels for float32",
    ),
    "random numbers": Case(lambda: Holder(restless, fc=nn.LinearReLU(5, 3))),
    "lazy layers": Case(
        lambda: tnn.Sequential(tnn.LazyLinear(4), tnn.LazyBatchNorm1d(), nn.LinearReLU(4, 3))
    ),
    "written-to input": Case(lambda: Holder(lambda self, x: self.fc(x.mul_(2)), fc=nn.LinearReLU(5, 3))),
    "sparse gradients": Case(
        lambda: tnn.Sequential(tnn.Embedding(7, 5, sparse=True), nn.LinearReLU(5, 3)),
        lambda: torch.randint(7, (2, 3)),
    ),
    "checkpoint": Case(
        lambda: Holder(lambda self, x: checkpoint(self.fc, x, use_reentrant=False), fc=nn.LinearReLU(5, 3))
    ),
    "reentrant checkpoint": Case(
        lambda: Holder(lambda self, x: checkpoint(self.fc, x, use_reentrant=True), fc=nn.LinearReLU(5, 3))
    ),
}


class State:
    """All that verify must not change, to compare."""

    def __init__(self, model: tnn.Module, x: Any = None) -> None:
        self.model, self.x = model, x
        self.before = self.now()

    def now(self) -> dict[str, Any]:
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        leaves = torch.utils._pytree.tree_leaves(self.x)
        tensors |= {f"x {i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        values: dict[str, Any] = {
            name: (
                id(t),
                t.requires_grad,
                id(t.grad),
                None if t.grad is None else t.grad.tolist(),
                t.tolist(),
            )
            for name, t in tensors.items()
            if t.is_leaf
        }
        values["modules"] = [
            (type(m), m.training, len(vars(m)), len(m._forward_hooks)) for m in self.model.modules()
        ]
        values["numbers"] = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
        if torch.cuda.is_available():
            values["on the GPU"] = torch.cuda.get_rng_state().tolist()
        values["settings"] = (
            backend_choice.quiet(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
        return values

    def check(self) -> None:
        now = self.now()
        for what, value in self.before.items():
            assert now[what] == value, what
        assert now.keys() == self.before.keys()


def shown(result: Verification) -> str:
    """The printed form, which fits a terminal."""
    text = str(result)
    assert max(map(len, text.splitlines())) <= 80, text
    assert "\t" not in text
    return text


def verdicts(result: Verification) -> dict[str, str]:
    return {one.name: one.verdict for one in (*result.rows, *result.checks)}


@pytest.mark.capability("Verify", "`fusedmlp.verify(model, x)` of models that are right")
@pytest.mark.filterwarnings("ignore:None of the inputs", "ignore:Using backward")
@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str, route: Route, device: torch.device) -> None:
    case = RIGHT[name]
    model, x = case.make().to(device), torch.utils._pytree.tree_map(lambda t: t.to(device), case.x())
    if isinstance(x, torch.Tensor) and x.requires_grad:
        x = x.detach().requires_grad_()
    if "lazy" in name:
        model(x)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn_like(parameter) if number else None
    state = State(model, x)
    result = verify(model, x, case.loss, verbose=False)
    state.check()
    assert result, shown(result)
    assert result.explanation is not None
    route.reasons[:] = [row.reason for row in result.explanation.rows]
    assert all(row.verdict == "right" for row in result.rows)
    assert [check.name for check in result.checks] == [*CHECKS, "nothing written to"]
    assert {check.verdict for check in result.checks} == {"right"}
    for row in result.rows:
        # A tenth of a part in a thousand: float64 has seen the same random numbers.
        assert row.torchs_error < 1e-4 or "16" in name or "BatchNorm" in name or "lazy" in name, row
    wanted = {f"gradient of {key}" for key, p in model.named_parameters() if p.requires_grad}
    wanted |= {"gradient of x" + {"nested output, keywords": "['x']", "a loss": "[0]"}.get(name, "")}
    wanted -= (
        {"gradient of x"} if name in ("whole numbers", "sparse gradients", "written-to input") else set()
    )
    assert {row.name for row in result.rows if row.name.startswith("gradient")} == wanted
    if not route.kernels:
        assert all(row.ratio == 1 for row in result.rows), shown(result)
        assert all(check.ratio == 1 for check in result.checks[:-1]), shown(result)
        assert "on PyTorch's operators. " in " ".join(shown(result).split())
    else:
        assert all(case.reason in str(r) if case.reason else r is None for r in route.reasons)
        assert "on the Triton kernels" in shown(result) or case.reason
    assert ("loss" in verdicts(result)) == (case.loss is not None)
    if name.startswith(("nested", "a loss")):
        assert {"output['y']", "output['more'][0]"} <= verdicts(result).keys()


# --- what is wrong is found, and where ---

Backward = Callable[..., tuple[Any, list[Any], list[Any]]]


def scaled(backward: Backward) -> Backward:
    def wrong(*args: Any) -> Any:
        grad_x, weights, biases = backward(*args)
        return grad_x, [w if w is None else w * 1.01 for w in weights], biases

    return wrong


def without_bias(backward: Backward) -> Backward:
    """As xformers had it: what is needed is asked of x alone."""

    def wrong(*args: Any) -> Any:
        grad_x, weights, biases = backward(*args)
        return grad_x, weights, biases if args[5] else [None, *biases[1:]]

    return wrong


def greater_or_equal(backward: Backward) -> Backward:
    """The mask of xformers and flash-attention, which lets everything through."""

    def wrong(grad: torch.Tensor, activations: Any, *args: Any) -> Any:
        return reference.mlp_backward(grad, [a if a is None else a.abs() + 1 for a in activations], *args)

    def masked(grad: torch.Tensor, activations: Any, weights: Any, *args: Any) -> Any:
        grad_x, *_ = wrong(grad, activations, weights, *args)
        _, grads, biases = backward(grad, activations, weights, *args)
        return grad_x, grads, biases

    return masked


def in_place(backward: Backward) -> Backward:
    def wrong(grad: torch.Tensor, *args: Any) -> Any:
        results = backward(grad, *args)
        grad.data.zero_()
        return results

    return wrong


def into_the_saved(backward: Backward) -> Backward:
    """Liger's SwiGLU: gradients are written over what was saved, past autograd's eyes."""

    def wrong(grad: torch.Tensor, activations: Any, *args: Any) -> Any:
        results = backward(grad, activations, *args)
        for activation in activations[1:]:
            if activation is not None:
                activation.data.mul_(2)
        return results

    return wrong


def adding_up(backward: Backward) -> Backward:
    """Into buffers that are kept: the second gradient is the sum of both."""
    kept: dict[tuple[int, ...], Any] = {}
    alive = []  # or another forward pass would get the same addresses

    def wrong(grad: torch.Tensor, activations: Any, *args: Any) -> Any:
        results = backward(grad, activations, *args)
        alive.append(activations)
        buffers = kept.setdefault(tuple(0 if x is None else x.data_ptr() for x in activations), results)
        if buffers is not results:
            for buffer, value in zip(buffers[1] + buffers[2], results[1] + results[2], strict=True):
                if buffer is not None:
                    buffer.add_(value)
        return buffers

    return wrong


def as_if_contiguous(backward: Backward) -> Backward:
    def wrong(grad: torch.Tensor, *args: Any) -> Any:
        memory = grad.untyped_storage()
        if memory.nbytes() == grad.numel() * grad.element_size():
            grad = torch.empty(0, dtype=grad.dtype, device=grad.device).set_(memory, 0, grad.shape)  # type: ignore[call-overload]
        return backward(grad, *args)

    return wrong


def one_number(backward: Backward) -> Backward:
    """A gradient of stride 0 is not expanded, as apex's FusedDense has it."""

    def wrong(grad: torch.Tensor, *args: Any) -> Any:
        return backward(grad.new_zeros(grad.shape) if 0 in grad.stride() else grad, *args)

    return wrong


def raises(backward: Backward) -> Backward:
    def wrong(*args: Any) -> Any:
        if explaining():
            return backward(*args)
        raise LookupError("as planned")

    return wrong


def explaining() -> bool:
    from fusedmlp.kernels import launch

    return launch._dry_run.note is not None


def raises_without_x(backward: Backward) -> Backward:
    def wrong(*args: Any) -> Any:
        if not args[5] and not explaining():
            raise LookupError("as planned")
        return backward(*args)

    return wrong


# What is done to the kernels' backward -> where it must be found
WRONG_BACKWARD: dict[Callable[[Backward], Backward], set[str]] = {
    scaled: {"gradient of 0.weight", "gradient of 2.weight", *CHECKS[:4]},
    without_bias: {"frozen parameters"},
    greater_or_equal: {"gradient of x", *CHECKS[:4]},
    in_place: {"nothing written to", "backward twice"},
    into_the_saved: {"backward twice"},
    adding_up: {"backward twice", "nothing written to"},
    as_if_contiguous: {"transposed gradient"},
    one_number: {"stride-0 gradient"},
    raises_without_x: {"frozen parameters"},
}


@pytest.fixture
def model(device: torch.device) -> tnn.Module:
    return nn.MLP(5, [4], 3, device=device)


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(6, 5, device=device)


def verified(model: tnn.Module, x: Any) -> Verification:
    """On the kernels; all is put back, whatever went wrong."""
    state = State(model, x)
    with fusedmlp.backend("triton"):
        result = verify(model, x, verbose=False)
    state.check()
    shown(result)
    json.dumps(result.to_dict())
    return result


def wrong_in(result: Verification) -> set[str]:
    return {name for name, verdict in verdicts(result).items() if verdict == "WRONG"}


@pytest.mark.kernels
@pytest.mark.parametrize("mutation", WRONG_BACKWARD, ids=lambda mutation: mutation.__name__)
def test_wrong_backward_is_found(
    mutation: Callable[[Backward], Backward],
    model: tnn.Module,
    x: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(predicate.kernels(), "mlp_backward", mutation(predicate.kernels().mlp_backward))
    result = verified(model, x)
    assert not result
    assert wrong_in(result) == WRONG_BACKWARD[mutation], result
    assert str(result).startswith("WRONG: 2 layers in 1 chain on the Triton kernels")
    assert ("it is missing" in str(result)) == (mutation is without_bias)
    assert ("only the fused model raises LookupError: as planned" in str(result)) == (
        mutation is raises_without_x
    )


@pytest.mark.kernels
def test_an_error_of_the_fused_model_is_a_result(
    model: tnn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicate.kernels(), "mlp_backward", raises(predicate.kernels().mlp_backward))
    result = verified(model, x)
    assert not result
    (check,) = result.checks
    assert check.problems == ("only the fused model raises LookupError: as planned",)
    assert result.rows == ()
    assert shown(result).startswith("WRONG: 2 layers in 1 chain on the Triton kernels")
    result = verified(model.double(), x.double())
    assert "backend('triton') cannot run here. There are kernels for float32" in str(result.checks)
    assert shown(result).startswith("WRONG: it is not known on what the fused layers run.")

    def interrupted(*args: Any) -> Any:
        if not all(args[6]) and not explaining():  # in the middle of it, as part of the model is frozen
            raise KeyboardInterrupt
        return reference.mlp_backward(*args)

    monkeypatch.setattr(predicate.kernels(), "mlp_backward", interrupted)
    state = State(model.float(), x)
    with pytest.raises(KeyboardInterrupt), fusedmlp.backend("triton"):
        verify(model, x)
    state.check()


@pytest.mark.kernels
@pytest.mark.parametrize("how", ["detached", "hidden layers are constants"])
def test_wrong_double_backward_is_found(
    how: str, model: tnn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "detached":
        monkeypatch.setattr(predicate, "is_for_kernels", lambda grad: True)
    else:
        monkeypatch.setattr(autograd_function, "_recompute", lambda *args: None)
    assert wrong_in(verified(model, x)) == {"double backward"}


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("x", "x"),
        ("weight", "weight"),
        ("output", None),
        ("dtype", None),
        ("NaN", None),
        ("slightly", None),
    ],
)
def test_wrong_forward_is_found(
    what: str, found: str | None, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(5, 3).to(x.device)
    forward = predicate.kernels().mlp_forward

    def wrong(x: torch.Tensor, weights: Any, *args: Any, **kwargs: Any) -> Any:
        ys = forward(x, weights, *args, **kwargs)
        if what == "x":
            x.data.mul_(2)
        elif what == "weight":
            weights[0].data[0, 0] += 1
        elif what == "output":
            ys[-1] = ys[-1].clamp_min(0)  # a ReLU too many
        elif what == "dtype":
            ys[-1] = ys[-1].double()
        elif what == "NaN":
            ys[-1][0, 0] = float("nan")
        else:
            ys[-1] = ys[-1] * (1 + 2e-6)
        return ys

    monkeypatch.setattr(predicate.kernels(), "mlp_forward", wrong)
    result = verified(model, x)
    assert not result
    if what == "dtype":
        assert "only the fused model raises" in str(result)
    elif found is None:
        assert verdicts(result)["output"] == "WRONG"
    else:
        assert f"it writes to {found}" in str(result)


def test_wrong_chains_are_found_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain is torch.nn itself, not our own operators."""
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU()), torch.randn(6, 5)
    assert verify(model, x, verbose=False)
    run = nn._run
    with monkeypatch.context() as patch:
        patch.setattr(nn, "_run", lambda input, weights, biases, relu: run(input, weights, biases, False))
        assert verdicts(verify(model, x, verbose=False))["output"] == "WRONG"
    with monkeypatch.context() as patch:
        patch.setattr(reference, "mlp_forward", lambda x, weights, *args: [x[:, :3] * float("nan")])
        assert verdicts(verify(model, x, verbose=False))["output"] == "WRONG"
    with monkeypatch.context() as patch:
        patch.setattr(reference, "relu_forward", lambda y, in_place: y.detach().relu())
        result = verify(model, x, verbose=False)
        assert {row.problem for row in result.rows[1:]} == {"it is missing"}
        assert not result
    layer = fusedmlp.fuse(Foreign())
    with monkeypatch.context() as patch:
        patch.setattr(
            fusedmlp.convert.pending_relu.LinearBeforeReLU,
            "forward",
            lambda self, x: F.linear(x, self.weight),
        )
        assert not verify(layer, x, verbose=False)


def test_a_gradient_that_jumps_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ReLU's input may be 0 but for rounding: on which side it falls depends on the order of the sum."""

    def backwards(x: torch.Tensor, weights: Any, biases: Any, final_relu: bool, keep: int) -> Any:
        y = F.linear(x.flip(-1), weights[0].flip(-1), biases[0]).relu()
        return [F.linear(y, weights[1], biases[1])]

    monkeypatch.setattr(reference, "mlp_forward", backwards)
    looks: list[str] = []
    look = verify_runs.Runs.errors_nearby
    monkeypatch.setattr(
        verify_runs.Runs, "errors_nearby", lambda self, ask: (looks.append(ask), look(self, ask))[1]
    )
    differ = wanted = 0
    for seed in range(40):
        torch.manual_seed(seed)
        model, x = nn.MLP(40, [1], 3), torch.randn(1, 40)
        weight, bias = model[0].weight, model[0].bias
        with torch.no_grad():
            bias.copy_(-F.linear(x.double(), weight.double())[0])
            sides = [bool(F.linear(a, b, bias) > 0) for a, b in ((x, weight), (x.flip(-1), weight.flip(-1)))]
        if sides[0] != sides[1]:
            looks.clear()
            result = verify(model, x, verbose=False)
            differ, wanted = differ + 1, wanted + bool(looks)
            assert result, f"{seed}: {result}"
    assert differ >= wanted > 1  # PyTorch is on the wrong side at times, and then ours is right at once


# --- float64 ---


class Uncopied(nn.MLP):
    def __deepcopy__(self, memo: Any) -> Any:
        raise NotImplementedError("as planned")


def test_without_float64_what_differs_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Uncopied(5, [4], 3), torch.randn(6, 5)
    why = "Not compared with float64, which raises NotImplementedError: as planned"
    result = verify(model, x, verbose=False)
    assert result
    assert (result.notes, result.failures) == ((why,), ())
    forward = reference.mlp_forward
    monkeypatch.setattr(reference, "mlp_forward", lambda *args: [y * (1 + 1e-6) for y in forward(*args)])
    # Inside the chain of a subclass the plain model is on our own operators too: make them differ.
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
    """Casts, constants and factories of less in a forward: the copy computes in float64 all the same."""
    constant = torch.randn(3)

    def code(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x).half().float() * constant + torch.full((3,), 0.1) + torch.arange(3) / 7
        return F.softmax(y, -1, dtype=torch.float32) @ torch.outer(constant, constant)

    result = verify(Holder(code, fc=nn.Linear(5, 3)), torch.randn(6, 5), verbose=False)
    assert result
    assert not result.notes
    assert 1e-6 < result.rows[0].torchs_error < 1e-2  # that of float16, which float64 has not made


DRAWING: dict[str, Callable[[], tnn.Module]] = {
    "dropout": lambda: fusedmlp.fuse(Foreign()),
    "rand": lambda: Holder(lambda self, x: self.fc(x) + torch.rand(3, device=x.device), fc=nn.Linear(5, 3)),
    "uniform_": lambda: Holder(lambda self, x: self.fc(torch.empty_like(x).uniform_()), fc=nn.Linear(5, 3)),
    "rrelu": lambda: Holder(lambda self, x: F.rrelu(self.fc(x), training=True), fc=nn.Linear(5, 3)),
}


@pytest.mark.parametrize("path", ["auto", pytest.param("triton", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("name", DRAWING)
def test_what_draws_random_numbers_is_not_compared_with_float64(
    name: str, path: Any, x: torch.Tensor
) -> None:
    model = DRAWING[name]().to(x.device)
    why = "Not compared with float64, because the model draws random numbers: call model.eval() first."
    state = State(model, x)
    with fusedmlp.backend(path):
        result = verify(model, x, verbose=False)
    state.check()
    shown(result)
    # Right is what has the same bits as PyTorch; of anything else nothing is known.
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


def test_what_is_not_deterministic_is_said_to_be() -> None:
    numbers = np.random.default_rng()
    model = Holder(lambda self, x: self.fc(x) * numbers.random(), fc=nn.Linear(5, 3))
    result = verify(model, torch.randn(6, 5), verbose=False)
    assert "Two runs of the plain model differ: something in it is not deterministic." in result.notes


# --- what it takes, and what it raises ---


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
    assert result.rows[0].torchs_error > 1e-4  # of bfloat16: autocast was on
    with torch.inference_mode():
        result = verify(nn.MLP(5, [4], 3), torch.randn(6, 5), verbose=False)
    assert result
    assert [row.name for row in result.rows] == ["output"]
    with torch.device("meta"):  # what is made here without a word about where is made there
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


def test_what_the_plain_model_raises_comes_through() -> None:
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
def test_lazy_modules_become_what_they_shall_be() -> None:
    model = tnn.Sequential(tnn.LazyLinear(4), tnn.LazyBatchNorm1d(), nn.LinearReLU(4, 2))
    result = verify(model, torch.randn(3, 5), verbose=False)
    assert result
    assert "1 plain torch.nn.Linear, which fusedmlp.fuse(model) changes" in " ".join(shown(result).split())
    assert type(model[0]) is tnn.Linear
    assert model[1].num_batches_tracked == 0


def test_how_much_is_frozen() -> None:
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


# --- python -m fusedmlp ---


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, str]:
    """The exit status of ``python -m fusedmlp``, in this process, and what it printed."""
    from fusedmlp import __main__

    monkeypatch.setattr(sys, "argv", ["fusedmlp", *arguments])
    status: Any
    try:
        status = __main__.main()
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_the_command_says_what_is_here_and_verifies() -> None:
    arguments = ["--mlp", "20,10,3", "--batch", "5", "--dtype", "fp16"]
    run = subprocess.run(
        [sys.executable, "-m", "fusedmlp", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"fusedmlp {fusedmlp.__version__}, torch {torch.__version__}")
    assert "5 rows, 20 -> 10 -> 3, ReLU between, float16 on" in run.stdout
    assert "\n  why " in run.stdout
    where = "PyTorch's operators, as the kernels cannot run here"
    where = "the Triton kernels" if predicate.has_triton() else where
    assert f"Are its results accurate on {where}?\n\nright: 2 layers in 1 chain on" in run.stdout
    assert "double backward" in run.stdout
    assert max(map(len, run.stdout.splitlines()[2:])) <= 80


def test_forms_of_the_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    forms = (["--mlp", "5", "3", "--dtype", "float32"], ["--mlp", "5,", "3"], ["--mlp", "5 ,3"])
    for arguments in forms:
        status, printed = command(monkeypatch, capsys, *arguments, "--batch", "2")
        assert status == 0
        assert "2 rows, 5 -> 3, no ReLU, float32 on" in printed
    for arguments, message in (
        (["--mlp", "7"], "--mlp takes two widths or more"),
        (["--mlp", "7,0"], "every width and the batch are at least 1"),
        (["--mlp", "7,a"], "--mlp takes whole numbers, got 7,a"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "toaster"], "--device toaster cannot be used"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["--help"], "python -m fusedmlp --mlp 784,256,128,10 --batch 512 --dtype bf16"),
    ):
        status, printed = command(monkeypatch, capsys, *arguments)
        assert status == (0 if arguments == ["--help"] else 2)
        assert message in " ".join(printed.split())


def test_the_command_fails_where_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, x: x[:, :3] * float("nan"))
    status, printed = command(monkeypatch, capsys, "--mlp", "5,4,3", "--batch", "2")
    assert status == 1
    assert "NaN in other places than PyTorch's" in printed
