"""Do to the tensors of a Linear what autocast does to them."""

import torch

from fusedmlp.dispatch.backend_choice import Biases, Weights

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # the kernels take these, and autocast casts them


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype to which autocast casts the inputs of a product, or None if autocast is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def dtype_after_cast(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor of this dtype has after autocast, which leaves float64 and integers alone."""
    return autocast if autocast is not None and dtype in DTYPES else dtype


def cast(x: torch.Tensor, weights: Weights, biases: Biases) -> tuple[torch.Tensor, Weights, Biases]:
    """The tensors of a chain as autocast passes them to ``torch.nn.functional.linear``."""
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return x, weights, biases
    x, *weights = [t.to(dtype_after_cast(t.dtype, dtype)) for t in (x, *weights)]
    return x, weights, [b if b is None else b.to(dtype_after_cast(b.dtype, dtype)) for b in biases]
