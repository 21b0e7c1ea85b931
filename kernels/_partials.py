"""Second stage of every sum over rows: add float32 partial sums in a fixed order, round once."""

import torch
import triton
import triton.language as tl

from ._launch import launch
from ._tiles import cdiv


@triton.jit(do_not_specialize=["parts"])
def _sum_partials_kernel(
    partials_ptr,  # (parts, size) float32, contiguous
    out_ptr,  # (size,), contiguous
    parts,
    size,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = offs < size
    totals = tl.zeros((BLOCK_P, BLOCK), dtype=tl.float32)
    # BLOCK_P independent loads at a time: one after the other would cost a memory latency each.
    for first in range(0, parts, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        totals += tl.load(
            partials_ptr + p.to(tl.int64)[:, None] * size + offs[None, :],
            mask=(p < parts)[:, None] & valid[None, :],
            other=0.0,
        )
    total = tl.sum(totals, axis=0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=valid)


def sum_partials(partials: torch.Tensor, out: torch.Tensor) -> None:
    """``out = partials.sum(0)``; partials is float32 with one dimension more than out, both contiguous."""
    parts = partials.shape[0]
    size = out.numel()
    block_p = min(32, triton.next_power_of_2(parts))
    block = 2048 // block_p
    launch(
        _sum_partials_kernel, (cdiv(size, block),), out,
        partials, out, parts, size, BLOCK_P=block_p, BLOCK=block, num_warps=4,
    )  # fmt: skip
