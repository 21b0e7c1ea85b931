"""verify finds each kind of error and says where it is, but accepts a gradient that jumps at 0."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inspected import CHECKS, Foreign, State, shown, verdicts
from torch import nn as tnn
from torch.nn import functional as F

import fusedmlp
from fusedmlp import nn
from fusedmlp.dispatch import autograd_function, predicate, reference
from fusedmlp.inspection import verify_runs
from fusedmlp.inspection.verify import verify
from fusedmlp.inspection.verify_report import Verification

Backward = Callable[..., tuple[Any, list[Any], list[Any]]]


def scaled(backward: Backward) -> Backward:
    def wrong(*args: Any) -> Any:
        grad_x, weights, biases = backward(*args)
        return grad_x, [w if w is None else w * 1.01 for w in weights], biases

    return wrong


def without_bias(backward: Backward) -> Backward:
    """A bug of xformers: the bias gets its gradient only if x needs one."""

    def wrong(*args: Any) -> Any:
        grad_x, weights, biases = backward(*args)
        return grad_x, weights, biases if args[5] else [None, *biases[1:]]

    return wrong


def greater_or_equal(backward: Backward) -> Backward:
    """A bug of xformers and flash-attention: the mask is >= 0, so every gradient passes."""

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
    """A bug of Liger's SwiGLU: gradients overwrite saved tensors, and autograd does not notice."""

    def wrong(grad: torch.Tensor, activations: Any, *args: Any) -> Any:
        results = backward(grad, activations, *args)
        for activation in activations[1:]:
            if activation is not None:
                activation.data.mul_(2)
        return results

    return wrong


def adding_up(backward: Backward) -> Backward:
    """Gradients are added into buffers that are kept, so the second one is the sum of both."""
    kept: dict[tuple[int, ...], Any] = {}
    alive = []  # otherwise another forward pass could get the same addresses

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
    """A bug of apex's FusedDense: a gradient of stride 0 is not expanded."""

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


# how the kernels' backward is broken -> the results and checks that must be WRONG
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


def verified(model: tnn.Module, x: Any) -> Verification:
    """Run verify on the kernels, and check that it changes nothing."""
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
        if not all(args[6]) and not explaining():  # in a later run, with part of the model frozen
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
    """verify compares with torch.nn itself, so errors of our own operators are found too."""
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
    """If a ReLU's input is 0 except for rounding, the order of the sum decides its sign."""

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
    assert differ >= wanted > 1  # if only PyTorch has the wrong sign, verify need not look nearby
