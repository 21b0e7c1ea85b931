"""Gradient of the last ReLU, and the bias gradient of the last layer, in one pass over the rows.

grad_z    = grad_output where y > 0, else 0
grad_bias = grad_z.sum(0)
"""

import functools

import torch
import triton
import triton.language as tl

from ..launch import COMPILE_OPTIONS, PLANS, Setting, launch
from ..partial_sums import Sums, parts_of
from ..tiles import cdiv

SUM_M: tl.constexpr = tl.constexpr(32)  # rows at a time
SUM_N: tl.constexpr = tl.constexpr(128)  # columns of a program
# With 4 warps, the 64-bit offsets of unaligned strides need more registers than a thread has.
NUM_WARPS = 8
_OPTIONS = COMPILE_OPTIONS | {"num_warps": NUM_WARPS}


@triton.jit(do_not_specialize=["M", "rows_per_chunk"])
def relu_backward_kernel(
    grad_output_ptr,  # (M, N)
    y_ptr,  # (M, N), or None: no ReLU, and nothing is stored to grad_z
    grad_z_ptr,  # (M, N), contiguous, or None
    partials_ptr,  # (chunks, N), contiguous, or None: no bias gradient
    M,
    N,
    rows_per_chunk,
    stride_gm,
    stride_gn,
    stride_ym,
    stride_yn,
    block_n=None,  # which SUM_N columns; None: each program of the launch has its own
    chunk=None,  # which rows_per_chunk rows, likewise
):
    if block_n is None:
        block_n, chunk = tl.program_id(0), tl.program_id(1)
    offs_n = block_n * SUM_N + tl.arange(0, SUM_N)
    valid_n = offs_n < N
    n = offs_n.to(tl.int64)
    row_end = tl.minimum((chunk + 1) * rows_per_chunk, M)
    totals = tl.zeros((SUM_M, SUM_N), dtype=tl.float32)
    for row in range(chunk * rows_per_chunk, row_end, SUM_M):
        offs_m = row + tl.arange(0, SUM_M)
        m = offs_m.to(tl.int64)
        mask = (offs_m < row_end)[:, None] & valid_n[None, :]
        grad = tl.load(
            grad_output_ptr + m[:, None] * stride_gm + n[None, :] * stride_gn, mask=mask, other=0.0
        ).to(tl.float32)
        if y_ptr is not None:
            y = tl.load(y_ptr + m[:, None] * stride_ym + n[None, :] * stride_yn, mask=mask, other=0.0)
            # As in torch, the gradient passes unless y <= 0, so also where y is NaN.
            grad = tl.where(y.to(tl.float32) <= 0.0, 0.0, grad)
            grad_z_tile = grad_z_ptr + m[:, None] * N + n[None, :]
            tl.store(grad_z_tile, grad.to(grad_z_ptr.dtype.element_ty), mask=mask)
        if partials_ptr is not None:
            totals += grad
    if partials_ptr is not None:
        total = tl.sum(totals, axis=0).to(partials_ptr.dtype.element_ty)
        tl.store(partials_ptr + tl.cast(chunk, tl.int64) * N + n, total, mask=valid_n)


@functools.lru_cache(PLANS)
def chunks_of(M: int, N: int, num_sms: int) -> tuple[int, int, int]:
    """``(chunks, rows_per_chunk, blocks of columns)``: about four programs an SM, to hide memory latency."""
    blocks = cdiv(N, SUM_N.value)
    wanted = max(1, min(cdiv(4 * num_sms, blocks), cdiv(M, SUM_M.value)))
    rows_per_chunk = cdiv(cdiv(M, wanted), SUM_M.value) * SUM_M.value
    return cdiv(M, max(1, rows_per_chunk)), rows_per_chunk, blocks


def relu_backward(
    grad_output: torch.Tensor,
    y: torch.Tensor | None,
    need_grad_bias: bool,
    setting: Setting,
    sums: Sums,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(grad_z (M, N), grad_bias (N,) or None)`` from grad_output (M, N) and the output y, of any strides.

    grad_z is new and contiguous, and neither argument is written to. With ``in_place``, grad_output must be
    contiguous and becomes grad_z. If y is None there was no ReLU, and grad_z is grad_output itself. grad_bias
    is summed in float32, in a fixed order, rounded once, and complete once ``add_up(sums)`` has run.
    """
    M, N = grad_output.shape
    grad_z = grad_output if y is None or in_place else grad_output.new_empty(M, N)
    grad_bias = grad_output.new_empty(N) if need_grad_bias else None
    if N == 0:
        return grad_z, grad_bias
    chunks, rows_per_chunk, blocks = chunks_of(M, N, setting.device.num_sms)
    partials = None if grad_bias is None else parts_of(grad_bias, chunks, sums)
    if M > 0:
        strides = *grad_output.stride(), *((0, 0) if y is None else y.stride())
        target = None if y is None else grad_z
        args = (grad_output, y, target, partials, M, N, rows_per_chunk, *strides)
        launch(relu_backward_kernel, (blocks, chunks), grad_output, args, _OPTIONS)
    return grad_z, grad_bias
