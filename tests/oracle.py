"""The suite's one measure of right: the error against float64, in units of PyTorch's own error."""

import torch


def assert_right(
    ours: torch.Tensor,
    torchs: torch.Tensor,
    exact: torch.Tensor,
    what: str = "",
    factor: float = 2.0,
    floor: float = 2 * torch.finfo(torch.float32).eps,
) -> None:
    """ours errs at most twice as much as PyTorch's result of the same dtype, in maximum and in RMS.

    One small floor is added, two units of float32 in the last place of the largest value, for PyTorch is at
    times exactly right. Infinities and NaN must be the same as PyTorch's.
    """
    assert ours.dtype == torchs.dtype, what
    assert ours.shape == exact.shape, what
    finite = torchs.isfinite()
    assert torch.equal(ours.isnan(), torchs.isnan()), f"{what}: NaN in other places than PyTorch's"
    assert torch.equal(ours[~finite].nan_to_num(), torchs[~finite].nan_to_num()), f"{what}: other infinities"
    if not finite.any():
        return
    exact = exact.double()[finite]
    error, torchs_error = (ours[finite].double() - exact).abs(), (torchs[finite].double() - exact).abs()
    for name, of in (("maximum", torch.max), ("RMS", lambda t: t.square().mean().sqrt())):
        got, its = of(error).item(), of(torchs_error).item()
        most = factor * its + floor * exact.abs().max().item()
        assert got <= most, f"{what}: {name} error {got:.3g}, PyTorch's own {its:.3g}, allowed {most:.3g}"


def surrounded(t: torch.Tensor) -> torch.Tensor:
    """The same 2-D values inside a larger buffer of NaN: a read past any edge poisons the result."""
    rows, columns = t.shape
    buffer = t.new_full((rows + 2, columns + 16), float("nan"))
    buffer[1 : rows + 1, 8 : columns + 8] = t
    return buffer[1 : rows + 1, 8 : columns + 8]
