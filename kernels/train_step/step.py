"""The training step in two launches, one over rows and one over weights, and the memory that it works in."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import arithmetic, build, launch, options_for
from ..tiles import block_of, cdiv
from .optimizers import COEFFICIENTS
from .rows import NONE_WRONG, rows_of_step, unknown_zero
from .weights import weights_of_step

WIDEST = 256  # outputs of a layer: a program holds a row of them
DEEPEST = 9  # layers
MOST_INPUTS = 2**22  # offsets within a weight are counted in 32 bits


class RowsTile(NamedTuple):
    BLOCK_M: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class WeightsTile(NamedTuple):
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_M: int
    num_warps: int
    num_stages: int


# The first tile is for few rows: smaller tiles make more programs. The last is for many rows: larger tiles
# read the weights less often. 64 rows would use wgmma on sm_90, which ptxas serialises for some networks.
# tests/kernels/test_codegen.py compiles every entry for sm_80, sm_90 and sm_100. None has been timed yet.
ROWS_TILES: dict[str, tuple[RowsTile, ...]] = {
    "half": (RowsTile(16, 64, 8, 3), RowsTile(32, 32, 8, 4)),
    "tf32": (RowsTile(16, 32, 8, 3), RowsTile(32, 32, 8, 3)),
    "ieee": (RowsTile(16, 16, 8, 3),),
}
MANY_ROWS = 2048
MOST_ROWS = 8192  # of a step: each program of the second phase reads all of them

# With 32 outputs in a tile, an MNIST network has a tile for each SM.
WEIGHTS_TILES: dict[str, WeightsTile] = {
    "half": WeightsTile(32, 64, 64, 4, 3),
    "tf32": WeightsTile(32, 64, 32, 4, 3),
    "ieee": WeightsTile(32, 64, 16, 4, 3),
}


class Parameters(NamedTuple):
    """Parameters and the optimizer's state, by layer: contiguous float32, except low_precision."""

    weights: tuple[torch.Tensor, ...]  # (N, K)
    biases: tuple[torch.Tensor, ...]  # (N,)
    low_precision: tuple[torch.Tensor | None, ...]  # weights in the dtype of products; None for float32
    weight_moments: tuple[torch.Tensor | None, ...]  # momentum_buffer or exp_avg; None without momentum
    bias_moments: tuple[torch.Tensor | None, ...]
    weight_squares: tuple[torch.Tensor | None, ...]  # exp_avg_sq; None for SGD
    bias_squares: tuple[torch.Tensor | None, ...]


class Workspace(NamedTuple):
    """Memory for what one phase passes to the other; reused by all steps with the same network and dtype."""

    rows: int  # the most of one step
    low_precision: tuple[torch.Tensor | None, ...]  # memory for Parameters.low_precision
    hidden: tuple[torch.Tensor, ...]  # of each layer but the last: its output h
    grads: tuple[torch.Tensor, ...]  # of each layer: the gradient g of its product
    partials: torch.Tensor  # each program's sums of the loss and of what it is divided by
    arrived: torch.Tensor  # the counter of the persistent form's barrier
    wrong: torch.Tensor  # the record of wrong labels, see wrong_label


class Network(NamedTuple):
    """Compile-time constants of the training-step kernels."""

    widths: tuple[int, ...]  # of x and of each layer's output
    loss: str  # "cross_entropy" or "mse"
    optimizer: str  # "sgd", "adam" or "adamw"
    nesterov: bool = False


class Job(NamedTuple):
    """What steps read and write: contiguous tensors on one device."""

    x: torch.Tensor  # (n, widths[0]): floats, or integers, which are multiplied by scale
    order: torch.Tensor | None  # the order in which to take the rows of x and target; None: as in memory
    target: torch.Tensor  # (n,) class indices of an integer dtype, or (n, widths[-1]) floats for "mse"
    parameters: Parameters  # updated in place; low_precision must be up to date, see refresh_low_precision
    network: Network
    coefficients: torch.Tensor  # (steps, 2 * layers, 8) float32, see optimizers.py: weight, bias, weight, ...
    losses: torch.Tensor  # (steps,) float32: each step's mean loss, before its update
    workspace: Workspace
    scale: float = 1.0


