"""functional.linear and linear_relu are compared with torch.nn.functional, in plain torch and on kernels."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from oracle import assert_right
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusedmlp
from fusedmlp.functional import linear, linear_relu

DTYPE = torch.float32


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.kernels)])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with fusedmlp.backend(request.param):
        yield request.param


def torchs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool) -> torch.Tensor:
    y = F.linear(x, weight, bias)
    return F.relu(y) if relu else y


def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool) -> torch.Tensor:
    return (linear_relu if relu else linear)(x, weight, bias)


def layer(
    device: torch.device, *x_shape: int, N: int = 10, dtype: torch.dtype = DTYPE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    K = x_shape[-1]
    shapes = (x_shape, (N, K), (N,))
    return tuple(torch.randn(s, device=device, dtype=dtype) for s in shapes)  # type: ignore[return-value]


def gradients(function, tensors, needs, grad_output, relu, dtype):  # type: ignore[no-untyped-def]
    """The output and gradients of a layer computed in dtype. Gradients that are not needed are None."""
    leaves = [
        None if t is None else t.detach().to(dtype).requires_grad_(need)
        for t, need in zip(tensors, needs, strict=True)
    ]
    y = function(*leaves, relu)
    if y.requires_grad:
        y.backward(grad_output.to(dtype))
    return [y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def compare(tensors, needs, grad_output, relu, dtype=DTYPE) -> None:  # type: ignore[no-untyped-def]
    exact = gradients(torchs, tensors, needs, grad_output, relu, torch.float64)
    theirs = gradients(torchs, tensors, needs, grad_output, relu, dtype)
    mine = gradients(ours, tensors, needs, grad_output, relu, dtype)
    for what, our, its, right in zip(("y", "x", "weight", "bias"), mine, theirs, exact, strict=True):
        assert (our is None) == (its is None), f"gradient of {what}"
        if our is not None:
            assert_right(our, its, right, what)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_every_combination_of_requires_grad(needs, relu: bool, path: str, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    compare(layer(device, 33, 20), needs, torch.randn(33, 10, device=device), relu)
    x, weight, _ = layer(device, 33, 20)
    compare((x, weight, None), needs, torch.randn(33, 10, device=device), relu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(7,), (1, 7), (127, 784), (2, 3, 7), (2, 1, 3, 7), (0, 7), (3, 0, 7), (4, 0)]
)
def test_every_rank_of_input(shape, dtype: torch.dtype, path: str, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    grad_output = torch.randn(*shape[:-1], 10, device=device)
    compare(layer(device, *shape, dtype=dtype), (True, True, True), grad_output, True, dtype)


@pytest.mark.parametrize("layout", ["transposed", "stepped", "expanded"])
def test_input_of_any_strides(layout: str, path: str, device: torch.device) -> None:
    x, weight, bias = layer(device, 12, 20)
    x = {
        "transposed": lambda: torch.randn(20, 12, device=device).t(),
        "stepped": lambda: torch.randn(24, 40, device=device)[::2, ::2],
        "expanded": lambda: torch.randn(12, 1, device=device).expand(12, 20),
    }[layout]()
    compare((x, weight, bias), (True, True, True), torch.randn(12, 10, device=device), True)
    compare(
        (x[None].transpose(0, 1), weight, bias),
        (True, True, True),
        torch.randn(12, 1, 10, device=device),
        True,
    )


@pytest.mark.parametrize("layout", ["stride 0", "transposed", "of sum()"])
def test_hostile_gradients(layout: str, path: str, device: torch.device) -> None:
    x, weight, bias = layer(device, 12, 20)
    grad = {
        "stride 0": torch.randn(12, 1, device=device).expand(12, 10),
        "transposed": torch.randn(10, 12, device=device).t(),
        "of sum()": torch.ones((), device=device).expand(12, 10),
    }[layout]
    before = grad.clone()
    for relu in (True, False):
        compare((x, weight, bias), (True, True, True), grad, relu)
    assert torch.equal(grad, before)


def test_backward_twice_is_the_same_and_writes_into_nothing_saved(path: str, device: torch.device) -> None:
    leaves = [t.requires_grad_() for t in layer(device, 12, 20)]
    y = linear_relu(*leaves)
    versions, value = [t._version for t in (*leaves, y)], y.detach().clone()
    grad = torch.randn_like(y)
    first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(y, leaves, grad)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert versions == [t._version for t in (*leaves, y)]
    assert torch.equal(y, value)


def test_output_used_twice(path: str, device: torch.device) -> None:
    """In a residual block, masking the incoming gradient in place would spoil the other branch."""
    x, weight, bias = layer(device, 12, 10)
    grads = {}
    for name, function in (("ours", ours), ("torch", torchs)):
        leaf = x.clone().requires_grad_()
        h = function(leaf, weight, bias, True)
        (h + function(h, weight, bias, True)).square().sum().backward()
        grads[name] = leaf.grad
    torch.testing.assert_close(grads["ours"], grads["torch"], rtol=1e-4, atol=1e-3)


def test_modifying_the_output_is_noticed(path: str, device: torch.device) -> None:
    leaves = [t.requires_grad_() for t in layer(device, 12, 20)]
    y = linear_relu(*leaves)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_matches_torch(path: str, device: torch.device) -> None:
    """A gradient penalty would be lost silently if the backward were not differentiable."""
    tensors = layer(device, 12, 20)
    results = {}
    for name, function in (("ours", ours), ("torch", torchs)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(*leaves, True)
        (grad_x,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        grad_x.square().sum().backward()
        results[name] = [leaf.grad for leaf in leaves]
    for a, b in zip(results["ours"], results["torch"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_batched_gradients(path: str, device: torch.device) -> None:
    """is_grads_batched runs the backward under vmap."""
    x, weight, bias = layer(device, 5, 20)
    vectors = torch.randn(3, 5, 10, device=device)
    results = []
    for function in (ours, torchs):
        leaf = x.clone().requires_grad_()
        y = function(leaf, weight, bias, True)
        results.append(torch.autograd.grad(y, leaf, vectors, is_grads_batched=True)[0])
    torch.testing.assert_close(*results)


def test_gradients_that_are_not_plain_memory(path: str, device: torch.device) -> None:
    """The gradient may be a lazy negative, a subclass, seen by a dispatch mode, or have a tangent."""
    x, weight, bias = layer(device, 5, 20)
    grad = torch.randn(5, 10, device=device)

    def gradient_of_x(function, grad_output):  # type: ignore[no-untyped-def]
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(function(leaf, weight, bias, True), leaf, grad_output)[0]

    negated = torch._neg_view(grad)
    torch.testing.assert_close(gradient_of_x(ours, negated), gradient_of_x(torchs, negated))
    two = TwoTensor(grad, -grad)
    torch.testing.assert_close(gradient_of_x(ours, two).b, gradient_of_x(torchs, two).b)

    leaf = x.clone().requires_grad_()
    y = ours(leaf, weight, bias, True)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y, leaf, grad, retain_graph=True)
    assert counter.get_total_flops() == 2 * 5 * 20 * 10

    tangents = []
    for function in (ours, torchs):
        leaf = x.clone().requires_grad_()
        y = function(leaf, weight, bias, True)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(grad, torch.ones_like(grad))
            (grad_x,) = torch.autograd.grad(y, leaf, dual)
            tangents.append(forward_ad.unpack_dual(grad_x).tangent)
    torch.testing.assert_close(*tangents)


def test_checkpointed(path: str, device: torch.device) -> None:
    """The forward runs again in the backward, so context_fn sets the backend again, as backend() advises."""

    def checkpointed(*arguments):  # type: ignore[no-untyped-def]
        contexts = (fusedmlp.backend(path), fusedmlp.backend(path))  # type: ignore[arg-type]
        return checkpoint(ours, *arguments, use_reentrant=False, context_fn=lambda: contexts)

    tensors = layer(device, 5, 20)
    grads = []
    for call in (ours, checkpointed):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = call(*leaves, True)
        with fusedmlp.backend("auto"):
            y.sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_autocast_is_not_blamed_for_mixed_dtypes(path: str) -> None:
    weight = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), fusedmlp.backend("auto"):
        assert linear(torch.randn(2, 4).bfloat16(), weight).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match=r"in_features=4 .* got input \(2, 5\)"):
            linear(torch.randn(2, 5).bfloat16(), weight)


@pytest.mark.parametrize("relu", [True, False])
def test_gradcheck_in_float64(relu: bool) -> None:
    leaves = [t.requires_grad_() for t in layer(torch.device("cpu"), 5, 4, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: ours(*t, relu), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: ours(*t, relu), leaves)


def test_cpu_path_is_torchs_bit_for_bit() -> None:
    tensors = layer(torch.device("cpu"), 64, 784, N=256)
    needs, grad = (True, True, True), torch.randn(64, 256)
    for a, b in zip(
        gradients(ours, tensors, needs, grad, True, DTYPE),
        gradients(torchs, tensors, needs, grad, True, DTYPE),
        strict=True,
    ):
        assert torch.equal(a, b)
    y = linear_relu(tensors[0], tensors[1].requires_grad_(), tensors[2])
    assert type(y.grad_fn).__name__ == "ReluBackward0", "no Python autograd.Function on the CPU"


def test_other_dtypes_take_torchs_path() -> None:
    for dtype in (torch.float64, torch.complex64):
        tensors = layer(torch.device("cpu"), 3, 4, dtype=dtype)
        assert torch.equal(linear(*tensors), F.linear(*tensors))
    integers = torch.ones(2, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64)
    assert torch.equal(linear_relu(*integers), F.linear(*integers))


def test_transforms_behave_as_with_torch() -> None:
    x, weight, bias = layer(torch.device("cpu"), 6, 4)
    for transform in (
        lambda f: torch.func.vmap(lambda row: f(row, weight, bias, True))(x),
        lambda f: torch.func.jvp(lambda t: f(t, weight, bias, True), (x,), (torch.ones_like(x),))[1],
        lambda f: torch.func.jacrev(lambda t: f(t, weight, bias, True))(x),
        lambda f: torch.func.hessian(lambda t: f(t, weight, bias, True).square().sum())(x),
    ):
        torch.testing.assert_close(transform(ours), transform(torchs))
