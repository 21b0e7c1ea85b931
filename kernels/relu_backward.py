"""ReLU's gradient and the bias gradient in one pass over the rows: ``grad_z = grad_output * (y > 0)``."""

import torch
import triton
import triton.language as tl

from ._launch import launch, limits_of
from ._partials import sum_partials
from ._tiles import cdiv

BLOCK_M = 32
BLOCK_N = 128


@triton.jit(do_not_specialize=["M", "rows_per_chunk"])
def _relu_backward_kernel(
    grad_output_ptr,  # (M, N)
    y_ptr,  # (M, N), or None: no ReLU, and nothing is stored to grad_z
    grad_z_ptr,  # (M, N), contiguous, or None
    partials_ptr,  # (chunks, N) float32, contiguous, or None: no bias gradient
    M,
    N,
    rows_per_chunk,
    stride_gm,
    stride_gn,
    stride_ym,
    stride_yn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_n = offs_n < N
    n = offs_n.to(tl.int64)
    chunk = tl.program_id(1)
    row_end = tl.minimum((chunk + 1) * rows_per_chunk, M)
    totals = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row in range(chunk * rows_per_chunk, row_end, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        m = offs_m.to(tl.int64)
        mask = (offs_m < row_end)[:, None] & valid_n[None, :]
        grad = tl.load(
            grad_output_ptr + m[:, None] * stride_gm + n[None, :] * stride_gn, mask=mask, other=0.0
        ).to(tl.float32)
        if y_ptr is not None:
            y = tl.load(y_ptr + m[:, None] * stride_ym + n[None, :] * stride_yn, mask=mask, other=0.0)
            # torch's rule: 0 where y <= 0, passed everywhere else, so also where y is NaN.
            grad = tl.where(y.to(tl.float32) <= 0.0, 0.0, grad)
            grad_z_tile = grad_z_ptr + m[:, None] * N + n[None, :]
            tl.store(grad_z_tile, grad.to(grad_z_ptr.dtype.element_ty), mask=mask)
        if partials_ptr is not None:
            totals += grad
    if partials_ptr is not None:
        tl.store(partials_ptr + chunk.to(tl.int64) * N + n, tl.sum(totals, axis=0), mask=valid_n)


def _one_pass(
    grad_output: torch.Tensor, y: torch.Tensor | None, need_grad_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    M, N = grad_output.shape
    grad_z = grad_output if y is None else grad_output.new_empty(M, N)
    grad_b = grad_output.new_empty(N) if need_grad_bias else None
    if N == 0:
        return grad_z, grad_b
    # About four programs a multiprocessor, as many as hide the latency of memory.
    blocks_n = cdiv(N, BLOCK_N)
    chunks = max(1, min(cdiv(4 * limits_of(grad_output).num_sms, blocks_n), cdiv(M, BLOCK_M)))
    rows_per_chunk = cdiv(cdiv(M, chunks), BLOCK_M) * BLOCK_M
    partials = grad_output.new_empty(chunks, N, dtype=torch.float32) if need_grad_bias else None
    launch(
        _relu_backward_kernel, (blocks_n, chunks), grad_output,
        grad_output, y, None if y is None else grad_z, partials, M, N, rows_per_chunk,
        grad_output.stride(0), grad_output.stride(1),
        0 if y is None else y.stride(0), 0 if y is None else y.stride(1),
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4,
    )  # fmt: skip
    if partials is not None and grad_b is not None:
        sum_partials(partials, grad_b)
    return grad_z, grad_b


def relu_backward(
    grad_output: torch.Tensor, y: torch.Tensor, need_grad_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(grad_z (M, N), grad_bias (N,) or None)`` from grad_output (M, N) of any strides and the output y.

    grad_z is new and contiguous; neither argument is written to. grad_bias is grad_z summed over the rows
    in float32, in a fixed order, rounded once.
    """
    return _one_pass(grad_output, y, need_grad_bias)


def grad_bias(grad_z: torch.Tensor) -> torch.Tensor:
    """``grad_z.sum(0)``: ``(N,)``, summed as in relu_backward."""
    grad_b = _one_pass(grad_z, None, True)[1]
    assert grad_b is not None
    return grad_b
