"""A whole training step of an MLP in two launches, or many steps in one: rows, then weights.

For chains of Linear and ReLU of widths up to 256, cross-entropy or squared error, SGD, Adam and AdamW, with
parameters and the optimizer's state in float32 and products in float32, TF32, float16 or bfloat16. It knows
nothing of modules or optimizers, allocates nothing and waits for nothing, so a CUDA graph can hold it.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import COMPILE_OPTIONS, arithmetic, build, device_limits, interpreting, launch
from ..tiles import cdiv
from ..train_step.rows import NONE_WRONG, rows_of_step
from ..train_step.weights import NUMBERS, weights_of_step

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


# The first for few rows, where more programs are at work; the last for many, where each reads the weights
# for more rows. 64 rows would be wgmma's on sm_90, which ptxas then serialises for some networks. Every entry
# is compiled for sm_80, sm_90 and sm_100 by tests/kernels/test_codegen.py. None has been timed yet.
ROWS_TILES: dict[str, tuple[RowsTile, ...]] = {
    "half": (RowsTile(16, 64, 8, 3), RowsTile(32, 32, 8, 4)),
    "tf32": (RowsTile(16, 32, 8, 3), RowsTile(32, 32, 8, 3)),
    "ieee": (RowsTile(16, 16, 8, 3),),
}
MANY_ROWS = 2048
MOST_ROWS = 8192  # of a step: a program of the second phase reads them one after the other

# 32 outputs to a tile: few enough that an MNIST network has a tile for each multiprocessor.
WEIGHTS_TILES: dict[str, WeightsTile] = {
    "half": WeightsTile(32, 64, 64, 4, 3),
    "tf32": WeightsTile(32, 64, 32, 4, 3),
    "ieee": WeightsTile(32, 64, 16, 4, 3),
}
# The persistent form has one number of warps for both phases, and too few registers for IEEE float32.
PERSISTENT_TILES: dict[str, tuple[RowsTile, WeightsTile]] = {
    "half": (RowsTile(16, 32, 8, 3), WeightsTile(32, 64, 32, 8, 3)),
    "tf32": (RowsTile(16, 16, 8, 3), WeightsTile(32, 64, 32, 8, 3)),
}


class Parameters(NamedTuple):
    """Of each layer, and with it what the optimizer keeps; all contiguous float32 but the copies."""

    weights: tuple[torch.Tensor, ...]  # (N, K)
    biases: tuple[torch.Tensor, ...]  # (N,)
    copies: tuple[torch.Tensor | None, ...]  # of the weights, in the dtype of products; None for float32
    weight_moments: tuple[torch.Tensor | None, ...]  # momentum_buffer or exp_avg; None without momentum
    bias_moments: tuple[torch.Tensor | None, ...]
    weight_squares: tuple[torch.Tensor | None, ...]  # exp_avg_sq; None for SGD
    bias_squares: tuple[torch.Tensor | None, ...]


class Workspace(NamedTuple):
    """What one phase leaves for the other; the same for every step of a network, batch size and dtype."""

    rows: int  # at most
    copies: tuple[torch.Tensor | None, ...]  # room for the weights in the dtype of products
    hidden: tuple[torch.Tensor, ...]  # of each layer but the last: its outputs
    grads: tuple[torch.Tensor, ...]  # of each layer: the loss's gradient by its product
    partials: torch.Tensor  # sums of each program's rows
    arrived: torch.Tensor  # the grid barrier's counter
    wrong: torch.Tensor  # the record of labels that are no class, see wrong_label


class Network(NamedTuple):
    """What is compiled in."""

    widths: tuple[int, ...]  # of x and of each layer's output
    loss: str  # "cross_entropy" or "mse"
    optimizer: str  # "sgd", "adam" or "adamw"
    nesterov: bool = False


def why_no_step(widths: Sequence[int], rows: int, dtype: torch.dtype) -> str | None:
    """None if there is a two-launch step for these sizes and dtype of products, else the reason.

    widths: x's, then each layer's.
    """
    if len(widths) - 1 > DEEPEST:
        return f"there are {len(widths) - 1} layers, and the two-launch step is made for {DEEPEST} at most"
    if min(widths) < 1:
        return "a layer is empty"
    if max(widths[1:]) > WIDEST:
        return f"a layer has {max(widths[1:])} outputs, and the two-launch step is made for {WIDEST} at most"
    if widths[0] > MOST_INPUTS:
        return f"there are {widths[0]} inputs, and the two-launch step is made for {MOST_INPUTS} at most"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the two-launch step computes in float32, float16 or bfloat16, not in {dtype}"
    if rows < 1:
        return "the batch is empty"
    if rows > MOST_ROWS:
        return f"{rows} rows are more than the {MOST_ROWS} that the two-launch step is made for"
    return None


def why_not_persistent(widths: Sequence[int], dtype: torch.dtype) -> str | None:
    """None if train_steps is right where train_step is, else the reason: it has fewer registers to spare."""
    if arithmetic(dtype) not in PERSISTENT_TILES:
        return "the persistent form computes in TF32, float16 or bfloat16, not in IEEE float32"
    if len(widths) > 5:
        return f"there are {len(widths) - 1} layers, and the persistent form is made for 4 at most"
    if any(width % 16 for width in widths[:-1]):
        return "the persistent form is made for inputs and hidden layers of a multiple of 16"
    return None


def workspace_for(widths: Sequence[int], rows: int, dtype: torch.dtype, device: torch.device) -> Workspace:
    """Memory for steps of at most so many rows with products in ``dtype``."""

    def room(width: int) -> torch.Tensor:
        return torch.empty(rows, block_of(width), dtype=dtype, device=device)

    layers = len(widths) - 1
    half = dtype != torch.float32
    return Workspace(
        rows,
        tuple(
            torch.empty(widths[i + 1], widths[i], dtype=dtype, device=device) if half else None
            for i in range(layers)
        ),
        tuple(room(width) for width in widths[1:-1]),
        tuple(room(width) for width in widths[1:]),
        torch.empty(2 * cdiv(rows, ROWS_TILES["half"][0].BLOCK_M), dtype=torch.float32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.full((1,), NONE_WRONG.value, dtype=torch.int64, device=device),
    )


def wrong_label(record: torch.Tensor) -> tuple[int, int] | None:
    """Of the first step that met a label that is no class, the number and the least such label, or None.

    record: a workspace's ``wrong``, or a copy of it; to read it waits for a GPU. The label is cut to the
    range of 32 bits. From that step on no step updates anything, and losses are NaN, until
    :func:`forget_wrong_label`.
    """
    code = int(record.item())
    return None if code == NONE_WRONG.value else (code >> 32, (code & (2**32 - 1)) - 2**31)


def forget_wrong_label(record: torch.Tensor) -> None:
    """Let steps update again."""
    record.fill_(NONE_WRONG.value)


def block_of(width: int) -> int:
    """The power of two that holds a layer's outputs; 16 is the least that tensor cores multiply."""
    return max(16, 1 << (width - 1).bit_length())


