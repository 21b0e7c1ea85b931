"""Run a model in float64, whatever dtypes its code asks for: the reference of ``verify``."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_WIDER = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64)
_WIDER[torch.complex64] = torch.complex128


def to_float64(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in float64 or complex128. Integers, booleans and float64 are returned unchanged."""
    return tensor.to(_WIDER[tensor.dtype]) if tensor.dtype in _WIDER else tensor


class InFloat64(TorchDispatchMode):
    """Inside, every operator computes in float64, also on inputs of other dtypes and if asked for another."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return (
            False  # nothing is compiled here, and the default would import torch._dynamo, which takes seconds
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _WIDER:
            kwargs["dtype"] = _WIDER[kwargs["dtype"]]
        if func._schema.is_mutable:  # a converted argument would be a copy, and this operator writes to it
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, to_float64, (args, kwargs))
        return tree_map_only(torch.Tensor, to_float64, func(*args, **kwargs))
