"""When a result is accurate: its error against float64 is at most twice the error of PyTorch's own result."""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from fusedmlp.torch_tools import accuracy

NEARBY = 8  # runs of PyTorch on inputs a rounding away


def assert_right(
    ours: torch.Tensor,
    torchs: torch.Tensor,
    exact: torch.Tensor,
    what: str = "",
    factor: float = accuracy.FACTOR,
    floor: float = accuracy.FLOOR,
) -> None:
    """Assert that ours errs at most twice as much as PyTorch's result of that dtype, see accuracy.compare."""
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
    """Assert the same for each of several results of one run.

    again: computes PyTorch's results once more, of inputs and parameters that it passes through the function
    it is given, which moves them by a rounding. If ours is inaccurate by the given results, the largest error
    of several such runs counts as PyTorch's own: some results of many layers are almost exact by luck, and
    which ones depends on the processor.
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


def assert_same(
    ours: Sequence[Any],
    torchs: Sequence[Any],
    exact: Sequence[Any] | None,
    what: str = "",
    again: Callable[[Callable[[torch.Tensor], torch.Tensor]], Iterable[torch.Tensor]] | None = None,
    **bounds: float,
) -> None:
    """Assert the same bits and strides; or, if the results in float64 are given, the accuracy of torch's.

    Where torch's result is a type of error, ours must be that type.
    """
    assert len(ours) == len(torchs), what
    names = [f"{what}: result {i}" for i in range(len(torchs))]
    tensors = [i for i, its in enumerate(torchs) if not isinstance(its, type)]
    assert all(ours[i] is its for i, its in enumerate(torchs) if isinstance(its, type)), what
    if exact is not None:
        chosen = [[results[i] for i in tensors] for results in (ours, torchs, exact, names)]
        assert_all_right(*chosen, again, **bounds)  # type: ignore[arg-type]
        return
    same = {"rtol": 0, "atol": 0, "equal_nan": True, "check_stride": True}
    for i in tensors:
        torch.testing.assert_close(ours[i], torchs[i], **same, msg=lambda message: f"{what}: {message}")


def nearby(model: torch.nn.Module, nudge: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    """A copy of the model with every parameter moved by ``nudge``, see assert_all_right."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(nudge(parameter))
    return model


def surrounded(t: torch.Tensor) -> torch.Tensor:
    """The same 2-D values inside a larger buffer of NaN: a read past any edge makes the result NaN."""
    rows, columns = t.shape
    buffer = t.new_full((rows + 2, columns + 16), float("nan"))
    buffer[1 : rows + 1, 8 : columns + 8] = t
    return buffer[1 : rows + 1, 8 : columns + 8]