Numbers = tuple[Any, ...]  # eight; instead of a number there may be a float64 tensor, of one for each step


def sgd_numbers(lr: float, momentum: float, dampening: float, weight_decay: float) -> Numbers:
    """What SGD's update multiplies by."""
    return (lr, weight_decay, momentum, 1.0 - dampening, 0.0, 0.0, 0.0, 0.0)


def adam_numbers(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool, step: Any
) -> Numbers:
    """The same for Adam's update number ``step``, from 1, or a tensor of such; decoupled: AdamW's."""
    beta1, beta2 = betas
    correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
    decay = lr * weight_decay if decoupled else weight_decay
    return (lr / correction1, decay, 1.0 - beta1, beta2, 1.0 - beta2, correction2**-0.5, eps, 0.0)


@triton.jit
def unknown_zero(n):
    """0 to add to offsets and bounds, which the compiler takes for a multiple of 16 that changes with n.

    Layers have constant sizes. Knowing them, the compiler unrolls their loops, and computes every layer's
    addresses once for all steps: far more than there are registers.
    """
    return n * tl.program_id(1) * 16


@triton.jit(do_not_specialize=["first", "rows", "tiles", "number"])
def _step_rows_kernel(
    first, rows, tiles, number, x_ptr, index_ptr, target_ptr, weights, biases, hidden, grads, partials_ptr,
    wrong_ptr, scale,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, LOSS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, UPCAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    rows_of_step(
        tl.program_id(0), tiles, first, rows, x_ptr, index_ptr, target_ptr, weights, biases, hidden, grads,
        partials_ptr, number, wrong_ptr, scale, unknown_zero(1),
        WIDTHS, BLOCKS, LOSS, BLOCK_M, BLOCK_K, INPUT_PRECISION, UPCAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "rows", "tiles", "step"])
