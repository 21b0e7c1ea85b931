"""PyTorch's own descriptions of its modules, ModuleInfo, applied to our modules.

They are checked as in PyTorch's test of modules: results, gradients and their derivatives, strides, copies,
dtypes, modes, repr.
The run prints at its end how many samples passed.
"""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from compatibility import Route
from torch import nn as tnn
from torchs_own import KERNEL_DTYPES, NEEDS_EXPECTTEST, SECTION, assert_same, in_float64, module_info, results

import fusedmlp
from fusedmlp import nn

pytestmark = NEEDS_EXPECTTEST


class Subject(NamedTuple):
    """How ours and torch's are made from the arguments of a Linear, and whether a ReLU comes last."""

    ours: Callable[..., tnn.Module]
    torchs: Callable[..., tnn.Module]
    relu: bool = False


def torchs_pair(*arguments: Any, **options: Any) -> tnn.Module:
    return tnn.Sequential(tnn.Linear(*arguments, **options), tnn.ReLU())


def torchs_mlp(inputs: int, outputs: int, **options: Any) -> tnn.Module:
    return tnn.Sequential(tnn.Linear(inputs, 6, **options), tnn.ReLU(), tnn.Linear(6, outputs, **options))


def lazy(inputs: int, outputs: int, **options: Any) -> tnn.Module:
    """A LazyLinear and a ReLU, after the first call."""
    model = nn.Sequential(tnn.LazyLinear(outputs, **options), tnn.ReLU())
    torch.manual_seed(0)
    model(torch.zeros(1, inputs, dtype=options.get("dtype"), device=options.get("device")))
    return model


MODULES = {
    "Linear": Subject(nn.Linear, tnn.Linear),
    "LinearReLU": Subject(nn.LinearReLU, torchs_pair, relu=True),
    "Sequential": Subject(
        lambda *arguments, **options: nn.Sequential(nn.Linear(*arguments, **options), nn.ReLU()),
        torchs_pair,
        relu=True,
    ),
    "Sequential of LazyLinear": Subject(lazy, torchs_pair, relu=True),
    "MLP": Subject(lambda inputs, outputs, **options: nn.MLP(inputs, [6], outputs, **options), torchs_mlp),
    "fuse(Sequential)": Subject(
        lambda *arguments, **options: fusedmlp.fuse(torchs_pair(*arguments, **options)),
        torchs_pair,
        relu=True,
    ),
}


class Case(NamedTuple):
    """A sample of a ModuleInfo, with our module and torch's, of equal parameters."""

    ours: tnn.Module
    torchs: tnn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reference: Callable[..., torch.Tensor] | None
    what: str


def cases_of(
    name: str, device: torch.device, dtypes: Sequence[torch.dtype] = (), modes: Sequence[bool] = (True, False)
) -> Iterator[Case]:
    """Every sample of the ModuleInfo of torch.nn.Linear, with and without gradients, in both modes."""
    info = module_info("nn.Linear")
    subject = MODULES[name]
    claimed = info.supported_dtypes(device.type)
    for dtype, requires_grad, training in itertools.product(dtypes or claimed, modes, modes):
        for sample in info.module_inputs_func(
            info, device=device, dtype=dtype, requires_grad=requires_grad, training=training
        ):
            modules = []
            for build in subject[:2]:
                torch.manual_seed(0)
                arguments = sample.constructor_input
                modules.append(build(*arguments.args, **arguments.kwargs, device=device, dtype=dtype))
                modules[-1].train(training).requires_grad_(requires_grad)
            forward = sample.forward_input
            what = f"{name} {dtype} {sample.desc} requires_grad={requires_grad} training={training}"
            yield Case(*modules, forward.args, forward.kwargs, sample.reference_fn, what)


