"""PyTorch's own descriptions of operators and modules, and what the tests that run them share."""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
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
    """The OpInfos and the ModuleInfos by name. They are imported only here, because that takes seconds."""
    flag = "__allow_nonbracketed_mutation_flag"
    before = getattr(torch.backends, flag)
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    setattr(torch.backends, flag, before)  # the import forbids all tests to set flags of torch.backends
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
    """The same sample with every floating-point tensor in it in float64."""

    def convert(t: torch.Tensor) -> torch.Tensor:
        return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

    return tree_map_only(torch.Tensor, convert, sample)


def assert_same(
    ours: list[Any], torchs: list[Any], exact: list[Any] | None, what: str, **bounds: float
) -> None:
    """`oracle.assert_same`. Triton's interpreter truncates to bfloat16, where PyTorch rounds to nearest."""
    if any(isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16 and not t.is_cuda for t in torchs):
        bounds = {"floor": torch.finfo(torch.bfloat16).eps}
    oracle.assert_same(ours, torchs, exact, what, **bounds)
