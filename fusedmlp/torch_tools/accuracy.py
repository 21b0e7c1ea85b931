"""When a result is accurate: its error against float64 is at most twice that of PyTorch's own result."""

import math
from typing import NamedTuple

import torch

FACTOR = 2.0
FLOOR = 2 * torch.finfo(torch.float32).eps


class Comparison(NamedTuple):
    """Maximum and RMS error of our result and of PyTorch's, the largest exact value, and any problem."""

    errors: tuple[float, float]
    torchs_errors: tuple[float, float]
    largest: float
    problem: str | None


def compare(
    ours: torch.Tensor,
    torchs: torch.Tensor,
    exact: torch.Tensor,
    factor: float = FACTOR,
    floor: float = FLOOR,
    known: tuple[float, float] = (0.0, 0.0),
) -> Comparison:
    """Compare the maximum and RMS errors of our result and of PyTorch's; all tensors have the same shape.

    The allowed error is ``factor`` times PyTorch's, plus ``floor`` times the largest value, because PyTorch
    sometimes has no error at all. Infinities and NaN must be where PyTorch has them. ``known`` are lower
    bounds of PyTorch's errors, found on other inputs.
    """
    finite = torchs.isfinite()
    if not torch.equal(ours.isnan(), torchs.isnan()):
        return Comparison((math.nan,) * 2, (math.nan,) * 2, math.nan, "NaN in other places than PyTorch's")
    if not finite.all():
        if not torch.equal(ours[~finite].nan_to_num(), torchs[~finite].nan_to_num()):
            return Comparison((math.nan,) * 2, (math.nan,) * 2, math.nan, "other infinities")
        ours, torchs, exact = ours[finite], torchs[finite], exact[finite]
    if not exact.numel():
        return Comparison((0.0, 0.0), (0.0, 0.0), 0.0, None)
    exact = exact.double()
    errors, torchs_errors = errors_of(ours, exact), errors_of(torchs, exact)
    torchs_errors = max(torchs_errors[0], known[0]), max(torchs_errors[1], known[1])
    largest = exact.abs().max().item()
    problem = None
    for name, error, torchs_error in zip(("maximum", "RMS"), errors, torchs_errors, strict=True):
        most = factor * torchs_error + floor * largest
        if problem is None and not error <= most:  # true also for NaN
            problem = f"{name} error {error:.3g}, PyTorch's own {torchs_error:.3g}, allowed {most:.3g}"
    return Comparison(errors, torchs_errors, largest, problem)


def nudged(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move each value by up to one unit in its last place.

    PyTorch's result for the given inputs may be almost exact by luck. Its errors on nudged inputs show what
    error is usual.
    """
    wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float64))
    by = 2 * torch.rand(tensor.shape, generator=generator).to(tensor.device) - 1
    return (wide * (1 + torch.finfo(tensor.dtype).eps * by.double())).to(tensor.dtype)


def errors_of(values: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """The maximum and the RMS error."""
    error = (values.double() - exact).abs()
    return error.max().item(), error.square().mean().sqrt().item()
