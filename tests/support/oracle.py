"""The suite's one measure of right, the package's: the error against float64, in units of PyTorch's own."""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence

import torch

from fusedmlp.torch_tools import accuracy

NEARBY = 8  # of PyTorch's runs a rounding away


def assert_right(
    ours: torch.Tensor,
    torchs: torch.Tensor,
    exact: torch.Tensor,
    what: str = "",
    factor: float = accuracy.FACTOR,
    floor: float = accuracy.FLOOR,
) -> None:
    """ours errs at most twice as much as PyTorch's result of the same dtype, as accuracy.compare says."""
    assert_all_right([ours], [torchs], [exact], [what], factor=factor, floor=floor)


def assert_all_right(
    ours: Iterable[torch.Tensor],
    torchs: Iterable[torch.Tensor],
    exact: Sequence[torch.Tensor],
    what: Iterable[str],
    again: Callable[[Callable[[torch.Tensor], torch.Tensor]], Iterable[torch.Tensor]] | None = None,
    factor: float = accuracy.FACTOR,
    floor: float = accuracy.FLOOR,
) -> None:
    """The same for each of several results of one run.

    again: PyTorch's results once more, of inputs and parameters that went through the function it is given,
    which moves them by a rounding. The largest error of several such runs counts as PyTorch's own where the
    given one alone would call ours wrong: of many layers' results some are almost exact, by luck, and which
    they are depends on the processor.
    """
    known = [(0.0, 0.0)] * len(exact)
    asked = again is None
    for i, (mine, its, true, name) in enumerate(zip(ours, torchs, exact, what, strict=True)):
        assert mine.dtype == its.dtype, name
        assert mine.shape == true.shape, name
        problem = accuracy.compare(mine, its, true, factor, floor, known[i]).problem
        if problem is not None and not asked and again is not None:
            asked = True
            for number in range(NEARBY):
                generator = torch.Generator().manual_seed(number)
                runs = again(functools.partial(accuracy.nudged, generator=generator))
                for j, (near, right) in enumerate(zip(runs, exact, strict=True)):
                    error = accuracy.errors_of(near, right) if near.numel() else (0.0, 0.0)
                    known[j] = max(known[j][0], error[0]), max(known[j][1], error[1])
            problem = accuracy.compare(mine, its, true, factor, floor, known[i]).problem
        assert problem is None, f"{name}: {problem}"


def nearby(model: torch.nn.Module, nudge: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    """The model with every parameter where ``nudge`` moves it, see assert_all_right."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(nudge(parameter))
    return model


def surrounded(t: torch.Tensor) -> torch.Tensor:
    """The same 2-D values inside a larger buffer of NaN: a read past any edge poisons the result."""
    rows, columns = t.shape
    buffer = t.new_full((rows + 2, columns + 16), float("nan"))
    buffer[1 : rows + 1, 8 : columns + 8] = t
    return buffer[1 : rows + 1, 8 : columns + 8]
