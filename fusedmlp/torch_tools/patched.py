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
LINEAR_FORWARD, SEQUENTIAL_FORWARD = torch.nn.Linear.forward, torch.nn.Sequential.forward
CALL_IMPL, RELU = torch.nn.Module._call_impl, F.relu
_RELU_FORWARD, _LINEAR = torch.nn.ReLU.forward, F.linear
TORCH_RELU = torch.relu  # which F.relu calls


def why_patched() -> str | None:
    """Say which of the functions that a fused layer replaces was replaced by other code, or return None.

    The comparisons are written out so that torch.compile guards on each and recompiles if one changes.
    """
    if _Linear.forward is not LINEAR_FORWARD:
        return "The function torch.nn.Linear.forward was replaced."
    if _Sequential.forward is not SEQUENTIAL_FORWARD:
        return "The function torch.nn.Sequential.forward was replaced."
    if _ReLU.forward is not _RELU_FORWARD:
        return "The function torch.nn.ReLU.forward was replaced."
    if _Module._call_impl is not CALL_IMPL:
        return "The function torch.nn.Module._call_impl was replaced."
    if F.linear is not _LINEAR:
        return "The function torch.nn.functional.linear was replaced."
    if F.relu is not RELU:
        return "The function torch.nn.functional.relu was replaced."
    if torch.relu is not TORCH_RELU:
        return "The function torch.relu was replaced."
    return None


def _of_steps() -> tuple[Any, ...]:
    return (
        _Flatten.forward,
        F.cross_entropy,
        F.mse_loss,
        _Tensor.backward,
        autograd.backward,
        sgd.sgd,
        adam.adam,
        adamw.adamw,
    )


_STEPS = _of_steps()
_NAMES = (
    *("torch.nn.Flatten.forward", "torch.nn.functional.cross_entropy", "torch.nn.functional.mse_loss"),
    *("torch.Tensor.backward", "torch.autograd.backward"),
    *("torch.optim.sgd.sgd", "torch.optim.adam.adam", "torch.optim.adamw.adamw"),
)


def why_step_patched() -> str | None:
    """Say the same of the functions that a fused training step replaces."""
    now = _of_steps()
    if now != _STEPS:
        replaced = zip(_NAMES, now, _STEPS, strict=True)
        name = next(name for name, is_now, was in replaced if is_now is not was)
        return f"The function {name} was replaced."
    return why_patched()
