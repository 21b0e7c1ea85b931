"""The one measure of right: the error against float64, in units of PyTorch's own error."""

import math
from typing import NamedTuple

import torch

FACTOR = 2.0
FLOOR = 2 * torch.finfo(torch.float32).eps


class Comparison(NamedTuple):
    """Maximum and RMS of ours and of PyTorch's error, the exact result's largest value, and what is wrong."""

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
    """Whether ours, of the same shape, errs at most twice as much as PyTorch's result, in maximum and in RMS.

    One small floor is added, two units of float32 in the last place of the largest value, for PyTorch is at
    times exactly right. Infinities and NaN must be the same as PyTorch's. ``known``: PyTorch's own errors are
    at least these, as was found elsewhere.
    """
    finite = torchs.isfinite()
    everything = bool(finite.all())
    unknown = (math.nan, math.nan)
    if not torch.equal(ours.isnan(), torchs.isnan()):
        return Comparison(unknown, unknown, math.nan, "NaN in other places than PyTorch's")
    if not everything and not torch.equal(ours[~finite].nan_to_num(), torchs[~finite].nan_to_num()):
        return Comparison(unknown, unknown, math.nan, "other infinities")
    if not finite.any():
        return Comparison((0.0, 0.0), (0.0, 0.0), 0.0, None)

    def chosen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if everything else tensor[finite]  # which is slow

    exact = chosen(exact).double()
    got, its = errors_of(chosen(ours), exact), errors_of(chosen(torchs), exact)
    its = max(its[0], known[0]), max(its[1], known[1])
    largest = exact.abs().max().item()
    problem = None
    for name, error, torchs_error in zip(("maximum", "RMS"), got, its, strict=True):
        most = factor * torchs_error + floor * largest
        if problem is None and not error <= most:
            problem = f"{name} error {error:.3g}, PyTorch's own {torchs_error:.3g}, allowed {most:.3g}"
    return Comparison(got, its, largest, problem)


def nudged(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each value up to one unit in its last place away.

    How wrong PyTorch is on such inputs is how wrong it can as well be on the given ones: by luck a single
    result is at times almost exact.
    """
    wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float64))
    by = 2 * torch.rand(tensor.shape, generator=generator).to(tensor.device) - 1
    return (wide * (1 + torch.finfo(tensor.dtype).eps * by.double())).to(tensor.dtype)


def errors_of(values: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """The largest and the RMS."""
    error = (values.double() - exact).abs()
    return error.max().item(), error.square().mean().sqrt().item()
