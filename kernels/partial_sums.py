"""Second stage of every sum over rows: add float32 partial sums in a fixed order and round once.

A launcher that sums over rows in several parts appends the parts to a list, ``Sums``, and ``add_up`` adds
those of a whole backward pass in one launch: ``out = partials.sum(0)`` for each.
"""

import torch
import triton
import triton.language as tl

from .gemm import select
from .launch import COMPILE_OPTIONS, launch
from .tiles import cdiv

# Partial sums (parts, ...) in float32, and the tensor (...) for their sum; all contiguous.
Sums = list[tuple[torch.Tensor, torch.Tensor]]

MOST_AT_ONCE = 32  # sums in one launch: each has its own arguments, of which a kernel may have 4 KB


def parts_of(out: torch.Tensor, parts: int, sums: Sums) -> torch.Tensor:
    """Where a kernel stores the parts of a sum: a single part in out, more in memory for ``add_up``."""
    if parts == 1:
        return out
    partials = out.new_empty(parts, *out.shape, dtype=torch.float32)
    sums.append((partials, out))
    return partials


@triton.jit
def _add_up_kernel(
    partials_ptrs,  # of each sum: (parts, size) float32, contiguous
    out_ptrs,  # (size,), contiguous
    odd_parts,  # 2 * parts + 1, see add_up
    sizes,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    sums = (partials_ptrs, out_ptrs, odd_parts, sizes)
    of_block, begin, blocks = [column[0] for column in sums], 0, 0
    for i in tl.static_range(1, len(sizes)):
        blocks += tl.cdiv(sizes[i - 1], BLOCK)
        here = block >= blocks
        of_block = select(here, [column[i] for column in sums], of_block)
        begin = tl.where(here, blocks, begin)
    partials_ptr, out_ptr, odd, size = of_block
    count = odd // 2
    offs = (block - begin).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = offs < size
    totals = tl.zeros((BLOCK_P, BLOCK), dtype=tl.float32)
    # BLOCK_P independent loads at a time: loading part by part would wait for memory each time.
    for first in range(0, count, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        totals += tl.load(
            partials_ptr + p.to(tl.int64)[:, None] * size + offs[None, :],
            mask=(p < count)[:, None] & valid[None, :],
            other=0.0,
        )
    total = tl.sum(totals, axis=0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=valid)


def add_up(sums: Sums) -> None:
    """Compute ``out = partials.sum(0)`` for each of ``sums``. All outs have the same dtype."""
    for first in range(0, len(sums), MOST_AT_ONCE):
        partials, outs = zip(*sums[first : first + MOST_AT_ONCE], strict=True)
        # Triton compiles again when an integer in a tuple becomes a multiple of 16. The number of parts
        # depends on the batch size, which often changes, so it is passed as an odd number, 2 * parts + 1.
        most = max(p.shape[0] for p in partials)
        odd_parts = tuple(2 * p.shape[0] + 1 for p in partials)
        sizes = tuple(out.numel() for out in outs)
        block_p = 8 if most <= 8 else 32 if most <= 512 else 256
        block = 2048 // block_p
        grid = (sum(cdiv(size, block) for size in sizes),)
        options = COMPILE_OPTIONS | {"BLOCK_P": block_p, "BLOCK": block, "num_warps": 4}
        launch(_add_up_kernel, grid, outs[0], (partials, outs, odd_parts, sizes), options)
