"""The suite's one measure of right, the package's: the error against float64, in units of PyTorch's own."""

import torch

from fusedmlp import _measure


def assert_right(
    ours: torch.Tensor,
    torchs: torch.Tensor,
    exact: torch.Tensor,
    what: str = "",
    factor: float = _measure.FACTOR,
    floor: float = _measure.FLOOR,
) -> None:
    """ours errs at most twice as much as PyTorch's result of the same dtype, as _measure.compare says."""
    assert ours.dtype == torchs.dtype, what
    assert ours.shape == exact.shape, what
    problem = _measure.compare(ours, torchs, exact, factor, floor).problem
    assert problem is None, f"{what}: {problem}"


def surrounded(t: torch.Tensor) -> torch.Tensor:
    """The same 2-D values inside a larger buffer of NaN: a read past any edge poisons the result."""
    rows, columns = t.shape
    buffer = t.new_full((rows + 2, columns + 16), float("nan"))
    buffer[1 : rows + 1, 8 : columns + 8] = t
    return buffer[1 : rows + 1, 8 : columns + 8]