def why_no_step(widths: Sequence[int], rows: int, dtype: torch.dtype) -> str | None:
    """None if the two-launch step supports these sizes and this dtype of products, else the reason.

    widths: of x and of each layer's output. rows: of a step.
    """
    if len(widths) - 1 > DEEPEST:
        return f"there are {len(widths) - 1} layers, and the two-launch step supports at most {DEEPEST}"
    if min(widths) < 1:
        return "a layer is empty"
    if max(widths[1:]) > WIDEST:
        return f"a layer has {max(widths[1:])} outputs, and the two-launch step supports at most {WIDEST}"
    if widths[0] > MOST_INPUTS:
        return f"there are {widths[0]} inputs, and the two-launch step supports at most {MOST_INPUTS}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the two-launch step computes in float32, float16 or bfloat16, not in {dtype}"
    if rows < 1:
        return "the batch is empty"
    if rows > MOST_ROWS:
        return f"{rows} rows are more than the {MOST_ROWS} that the two-launch step supports"
    return None


def workspace_for(widths: Sequence[int], rows: int, dtype: torch.dtype, device: torch.device) -> Workspace:
    """Memory for steps of at most ``rows`` rows with products in ``dtype``."""

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    return Workspace(
        rows,
        tuple(None if dtype == torch.float32 else empty(N, K) for K, N in itertools.pairwise(widths)),
        tuple(empty(rows, block_of(width)) for width in widths[1:-1]),
        tuple(empty(rows, block_of(width)) for width in widths[1:]),
        torch.empty(2 * cdiv(rows, ROWS_TILES["half"][0].BLOCK_M), dtype=torch.float32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.full((1,), NONE_WRONG.value, dtype=torch.int64, device=device),
    )


def wrong_label(record: torch.Tensor) -> tuple[int, int] | None:
    """``(number of the first step with a label that is no class, its smallest such label)``, or None.

    record: a workspace's ``wrong`` or a copy of it, on any device; reading it waits for the device. The label
    is clamped to the range of int32. From that step on no step updates anything, and losses are NaN, until
    :func:`forget_wrong_label`.
    """
    code = int(record.item())
    return None if code == NONE_WRONG.value else (code >> 32, (code & (2**32 - 1)) - 2**31)


def forget_wrong_label(record: torch.Tensor) -> None:
    """Clear the record, so that steps update again."""
    record.fill_(NONE_WRONG.value)


@triton.jit(do_not_specialize=["first", "rows", "tiles", "number"])
def _step_rows_kernel(
    first, rows, tiles, number, x_ptr, index_ptr, target_ptr, weights, biases, hidden, grads, partials_ptr,
    wrong_ptr, scale,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, LOSS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    rows_of_step(
        tl.program_id(0), tiles, rows, (x_ptr, index_ptr, first, scale), target_ptr, weights, biases,
        (hidden, grads), partials_ptr, number, wrong_ptr, unknown_zero(1),
        WIDTHS, BLOCKS, LOSS, BLOCK_M, BLOCK_K, INPUT_PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "rows", "tiles", "step"])
def _step_weights_kernel(
    first, rows, tiles, step, x_ptr, index_ptr, parameters, hidden, grads, partials_ptr, wrong_ptr,
    coefficients_ptr, losses_ptr, scale,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, LOSS: tl.constexpr,
    OPTIMIZER: tl.constexpr, NESTEROV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    weights_of_step(
        tl.program_id(0), tiles, rows, (x_ptr, index_ptr, first, scale), parameters, (hidden, grads),
        partials_ptr, wrong_ptr, coefficients_ptr + step * 2 * (len(WIDTHS) - 1) * COEFFICIENTS,
        losses_ptr + step,
        WIDTHS, BLOCKS, LOSS, OPTIMIZER, NESTEROV, BLOCK_N, BLOCK_K, BLOCK_M, INPUT_PRECISION,
    )  # fmt: skip


@functools.lru_cache(256)
def _plan(
    network: Network, rows: int, kind: str, overlap: bool
) -> tuple[int, int, dict[str, Any], dict[str, Any]]:
    """How many tiles of rows and of weights there are, and the options of the two launches."""
    rows_tile = ROWS_TILES[kind][-1 if rows > MANY_ROWS else 0]
    weights_tile = WEIGHTS_TILES[kind]
    shared = constants(network, kind) | {"OVERLAP": overlap}
    if overlap:
        shared["launch_pdl"] = True
    updates = {"OPTIMIZER": network.optimizer, "NESTEROV": network.nesterov}
    return (
        cdiv(rows, rows_tile.BLOCK_M),
        count_weight_tiles(network.widths, weights_tile),
        shared | rows_tile._asdict(),
        shared | updates | weights_tile._asdict(),
    )


def constants(network: Network, kind: str) -> dict[str, Any]:
    """The launch options that all training-step kernels share."""
    blocks = tuple(map(block_of, network.widths))
    return options_for(kind) | {"WIDTHS": network.widths, "BLOCKS": blocks, "LOSS": network.loss}


def count_weight_tiles(widths: Sequence[int], tile: WeightsTile) -> int:
    return sum(cdiv(N, tile.BLOCK_N) * cdiv(K, tile.BLOCK_K) for K, N in itertools.pairwise(widths))


def multiplied(parameters: Parameters) -> tuple[torch.Tensor, ...]:
    """The weights that the first phase's products read, in their dtype."""
    return tuple(
        weight if low is None else low
        for weight, low in zip(parameters.weights, parameters.low_precision, strict=True)
    )


def refresh_low_precision(parameters: Parameters) -> None:
    """Refresh the low-precision weights, as the weights may have been changed between steps."""
    low = [one for one in parameters.low_precision if one is not None]  # all or none
    if low:
        torch._foreach_copy_(low, parameters.weights)


def train_step(
    job: Job, first: int, rows: int, step: int, overlap: bool = False, number: int | None = None
) -> None:
    """Do step number ``step`` of a job, on ``rows`` rows from row ``first`` of its order, at least one.

    The label -100 is left out of the mean loss; a label that is no class stops the training, see wrong_label.
    overlap: use programmatic dependent launch (sm_90 and newer), which has never run on a GPU. number: the
    step's number for wrong_label, if not ``step``.

    >>> job = Job(x, None, y, parameters, network, coefficients, losses, workspace)
    >>> train_step(job, 0, 64, 0)
    """
    _both_phases(launch, job, first, rows, step, overlap, step if number is None else number)


def build_step(job: Job, rows: int) -> None:
    """Compile and load the kernels of train_step for this many rows, and run nothing.

    If a kernel cannot be built, it raises what train_step raises, before any step has changed anything.
    """
    _both_phases(build, job, 0, rows, 0, False, 0)


def _both_phases(
    run: Callable[..., None], job: Job, first: int, rows: int, step: int, overlap: bool, number: int
) -> None:
    """Launch or build the kernels of both phases."""
    x, order, target, parameters, network, coefficients, losses, ws, scale = job
    tiles, weight_tiles, rows_options, weights_options = _plan(
        network, rows, arithmetic(ws.grads[0].dtype), overlap
    )
    memory = ws.hidden, ws.grads, ws.partials, ws.wrong
    weights, biases = multiplied(parameters), parameters.biases
    args: tuple[Any, ...] = first, rows, tiles, number, x, order, target, weights, biases, *memory, scale
    run(_step_rows_kernel, (tiles,), x, args, rows_options)
    args = first, rows, tiles, step, x, order, tuple(parameters), *memory, coefficients, losses, scale
    run(_step_weights_kernel, (weight_tiles,), x, args, weights_options)
