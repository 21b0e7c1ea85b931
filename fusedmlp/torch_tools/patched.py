"""Detect that other code has replaced one of PyTorch's own functions, as profilers and LoRA tools do.

Fused code runs in place of those functions, so it would not call the replacement. A function counts as
replaced if it is not the one that was there when this package was imported.
"""

from typing import Any

import torch
from torch import autograd
from torch.nn import functional as F
from torch.optim import adam, adamw, sgd

# Global names, which each step reads faster than attributes of torch.nn.
_Linear, _ReLU, _Sequential = torch.nn.Linear, torch.nn.ReLU, torch.nn.Sequential
_Flatten, _Module, _Tensor = torch.nn.Flatten, torch.nn.Module, torch.Tensor
_NAMES = (
    "torch.nn.Linear.forward", "torch.nn.Sequential.forward", "torch.nn.ReLU.forward",
    "torch.nn.Module._call_impl", "torch.nn.functional.linear", "torch.nn.functional.relu", "torch.relu",
    "torch.nn.Flatten.forward", "torch.nn.functional.cross_entropy", "torch.nn.functional.mse_loss",
    "torch.Tensor.backward", "torch.autograd.backward",
    "torch.optim.sgd.sgd", "torch.optim.adam.adam", "torch.optim.adamw.adamw",
)  # fmt: skip


def _functions() -> tuple[Any, ...]:
    """The functions of these names, as they are now."""
    return (
        _Linear.forward, _Sequential.forward, _ReLU.forward, _Module._call_impl, F.linear, F.relu, torch.relu,
        _Flatten.forward, F.cross_entropy, F.mse_loss, _Tensor.backward, autograd.backward,
        sgd.sgd, adam.adam, adamw.adamw,
    )  # fmt: skip


_ORIGINALS = _functions()
LINEAR_FORWARD, SEQUENTIAL_FORWARD, _RELU_FORWARD, CALL_IMPL, _LINEAR, RELU, TORCH_RELU = _ORIGINALS[:7]


def why_patched() -> str | None:
    """Name a function that was replaced and that fused layers replace too, or return None.

    The comparisons are written out so that torch.compile guards on each and recompiles if one changes.
    """
    if (
        _Linear.forward is LINEAR_FORWARD
        and _Sequential.forward is SEQUENTIAL_FORWARD
        and _ReLU.forward is _RELU_FORWARD
        and _Module._call_impl is CALL_IMPL
        and F.linear is _LINEAR
        and F.relu is RELU
        and torch.relu is TORCH_RELU
    ):
        return None
    return why_step_patched()


def why_step_patched() -> str | None:
    """The same for the functions that a fused training step replaces, which include those of the layers."""
    now = _functions()
    if now == _ORIGINALS:
        return None
    replaced = (name for name, is_now, was in zip(_NAMES, now, _ORIGINALS, strict=True) if is_now is not was)
    return f"The function {next(replaced)} was replaced."
