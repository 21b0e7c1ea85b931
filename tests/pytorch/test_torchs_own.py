"""PyTorch's own descriptions of its operators, OpInfo, applied to our functions.

They tell for which dtypes an operator works, give sample inputs and tell which derivatives must be correct.
The run prints at its end how many samples passed.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from compatibility import Route, unrecorded
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torchs_own import (
    KERNEL_DTYPES,
    NEEDS_EXPECTTEST,
    SECTION,
    Sample,
    assert_same,
    in_float64,
    op_info,
    results,
)

from fusedmlp import functional

pytestmark = NEEDS_EXPECTTEST

# Our function, and torch's that it replaces.
FUNCTIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "linear": (functional.linear, F.linear),
    "linear_relu": (functional.linear_relu, lambda *tensors: F.relu(F.linear(*tensors))),
    "mlp": (lambda x, weight, bias=None: functional.mlp(x, [weight], [bias]), F.linear),
}


@functools.cache  # the tests share the samples, which take longer to make than to run
def samples_of(name: str, device: torch.device, dtype: torch.dtype, requires_grad: bool) -> list[Sample]:
    """All samples (without gradients: all reference inputs), each also with other strides, and conjugates."""
    op = op_info(name)
    samples = list((op.sample_inputs if requires_grad else op.reference_inputs)(device, dtype, requires_grad))
    if dtype.is_complex:
        samples += op.conjugate_sample_inputs(device, dtype, requires_grad)
    samples = [each for sample in samples for each in (sample, sample.noncontiguous())]
    assert not any(sample.kwargs for sample in samples)
    return [(sample.input, *sample.args) for sample in samples]


def all_samples_of(name: str, device: torch.device) -> Iterator[Sample]:
    op = op_info(name)
    backward = op.supported_backward_dtypes(device.type)
    for dtype in sorted(op.supported_dtypes(device.type), key=str):
        for requires_grad in (False, True) if dtype in backward else (False,):
            yield from samples_of(name, device, dtype, requires_grad)


def described(tensors: Sample) -> str:
    return f"{tensors[0].dtype} {[(tuple(t.shape), t.stride()) for t in tensors]}"


def in_reach(tensors: Sample) -> bool:
    """Whether there are kernels for it. A weight of one dimension, which torch accepts, has none."""
    return tensors[0].dtype in KERNEL_DTYPES and tensors[1].dim() == 2


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "reach",
    [
        pytest.param(
            True,
            marks=pytest.mark.capability(SECTION, "OpInfo `nn.functional.linear` in the kernels' dtypes"),
        ),
        False,
    ],
)
def test_samples_of_linear(
    reach: bool, name: str, route: Route, sampled: Callable[..., None], device: torch.device
) -> None:
    """Samples for which there are kernels, and others."""
    ours, torchs = FUNCTIONS[name]
    for tensors in all_samples_of("nn.functional.linear", device):
        if in_reach(tensors) != reach:
            continue
        what = f"{name} {described(tensors)}"
        versions = [t._version for t in tensors]
        mine, theirs = results(ours, tensors), results(torchs, tensors)
        fused = route.reasons[-1] is None
        assert fused == (reach and route.kernels), f"{what}: {route.reasons[-1]}"
        exact = results(torchs, in_float64(tensors)) if fused else None
        assert_same(mine, theirs, exact, what)
        if not route.kernels:
            with unrecorded():
                assert_same(results(ours, tensors), theirs, None, what)
        assert versions == [t._version for t in tensors], what
        sampled(f"OpInfo nn.functional.linear as {name}", fused)


@pytest.mark.filterwarnings("ignore:.* support is experimental")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtypes_that_torch_refuses(
    name: str, route: Route, sampled: Callable[..., None], device: torch.device
) -> None:
    """Also the inputs that the OpInfo lists as errors, of which there are none so far."""
    ours, torchs = FUNCTIONS[name]
    op = op_info("nn.functional.linear")
    errors = [error.sample_input for error in (op.error_inputs(device) if op.error_inputs_func else ())]
    refused = [(sample.input, *sample.args) for sample in errors]
    for dtype in {d for d in vars(torch).values() if isinstance(d, torch.dtype)}:
        with contextlib.suppress(Exception):  # many dtypes have no such tensors
            refused.append(tuple(torch.ones(s, device=device).to(dtype) for s in ((3, 4), (2, 4), (2,))))
    for tensors in refused:
        theirs = results(torchs, tensors)
        if isinstance(theirs[0], type):
            assert_same(results(ours, tensors), theirs, None, f"{name} {described(tensors)}")
            sampled("OpInfo nn.functional.linear, errors")


@pytest.mark.capability(SECTION, "OpInfo `nn.functional.linear`: gradcheck and gradgradcheck")
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # PyTorch's own forward mode uses it
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_linear(
    name: str, route: Route, sampled: Callable[..., None], device: torch.device
) -> None:
    """The checks of PyTorch's test of gradients, as far as the OpInfo lists them as supported."""
    ours, _ = FUNCTIONS[name]
    op = op_info("nn.functional.linear")
    checks = {"check_grad_dtypes": True, "nondet_tol": op.gradcheck_nondet_tol, "fast_mode": True}
    complex_ = [torch.complex128] if name == "linear" and not route.kernels else []
    for dtype in (torch.float64, *complex_):
        for i, tensors in enumerate(samples_of(op.name, device, dtype, True)[::2]):
            assert torch.autograd.gradcheck(
                ours,
                tensors,
                check_forward_ad=op.supports_forward_ad,
                check_batched_grad=op.check_batched_grad,
                check_batched_forward_grad=op.check_batched_forward_grad,
                **checks,
            )
            assert torch.autograd.gradgradcheck(
                ours,
                tensors,
                check_fwd_over_rev=op.supports_fwgrad_bwgrad,
                check_batched_grad=op.check_batched_gradgrad,
                gen_non_contig_grad_outputs=i % 2 == 1,
                **checks,
            )
            sampled("OpInfo nn.functional.linear, gradcheck and gradgradcheck")


