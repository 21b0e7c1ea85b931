"""Whether somebody has replaced one of PyTorch's own functions for all, as profilers and LoRA tools do.

What is fused stands in for those functions and would not call them. "Replaced" means: it is not the function
that was there when this package was imported.
"""

from typing import Any

import torch
from torch.nn import functional as F
from torch.optim import adam, adamw, sgd

LINEAR_FORWARD, SEQUENTIAL_FORWARD = torch.nn.Linear.forward, torch.nn.Sequential.forward
CALL_IMPL, RELU = torch.nn.Module._call_impl, F.relu
_RELU_FORWARD, _LINEAR = torch.nn.ReLU.forward, F.linear


def why_patched() -> str | None:
    """Which of the functions that a layer stands in for was replaced, in a sentence, or None.

    One by one, so that torch.compile sees each, and compiles anew when it is another.
    """
    if torch.nn.Linear.forward is not LINEAR_FORWARD:
        return "torch.nn.Linear.forward was replaced"
    if torch.nn.Sequential.forward is not SEQUENTIAL_FORWARD:
        return "torch.nn.Sequential.forward was replaced"
    if torch.nn.ReLU.forward is not _RELU_FORWARD:
        return "torch.nn.ReLU.forward was replaced"
    if torch.nn.Module._call_impl is not CALL_IMPL:
        return "torch.nn.Module._call_impl was replaced"
    if F.linear is not _LINEAR:
        return "torch.nn.functional.linear was replaced"
    if F.relu is not RELU:
        return "torch.nn.functional.relu was replaced"
    return None


_STEP: dict[str, tuple[Any, str]] = {
    "torch.nn.Flatten.forward": (torch.nn.Flatten, "forward"),
    "torch.nn.functional.cross_entropy": (F, "cross_entropy"),
    "torch.nn.functional.mse_loss": (F, "mse_loss"),
    "torch.Tensor.backward": (torch.Tensor, "backward"),
    "torch.autograd.backward": (torch.autograd, "backward"),
    "torch.optim.sgd.sgd": (sgd, "sgd"),
    "torch.optim.adam.adam": (adam, "adam"),
    "torch.optim.adamw.adamw": (adamw, "adamw"),
}
_FUNCTIONS = [
    (name, owner, attribute, getattr(owner, attribute)) for name, (owner, attribute) in _STEP.items()
]


def why_step_patched() -> str | None:
    """The same for a whole step of training."""
    for name, owner, attribute, function in _FUNCTIONS:
        if getattr(owner, attribute) is not function:
            return f"{name} was replaced"
    return why_patched()
