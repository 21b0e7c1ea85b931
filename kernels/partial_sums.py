"""Second stage of every sum over rows: add float32 partial sums in a fixed order, round once.

A launcher that sums over rows in several parts leaves the parts in a list, and ``add_up`` adds those of a
whole backward in one launch.
"""

import torch
import triton
import triton.language as tl

from .launch import COMPILE_OPTIONS, launch
from .tiles import cdiv

# Partial sums (parts, ...) in float32, and the tensor (...) that is to hold their sum; all contiguous.
Sums = list[tuple[torch.Tensor, torch.Tensor]]

MOST_AT_ONCE = 32  # sums in one launch: each has its own arguments, and a kernel takes 4 KB of them


def parts_of(out: torch.Tensor, parts: int, sums: Sums) -> torch.Tensor:
    """Where a kernel stores the ``parts`` of out: out itself if there is one, else float32 for ``add_up``."""
    if parts == 1:
        return out
    partials = out.new_empty(parts, *out.shape, dtype=torch.float32)
    sums.append((partials, out))
    return partials


@triton.jit
def _add_up_kernel(
    partials_ptrs,  # of each sum: (parts, size) float32, contiguous
    out_ptrs,  # (size,), contiguous
    odd_parts,  # twice the number of parts, plus 1
    sizes,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    partials_ptr, out_ptr, odd, size, begin = partials_ptrs[0], out_ptrs[0], odd_parts[0], sizes[0], 0
    blocks = 0
    for i in tl.static_range(1, len(sizes)):
        blocks += tl.cdiv(sizes[i - 1], BLOCK)
        here = block >= blocks
        partials_ptr = tl.where(here, partials_ptrs[i], partials_ptr)
        out_ptr = tl.where(here, out_ptrs[i], out_ptr)
        odd = tl.where(here, odd_parts[i], odd)
        size = tl.where(here, sizes[i], size)
        begin = tl.where(here, blocks, begin)
    count = odd // 2
    offs = (block - begin).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = offs < size
    totals = tl.zeros((BLOCK_P, BLOCK), dtype=tl.float32)
    # BLOCK_P independent loads at a time: one after the other would cost a memory latency each.
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
    """``out = partials.sum(0)`` for each of ``sums``, whose outs are of one dtype; in one launch."""
    for first in range(0, len(sums), MOST_AT_ONCE):
        partials, outs = zip(*sums[first : first + MOST_AT_ONCE], strict=True)
        # Triton compiles anew where an integer in a tuple becomes a multiple of 16; the number of parts
        # follows from the batch, whose size often changes, so it is given as an odd number.
        most = max(p.shape[0] for p in partials)
        odd_parts = tuple(2 * p.shape[0] + 1 for p in partials)
        sizes = tuple(out.numel() for out in outs)
        block_p = 8 if most <= 8 else 32 if most <= 512 else 256
        block = 2048 // block_p
        grid = (sum(cdiv(size, block) for size in sizes),)
        options = COMPILE_OPTIONS | {"BLOCK_P": block_p, "BLOCK": block, "num_warps": 4}
        launch(_add_up_kernel, grid, outs[0], (partials, outs, odd_parts, sizes), options)
