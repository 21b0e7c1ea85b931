"""What the tests of test_torchs_own.py and test_torchs_own_modules.py share."""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from oracle import assert_right
from torch.utils._pytree import tree_map_only

Sample = tuple[torch.Tensor, ...]

SECTION = "PyTorch's own tests"
NEEDS_EXPECTTEST = pytest.mark.skipif(
    importlib.util.find_spec("expecttest") is None,
    reason="expecttest is not installed, and PyTorch's own tests import it",
)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def databases() -> tuple[dict[str, Any], dict[str, Any]]:
    """The OpInfos and the ModuleInfos by name; imported only here, for it takes seconds."""
    flag = "__allow_nonbracketed_mutation_flag"
    before = getattr(torch.backends, flag)
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    setattr(torch.backends, flag, before)  # the import forbids setting torch.backends' flags, to all tests
    ops = {op.name: op for op in op_db if not op.variant_test_name}
    return ops, {info.name: info for info in module_db}


def op_info(name: str) -> Any:
    return databases()[0][name]


def module_info(name: str) -> Any:
    return databases()[1][name]


def results(function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> list[Any]:
    """The output and the gradients of those inputs that require them, or the type of the error."""
    try:
        y = function(*inputs)
    except Exception as error:
        return [type(error)]
    if not y.requires_grad:
        return [y]
    wanted = [t for t in inputs if t.requires_grad]
    grad_output = torch.linspace(-2, 1, y.numel(), dtype=torch.float64, device=y.device).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, wanted, grad_output.view(y.shape))]


def in_float64(sample: Any) -> Any:
    """The same with every tensor of floating point, wherever in it, in float64."""

    def convert(t: torch.Tensor) -> torch.Tensor:
        return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

    return tree_map_only(torch.Tensor, convert, sample)


def assert_same(
    ours: list[Any], torchs: list[Any], exact: list[Any] | None, what: str, **tolerance: float
) -> None:
    """The same bits, strides too; or, with exact results given, as right as torch's."""
    assert len(ours) == len(torchs), what
    for i, (our, its) in enumerate(zip(ours, torchs, strict=True)):
        if isinstance(its, type):
            assert our is its, what
        elif exact is not None:
            if its.dtype == torch.bfloat16 and not its.is_cuda:
                tolerance = {"floor": torch.finfo(torch.bfloat16).eps}  # the interpreter rounds it otherwise
            assert_right(our, its, exact[i], f"{what}: result {i}", **tolerance)
        else:
            same = {"rtol": 0, "atol": 0, "equal_nan": True, "check_stride": True}
            torch.testing.assert_close(our, its, **same, msg=lambda message: f"{what}: {message}")
