"""What the tests of launchers share: their tensors, bounds of errors, and memory that shows stray writes."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
INTERPRETED = not torch.cuda.is_available()


def bounds(dtype: torch.dtype) -> dict[str, float]:
    """Bounds of errors. The interpreter truncates to bfloat16, which alone doubles the error of rounding."""
    if dtype == torch.bfloat16 and INTERPRETED:
        return {"factor": 4.0, "floor": torch.finfo(dtype).eps}
    return {}


def tensors_of(arguments: Any) -> list[torch.Tensor]:
    """All tensors in a launcher's arguments or results, in order, also those in lists and tuples."""
    if isinstance(arguments, torch.Tensor):
        return [arguments]
    return [t for a in arguments for t in tensors_of(a)] if isinstance(arguments, list | tuple) else []


def as_double(argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(map(as_double, argument))
    return argument.double() if isinstance(argument, torch.Tensor) else argument


class Canaries(TorchDispatchMode):
    """Fills every new tensor with NaN and puts it between canaries: missing and stray writes show."""

    PAD, CANARY = 2**16, 12345.0  # more than a tile's rows past the end

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not aten.new_empty.default or out.numel() == 0:
            return out
        buffer = out.new_full((out.numel() + 2 * self.PAD,), self.CANARY)
        self.buffers.append(buffer)
        inside = buffer[self.PAD : -self.PAD]
        inside.fill_(float("nan"))
        return inside.view(out.shape)

    def check(self) -> None:
        for buffer in self.buffers:
            edges = torch.cat((buffer[: self.PAD], buffer[-self.PAD :])).float()
            assert (edges == torch.tensor(self.CANARY).to(buffer.dtype).float()).all(), "written past the end"