def run(module: tnn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    inputs = [
        t for t in (*args, *kwargs.values(), *module.parameters()) if getattr(t, "requires_grad", False)
    ]
    return results(lambda *_: module(*args, **kwargs), inputs)


def run_exactly(case: Case) -> list[Any]:
    """The results of torch's module in float64."""
    return run(copy.deepcopy(case.torchs).double(), *in_float64((case.args, case.kwargs)))


def assert_case(case: Case, route: Route, args: Any = None, kwargs: Any = None) -> bool:
    """Assert the output and gradients of torch's module. Returns whether the kernels ran."""
    case = case if args is None else case._replace(args=args, kwargs=kwargs)
    mine, theirs = run(case.ours, case.args, case.kwargs), run(case.torchs, case.args, case.kwargs)
    fused = route.reasons[-1] is None
    assert fused == (route.kernels and theirs[0].dtype in KERNEL_DTYPES), f"{case.what}: {route.reasons[-1]}"
    assert_same(mine, theirs, run_exactly(case) if fused else None, case.what)
    return fused


@pytest.mark.capability(SECTION, "ModuleInfo `nn.Linear`: forward, gradients, strides")
@pytest.mark.parametrize("name", MODULES)
def test_samples_of_the_module(
    name: str, route: Route, sampled: Callable[..., None], device: torch.device
) -> None:
    from torch.testing._internal.common_utils import noncontiguous_like

    for case in cases_of(name, device):
        fused = assert_case(case, route)
        args = tuple(noncontiguous_like(t) for t in case.args)
        assert_case(case, route, args, {key: noncontiguous_like(t) for key, t in case.kwargs.items()})
        if case.reference is not None and name != "MLP":
            with torch.no_grad():
                y = case.reference(case.torchs, *case.args, **case.kwargs)
                mine = case.ours(*case.args, **case.kwargs)
            torch.testing.assert_close(mine, y.relu() if MODULES[name].relu else y)
        sampled(f"ModuleInfo nn.Linear as {name}", fused)


@pytest.mark.capability(SECTION, "ModuleInfo `nn.Linear`: gradcheck and gradgradcheck")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", MODULES)
def test_derivatives_of_the_module(
    name: str, route: Route, sampled: Callable[..., None], device: torch.device
) -> None:
    """The derivatives by the input and by the parameters, as in PyTorch's test of modules."""
    for case in cases_of(name, device, [torch.float64], modes=[True]):
        names = [name for name, _ in case.ours.named_parameters()]

        def forward(x: torch.Tensor, *parameters: Any, case: Case = case, names: Any = names) -> torch.Tensor:
            return torch.func.functional_call(case.ours, dict(zip(names, parameters, strict=True)), (x,))

        inputs = (*case.args, *case.kwargs.values(), *case.ours.parameters())
        checks = {"check_batched_grad": True, "fast_mode": True}
        assert torch.autograd.gradcheck(forward, inputs, check_forward_ad=True, **checks)
        assert torch.autograd.gradgradcheck(forward, inputs, check_fwd_over_rev=True, **checks)
        sampled("ModuleInfo nn.Linear, gradcheck and gradgradcheck")


def pickled(module: tnn.Module) -> tnn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: tnn.Module) -> tnn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def from_state_dict(module: tnn.Module) -> tnn.Module:
    twin = copy.deepcopy(module).to_empty(device=next(module.parameters()).device)
    twin.load_state_dict(module.state_dict())
    return twin


COPIES = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved,
    "to_empty and load_state_dict": from_state_dict,
    "to another dtype and back": lambda m: m.to(torch.float64).to(torch.float32),
    "half precision": lambda m: m.half(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "train and eval": lambda m: m.eval().train().eval(),
}


@pytest.mark.capability(SECTION, "ModuleInfo `nn.Linear`: copies, pickling, dtypes, modes")
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_the_module(
    how: str, route: Route, sampled: Callable[..., None], device: torch.device
) -> None:
    for name in MODULES:
        for case in itertools.islice(cases_of(name, device, [torch.float32], modes=[True]), 2):
            before = repr(case.ours), list(case.ours.state_dict())
            kind, twin, torchs = type(case.ours), COPIES[how](case.ours), COPIES[how](case.torchs)
            assert type(twin) is kind
            assert before == (repr(twin), list(twin.state_dict()))
            dtype = torchs.get_parameter("weight" if name == "Linear" else "0.weight").dtype
            args = tuple(t.detach().to(dtype).requires_grad_() for t in case.args)
            kwargs = {key: t.detach().to(dtype).requires_grad_() for key, t in case.kwargs.items()}
            fused = assert_case(case._replace(ours=twin, torchs=torchs), route, args, kwargs)
            sampled("ModuleInfo nn.Linear, copies", fused)


@pytest.mark.parametrize("name", MODULES)
def test_repr_of_the_module(name: str, device: torch.device) -> None:
    for case in cases_of(name, device, modes=[True]):
        if name == "LinearReLU":
            assert repr(case.ours) == repr(case.torchs[0]).replace("Linear", "LinearReLU", 1)
        else:
            kind = type(case.ours).__name__
            assert repr(case.ours) == repr(case.torchs).replace(type(case.torchs).__name__, kind, 1)


@pytest.mark.capability(SECTION, "ModuleInfo of the modules of a Transformer, after `fuse`")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "name", ["nn.TransformerEncoderLayer", "nn.TransformerDecoderLayer", "nn.Transformer"]
)
def test_modules_with_a_linear_in_them(
    name: str, route: Route, sampled: Callable[..., None], device: torch.device
) -> None:
    info = module_info(name)
    options = {"device": device, "dtype": torch.float32}
    for training in (True, False):
        samples = info.module_inputs_func(info, requires_grad=True, training=training, **options)
        for sample in samples[:: 16 if route.kernels else 1]:  # only a few where kernels are interpreted
            arguments, call = sample.constructor_input, sample.forward_input
            torch.manual_seed(0)
            torchs = info.module_cls(*arguments.args, **{**arguments.kwargs, **options}).train(training)
            ours = fusedmlp.fuse(copy.deepcopy(torchs))
            seen = len(route.reasons)
            mine, theirs = run(ours, call.args, call.kwargs), run(torchs, call.args, call.kwargs)
            ran = route.reasons[seen:]
            exact = None
            if None in ran:
                exact = run(copy.deepcopy(torchs).double(), *in_float64((call.args, call.kwargs)))
            what = f"{name} {sample.desc} training={training}"
            # The errors of several layers add up, and gradients are sums of larger terms.
            assert_same(mine, theirs, exact, what, factor=4, floor=2**-19)
            sampled(f"ModuleInfo {name} after fuse", None in ran)
