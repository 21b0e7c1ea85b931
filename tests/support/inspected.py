"""Models for the tests of explain and verify, and helpers that compare states and results."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn as tnn
from torch.nn import functional as F

from fusedmlp.dispatch import backend_choice
from fusedmlp.inspection.explain import Explanation
from fusedmlp.inspection.verify_report import Verification

CPU = "The input is on the CPU; the fused kernels need a CUDA GPU."


CHECKS = [
    "frozen parameters",
    "stride-0 gradient",
    "transposed gradient",
    "backward twice",
    "double backward",
]


class Holder(tnn.Module):
    """A model whose forward is the function that a test passes."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.code = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.code(self, *args, **kwargs)


class Foreign(tnn.Module):
    """A model without fusedmlp, which calls ReLU in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = tnn.Linear(5, 4), tnn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.dropout(F.relu(self.fc1(x)), 0.4, self.training))


class State:
    """Everything that verify must not change; check() compares it with the start."""

    def __init__(self, model: tnn.Module, x: Any = None) -> None:
        self.model, self.x = model, x
        self.before = self.now()

    def now(self) -> dict[str, Any]:
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        leaves = torch.utils._pytree.tree_leaves(self.x)
        tensors |= {f"x {i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        values: dict[str, Any] = {
            name: (
                id(t),
                t.requires_grad,
                id(t.grad),
                None if t.grad is None else t.grad.tolist(),
                t.tolist(),
            )
            for name, t in tensors.items()
            if t.is_leaf
        }
        values["modules"] = [
            (type(m), m.training, len(vars(m)), len(m._forward_hooks)) for m in self.model.modules()
        ]
        values["numbers"] = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
        if torch.cuda.is_available():
            values["on the GPU"] = torch.cuda.get_rng_state().tolist()
        values["settings"] = (
            backend_choice.quiet(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
        return values

    def check(self) -> None:
        now = self.now()
        for what, value in self.before.items():
            assert now[what] == value, what
        assert now.keys() == self.before.keys()


def shown(result: Explanation | Verification) -> str:
    """Return the printed form, and check that it fits a terminal."""
    text = str(result)
    assert max(map(len, text.splitlines())) <= 80, text
    assert "\t" not in text
    return text


def verdicts(result: Verification) -> dict[str, str]:
    return {one.name: one.verdict for one in (*result.rows, *result.checks)}
