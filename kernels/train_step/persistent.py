"""Many training steps in one cooperative launch, the persistent form: no launch between phases or steps.

It computes what step.train_step computes for one batch after the other. It has never run on a GPU.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..launch import arithmetic, device_limits, interpreting, launch
from ..tiles import cdiv
from .optimizers import COEFFICIENTS
from .rows import rows_of_step, unknown_zero
from .step import Job, RowsTile, WeightsTile, constants, count_weight_tiles, multiplied
from .weights import weights_of_step

# Both phases have the same number of warps. There are too few registers for IEEE float32.
PERSISTENT_TILES: dict[str, tuple[RowsTile, WeightsTile]] = {
    "half": (RowsTile(16, 32, 8, 3), WeightsTile(32, 64, 32, 8, 3)),
    "tf32": (RowsTile(16, 16, 8, 3), WeightsTile(32, 64, 32, 8, 3)),
}


def why_not_persistent(widths: Sequence[int], dtype: torch.dtype) -> str | None:
    """None if train_steps supports what train_step supports, else the reason: it has fewer registers."""
    if arithmetic(dtype) not in PERSISTENT_TILES:
        return "the persistent form computes in TF32, float16 or bfloat16, not in IEEE float32"
    if len(widths) > 5:
        return f"there are {len(widths) - 1} layers, and the persistent form supports at most 4"
    if any(width % 16 for width in widths[:-1]):
        return "the persistent form supports only inputs and hidden layers of a multiple of 16"
    return None


@triton.jit
def _wait_for_all(arrived_ptr, goal):
    """A barrier of all programs: each of them then sees what any of them stored before it.

    goal: how many arrivals have been counted once all programs have arrived. Triton compiles the polls, which
    add 0 and only acquire, to loads.
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
    x_ptr, index_ptr, target_ptr, weights, parameters, hidden, grads, partials_ptr, wrong_ptr,
    coefficients_ptr, losses_ptr, scale,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, LOSS: tl.constexpr,
    OPTIMIZER: tl.constexpr, NESTEROV: tl.constexpr,
    ROWS_BLOCK_M: tl.constexpr, ROWS_BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Both phases of every step, with a barrier after each phase. All programs must run at the same time."""
    programs = tl.num_programs(0)
    goal = 0
    for step in tl.range(0, steps, disable_licm=True):
        here = tl.minimum(batch, rows - step * batch)
        start = first + step * batch
        tiles = tl.cdiv(here, ROWS_BLOCK_M)
        for tile in tl.range(tl.program_id(0), tiles, programs, disable_licm=True):
            rows_of_step(
                tile, tiles, here, (x_ptr, index_ptr, start, scale), target_ptr, weights, parameters[1],
                (hidden, grads), partials_ptr, step, wrong_ptr, unknown_zero(step),
                WIDTHS, BLOCKS, LOSS, ROWS_BLOCK_M, ROWS_BLOCK_K, INPUT_PRECISION,
            )  # fmt: skip
        goal += programs
        _wait_for_all(arrived_ptr, goal)
        for tile in tl.range(tl.program_id(0), weight_tiles, programs, disable_licm=True):
            weights_of_step(
                tile, tiles, here, (x_ptr, index_ptr, start, scale), parameters, (hidden, grads),
                partials_ptr, wrong_ptr, coefficients_ptr + step * 2 * (len(WIDTHS) - 1) * COEFFICIENTS,
                losses_ptr + step,
                WIDTHS, BLOCKS, LOSS, OPTIMIZER, NESTEROV, BLOCK_N, BLOCK_K, BLOCK_M, INPUT_PRECISION,
            )  # fmt: skip
        goal += programs
        _wait_for_all(arrived_ptr, goal)


def train_steps(job: Job, first: int, rows: int, batch: int) -> None:
    """Do a step for each ``batch`` of ``rows`` rows, the last on the rows that are left, in one launch.

    It does steps 0, 1, ... of the job. The barrier's 32-bit counter is enough for a million of them.
    """
    x, order, target, parameters, network, coefficients, losses, ws, scale = job
    kind = arithmetic(ws.grads[0].dtype)
    rows_tile, weights_tile = PERSISTENT_TILES[kind]
    weight_tiles = count_weight_tiles(network.widths, weights_tile)
    # Programs wait for each other, so all must run at the same time: one on each SM. The interpreter runs
    # them one after the other.
    limit = 1 if interpreting() else device_limits(x.device.index).num_sms
    programs = min(limit, max(weight_tiles, cdiv(min(batch, rows), rows_tile.BLOCK_M)))
    options = constants(network, kind) | weights_tile._asdict()
    options |= {"ROWS_BLOCK_M": rows_tile.BLOCK_M, "ROWS_BLOCK_K": rows_tile.BLOCK_K}
    options |= {"OPTIMIZER": network.optimizer, "NESTEROV": network.nesterov, "launch_cooperative_grid": True}
    ws.arrived.zero_()
    args = (
        first, rows, batch, cdiv(rows, batch), weight_tiles, ws.arrived, x, order, target,
        multiplied(parameters), tuple(parameters), ws.hidden, ws.grads, ws.partials, ws.wrong, coefficients,
        losses, scale,
    )  # fmt: skip
    launch(_steps_kernel, (programs,), x, args, options)