def _step_weights_kernel(
    first, rows, tiles, step, x_ptr, index_ptr, parameters, hidden, grads, partials_ptr, wrong_ptr,
    numbers_ptr, losses_ptr, scale,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, LOSS: tl.constexpr,
    OPTIMIZER: tl.constexpr, NESTEROV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, UPCAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    weights_of_step(
        tl.program_id(0), tiles, first, rows, x_ptr, index_ptr, parameters, hidden, grads, partials_ptr,
        wrong_ptr, numbers_ptr + step * 2 * (len(WIDTHS) - 1) * NUMBERS, losses_ptr + step, scale,
        WIDTHS, BLOCKS, LOSS, OPTIMIZER, NESTEROV, BLOCK_N, BLOCK_K, BLOCK_M, INPUT_PRECISION, UPCAST,
    )  # fmt: skip


@triton.jit
def _wait_for_all(arrived_ptr, goal):
    """A grid barrier: what any program stored before it is seen by every program after it.

    The polls are loads: Triton makes them of an atomic addition of nothing that only acquires.
    """
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
    arrived = tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu")
    while arrived < goal:
        arrived = tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit(do_not_specialize=["first", "rows", "batch", "steps", "weight_tiles"])
def _steps_kernel(
    first, rows, batch, steps, weight_tiles, arrived_ptr,
    x_ptr, index_ptr, target_ptr, weights, parameters, hidden, grads, partials_ptr, wrong_ptr, numbers_ptr,
    losses_ptr, scale,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, LOSS: tl.constexpr,
    OPTIMIZER: tl.constexpr, NESTEROV: tl.constexpr,
    ROWS_BLOCK_M: tl.constexpr, ROWS_BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Both phases of every step, and after each a barrier of all programs, which must run together."""
    programs = tl.num_programs(0)
    goal = 0
    for step in tl.range(0, steps, disable_licm=True):
        here = tl.minimum(batch, rows - step * batch)
        start = first + step * batch
        tiles = tl.cdiv(here, ROWS_BLOCK_M)
        for tile in tl.range(tl.program_id(0), tiles, programs, disable_licm=True):
            rows_of_step(
                tile, tiles, start, here, x_ptr, index_ptr, target_ptr, weights, parameters[1], hidden, grads,
                partials_ptr, step, wrong_ptr, scale, unknown_zero(step),
                WIDTHS, BLOCKS, LOSS, ROWS_BLOCK_M, ROWS_BLOCK_K, INPUT_PRECISION, UPCAST,
            )  # fmt: skip
        goal += programs
        _wait_for_all(arrived_ptr, goal)
        for tile in tl.range(tl.program_id(0), weight_tiles, programs, disable_licm=True):
            weights_of_step(
                tile, tiles, start, here, x_ptr, index_ptr, parameters, hidden, grads, partials_ptr,
                wrong_ptr, numbers_ptr + step * 2 * (len(WIDTHS) - 1) * NUMBERS, losses_ptr + step, scale,
                WIDTHS, BLOCKS, LOSS, OPTIMIZER, NESTEROV, BLOCK_N, BLOCK_K, BLOCK_M, INPUT_PRECISION, UPCAST,
            )  # fmt: skip
        goal += programs
        _wait_for_all(arrived_ptr, goal)


class _Plan(NamedTuple):
    tiles: int  # of rows
    weight_tiles: int
    rows: dict[str, Any]  # options of the launches
    weights: dict[str, Any]


def _arithmetic_options(kind: str, upcast: bool) -> dict[str, Any]:
    precision = "tf32" if kind == "tf32" else "ieee"
    return COMPILE_OPTIONS | {"INPUT_PRECISION": precision, "UPCAST": upcast}


@functools.lru_cache(256)
def _plan(network: Network, rows: int, kind: str, upcast: bool, overlap: bool) -> _Plan:
    rows_tile = ROWS_TILES[kind][-1 if rows > MANY_ROWS else 0]
    weights_tile = WEIGHTS_TILES[kind]
    shared = _arithmetic_options(kind, upcast) | _sizes(network) | {"OVERLAP": overlap}
    if overlap:
        shared["launch_pdl"] = True
    updates = {"OPTIMIZER": network.optimizer, "NESTEROV": network.nesterov}
    return _Plan(
        cdiv(rows, rows_tile.BLOCK_M),
        count_weight_tiles(network.widths, weights_tile),
        shared | rows_tile._asdict(),
        shared | updates | weights_tile._asdict(),
    )


def _sizes(network: Network) -> dict[str, Any]:
    blocks = tuple(block_of(width) for width in network.widths)
    return {"WIDTHS": network.widths, "BLOCKS": blocks, "LOSS": network.loss}


def count_weight_tiles(widths: Sequence[int], tile: WeightsTile) -> int:
    return sum(
        cdiv(widths[i + 1], tile.BLOCK_N) * cdiv(widths[i], tile.BLOCK_K) for i in range(len(widths) - 1)
    )


def _setting(workspace: Workspace) -> tuple[str, bool]:
    dtype = workspace.grads[0].dtype
    return arithmetic(dtype), dtype == torch.bfloat16 and interpreting()


def _multiplied(parameters: Parameters) -> tuple[torch.Tensor, ...]:
    """The weights that the products read."""
    return tuple(
        weight if copy is None else copy
        for weight, copy in zip(parameters.weights, parameters.copies, strict=True)
    )


def refresh_copies(parameters: Parameters) -> None:
    """Round the weights into their copies: whoever else may have changed them has not."""
    copies = [copy for copy in parameters.copies if copy is not None]  # all or none
    if copies:
        torch._foreach_copy_(copies, parameters.weights)


def train_step(
    x: torch.Tensor,
    index: torch.Tensor | None,
    first: int,
    rows: int,
    target: torch.Tensor,
    parameters: Parameters,
    network: Network,
    numbers: torch.Tensor,
    losses: torch.Tensor,
    step: int,
    workspace: Workspace,
    scale: float = 1.0,
    overlap: bool = False,
    number: int | None = None,
) -> None:
    """One step on ``rows`` rows, 1 or more: ``losses[step]`` is their mean loss before the update.

    x ``(n, widths[0])``, floats or integers, which are multiplied by scale; target: class indices ``(n,)`` of
    an integer dtype, of which -100 is left out and one that is no class stops the training, see wrong_label
    (number: how this step is called there; without one, step), or for "mse" floats
    ``(n, widths[-1])``; both contiguous. The rows are ``index[first : first + rows]``, or without an
    index these of x itself. numbers ``(steps, 2 * layers, 8)`` float32: a row for each parameter, weight,
    bias, weight, ..., from sgd_numbers or adam_numbers, of which ``numbers[step]`` is used. Parameters and
    state are updated in place; copies must be the weights rounded, and stay so.

    overlap: with programmatic dependent launch, sm_90 and newer. It has never run on a GPU.
    """
    arguments = x, index, first, rows, target, parameters, network, numbers, losses, step, workspace
    for one in _launches(*arguments, scale, overlap, step if number is None else number):
        launch(*one)


def build_step(
    x: torch.Tensor,
    index: torch.Tensor | None,
    rows: int,
    target: torch.Tensor,
    parameters: Parameters,
    network: Network,
    numbers: torch.Tensor,
    losses: torch.Tensor,
    workspace: Workspace,
    scale: float = 1.0,
) -> None:
    """Compile and load what train_step launches on so many rows, and run nothing.

    Raises what train_step raises where a kernel cannot be built, before any step has changed anything.
    """
    arguments = x, index, 0, rows, target, parameters, network, numbers, losses, 0, workspace
    for one in _launches(*arguments, scale, False, 0):
        build(*one)


_Launch = tuple[Any, tuple[int, ...], torch.Tensor, tuple[Any, ...], dict[str, Any]]  # what launch takes


def _launches(
    x: torch.Tensor,
    index: torch.Tensor | None,
    first: int,
    rows: int,
    target: torch.Tensor,
    parameters: Parameters,
    network: Network,
    numbers: torch.Tensor,
    losses: torch.Tensor,
    step: int,
    workspace: Workspace,
    scale: float,
    overlap: bool,
    number: int,
) -> tuple[_Launch, _Launch]:
    """The two launches of train_step."""
    plan = _plan(network, rows, *_setting(workspace), overlap)
    ws = workspace
    for_rows = (
        first, rows, plan.tiles, number, x, index, target, _multiplied(parameters), parameters.biases,
        ws.hidden, ws.grads, ws.partials, ws.wrong, scale,
    )  # fmt: skip
    for_weights = (
        first, rows, plan.tiles, step, x, index, tuple(parameters), ws.hidden, ws.grads, ws.partials,
        ws.wrong, numbers, losses, scale,
    )  # fmt: skip
    return (
        (_step_rows_kernel, (plan.tiles,), x, for_rows, plan.rows),
        (_step_weights_kernel, (plan.weight_tiles,), x, for_weights, plan.weights),
    )


def train_steps(
    x: torch.Tensor,
    index: torch.Tensor | None,
    first: int,
    rows: int,
    batch: int,
    target: torch.Tensor,
    parameters: Parameters,
    network: Network,
    numbers: torch.Tensor,
    losses: torch.Tensor,
    workspace: Workspace,
    scale: float = 1.0,
) -> None:
    """A step for each ``batch`` of ``rows`` rows, the last on what is left, in one cooperative launch.

    As train_step step by step, ``losses`` from 0 on. The barriers count programs in 32 bits: up to a million
    steps. It has never run on a GPU.
    """
    kind, upcast = _setting(workspace)
    rows_tile, weights_tile = PERSISTENT_TILES[kind]
    weight_tiles = count_weight_tiles(network.widths, weights_tile)
    # Programs wait for each other: no more than run together, one on each multiprocessor. In the interpreter
    # one runs after the other.
    limit = 1 if interpreting() else device_limits(x.device.index).num_sms
    programs = min(limit, max(weight_tiles, cdiv(min(batch, rows), rows_tile.BLOCK_M)))
    options = _arithmetic_options(kind, upcast) | _sizes(network) | weights_tile._asdict()
    options |= {"ROWS_BLOCK_M": rows_tile.BLOCK_M, "ROWS_BLOCK_K": rows_tile.BLOCK_K}
    options |= {"OPTIMIZER": network.optimizer, "NESTEROV": network.nesterov, "launch_cooperative_grid": True}
    workspace.arrived.zero_()
    args = (
        first, rows, batch, cdiv(rows, batch), weight_tiles, workspace.arrived, x, index, target,
        _multiplied(parameters), tuple(parameters), workspace.hidden, workspace.grads, workspace.partials,
        workspace.wrong, numbers, losses, scale,
    )  # fmt: skip
    launch(_steps_kernel, (programs,), x, args, options)