@pytest.mark.capability(SECTION, "OpInfo `nn.functional.linear`: gradcheck in float32")
@pytest.mark.filterwarnings("ignore:Input #.* requires gradient and is not a double precision")
def test_derivatives_of_the_kernels(route: Route, sampled: Callable[..., None], device: torch.device) -> None:
    """Of what is linear in each argument differences are exact in float32 as well, but for rounding.

    For which gradcheck leaves no room where it compares batched gradients: they are compared here.
    """
    for tensors in samples_of("nn.functional.linear", device, torch.float32, True)[::4]:
        if in_reach(tensors):
            checks = {"eps": 0.25, "atol": 1e-4, "rtol": 1e-4, "fast_mode": True}
            assert torch.autograd.gradcheck(functional.linear, tensors, **checks)
            y, wanted = functional.linear(*tensors), [t for t in tensors if t.requires_grad]
            rows = torch.randn(3, *y.shape, device=device)
            batched = torch.autograd.grad(y, wanted, rows, is_grads_batched=True, retain_graph=True)
            singly = [torch.autograd.grad(y, wanted, row, retain_graph=True) for row in rows]
            for ours, each in zip(batched, zip(*singly, strict=True), strict=True):
                torch.testing.assert_close(ours, torch.stack(each), rtol=1e-4, atol=1e-4)
            assert (route.reasons[-1] is None) == route.kernels
            sampled("OpInfo nn.functional.linear, gradcheck in float32", route.kernels)


def transformed(function: Callable[..., torch.Tensor], tensors: Sample) -> Iterator[torch.Tensor]:
    """One sample under jvp, vjp and every vmap of torch.func."""
    tangents = tuple(torch.full_like(t, 0.5) for t in tensors)
    yield from torch.func.jvp(function, tensors, tangents)
    y, pull = torch.func.vjp(function, *tensors)
    yield from pull(torch.ones_like(y))
    twice = [torch.stack([t, t + 1]) for t in tensors]
    for batched in itertools.product([True, False], repeat=len(tensors)):
        if any(batched):
            in_dims = tuple(0 if b else None for b in batched)
            given = [two if b else t for b, two, t in zip(batched, twice, tensors, strict=True)]
            yield torch.func.vmap(function, in_dims)(*given)


@pytest.mark.capability(SECTION, "OpInfo `nn.functional.linear`: jvp, vjp and vmap")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_of_linear(
    name: str, route: Route, sampled: Callable[..., None], device: torch.device
) -> None:
    ours, torchs = FUNCTIONS[name]
    for dtype in KERNEL_DTYPES[:2]:
        for tensors in filter(in_reach, samples_of("nn.functional.linear", device, dtype, False)):
            both = transformed(ours, tensors), transformed(torchs, tensors)
            for mine, theirs in zip(*both, strict=True):
                assert_same([mine], [theirs], None, f"{name} {described(tensors)}")
            sampled("OpInfo nn.functional.linear, transforms")
    assert None not in route.reasons


@pytest.mark.capability(SECTION, "OpInfo `nn.functional.linear`: fake tensors")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_fake_tensors_of_linear(
    name: str, route: Route, sampled: Callable[..., None], device: torch.device
) -> None:
    ours, torchs = FUNCTIONS[name]
    mode = FakeTensorMode()
    for dtype in KERNEL_DTYPES:
        for tensors in samples_of("nn.functional.linear", device, dtype, True):
            fakes = tuple(mode.from_tensor(t) for t in tensors)
            with mode:
                mine = results(ours, fakes)
            for fake, real in zip(mine, results(torchs, tensors), strict=True):
                assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
            sampled("OpInfo nn.functional.linear, fake tensors")


@pytest.mark.capability(SECTION, "OpInfo `nn.functional.relu`, of a Linear with weight 1")
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # infinity times a padding of 0
def test_samples_of_relu(route: Route, sampled: Callable[..., None], device: torch.device) -> None:
    """A weight of one 1 passes every value to the ReLU as it is, also infinities and NaN."""
    op = op_info("nn.functional.relu")
    interpreted = route.kernels and device.type == "cpu"
    few = 1100 if interpreted else 10**9  # the most rows that are not too slow
    for dtype in KERNEL_DTYPES[: 2 if interpreted else 3]:
        one = torch.ones(1, 1, device=device, dtype=dtype)
        for (sample,) in samples_of(op.name, device, dtype, False)[::2]:  # some have other strides anyway
            if sample.numel() <= few:
                x = sample.detach().requires_grad_()  # torch's samples have gradients for few of them only
                mine = results(lambda x, w=one: functional.linear_relu(x[..., None], w)[..., 0], [x])
                assert (route.reasons[-1] is None) == route.kernels
                for our, its in zip(mine, results(F.relu, [x]), strict=True):
                    torch.testing.assert_close(our, its, rtol=0, atol=0, equal_nan=True)
                sampled("OpInfo nn.functional.relu as linear_relu", route.kernels)
