"""Whether somebody has replaced one of PyTorch's own functions for all, as profilers and LoRA tools do.

What is fused stands in for those functions and would not call them. "Replaced" means: it is not the function
that was there when this package was imported.
"""

from typing import Any

import torch
from torch.nn import functional as F
from torch.optim import adam, adamw, sgd


def _of_layers() -> tuple[Any, ...]:
    return (
        torch.nn.Linear.forward,
        torch.nn.ReLU.forward,
        torch.nn.Sequential.forward,
        torch.nn.Module._call_impl,
        F.linear,
        F.relu,
    )


def _of_steps() -> tuple[Any, ...]:
    return (
        torch.nn.Flatten.forward,
        F.cross_entropy,
        F.mse_loss,
        torch.Tensor.backward,
        torch.autograd.backward,
        sgd.sgd,
        adam.adam,
        adamw.adamw,
    )


_LAYERS, _STEPS = _of_layers(), _of_steps()
_NAMES = (
    *("torch.nn.Linear.forward", "torch.nn.ReLU.forward", "torch.nn.Sequential.forward"),
    *("torch.nn.Module._call_impl", "torch.nn.functional.linear", "torch.nn.functional.relu"),
    *("torch.nn.Flatten.forward", "torch.nn.functional.cross_entropy", "torch.nn.functional.mse_loss"),
    *("torch.Tensor.backward", "torch.autograd.backward"),
    *("torch.optim.sgd.sgd", "torch.optim.adam.adam", "torch.optim.adamw.adamw"),
)
LINEAR_FORWARD, SEQUENTIAL_FORWARD, RELU = torch.nn.Linear.forward, torch.nn.Sequential.forward, F.relu
CALL_IMPL = torch.nn.Module._call_impl


def why_patched() -> str | None:
    """Which of the functions that a layer stands in for was replaced, in a sentence, or None."""
    return None if (now := _of_layers()) == _LAYERS else _in_words(now)


def why_step_patched() -> str | None:
    """The same for a whole step of training."""
    now = *_of_layers(), *_of_steps()
    return None if now == (*_LAYERS, *_STEPS) else _in_words(now)


def _in_words(now: tuple[Any, ...]) -> str:
    known = zip(_NAMES, now, (*_LAYERS, *_STEPS))  # noqa: B905  of a layer's, only the first
    return f"{next(name for name, is_now, was in known if is_now is not was)} was replaced"
