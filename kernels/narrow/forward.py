"""Forward of a whole chain of narrow layers in one launch, and the rule for when that is faster.

    h[0] = x;  h[i + 1] = relu(h[i] @ weight[i].T + bias[i])

Rows are independent of each other, so a program carries a block of rows through all layers, and hidden
activations stay on the chip. Widths and strides are compile-time constants: the kernel is compiled once for
each network, for any number of rows.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..gemm import dot, tile_product, tile_range
from ..launch import PLANS, Setting, is_aligned_tensor, launch, options_for
from ..tiles import ITEMSIZE, block_of, cdiv

MOST_LAYERS = 8
WIDEST = 256
NARROW = 128  # with wider layers, there are no registers left for large blocks of rows
MOST_IN_REGISTERS = 4  # layers: for eight, Triton 3.6 needs more tensor memory than sm_100 has


class Form(NamedTuple):
    """How a program goes through the layers, and how it is compiled."""

    BLOCK_M: int  # rows at a time
    BLOCK_K: int  # of a product's reduction at a time, unless its left operand is in registers
    num_warps: int
    num_stages: int
    STAGED: bool  # activations go from layer to layer through the L2 cache; else they stay in registers


# tests/kernels/test_codegen.py compiles every entry for sm_80, sm_90 and sm_100. None has been timed yet.
FEW_ROWS: dict[str, Form] = {  # at most a block for every SM; also for unaligned operands and wide layers
    "half": Form(16, 64, 8, 2, True),
    "tf32": Form(16, 32, 8, 2, True),
    "ieee": Form(16, 16, 8, 2, True),
}
THROUGH_CACHE: dict[str, Form] = {  # TF32 has no larger form without spills
    "half": Form(64, 64, 8, 2, True),
    "ieee": Form(32, 16, 8, 1, True),
}
# For the forward only, whose hidden activations need not be stored; backward stores every gradient. float32
# does not fit in registers.
IN_REGISTERS = Form(64, 64, 8, 2, False)

# In the time of a saved launch, about 2 us, an SM reads this many bytes of weights from the L2 cache, at 64
# bytes a clock.
BYTES_A_LAUNCH = 2**18


def select_form(
    M: int, widths: Sequence[int], kind: str, aligned: bool, forward: bool, num_sms: int
) -> Form | None:
    """The form for M rows through layers of these widths, or None if the layers are too many or too wide.

    widths: of the first layer's input, then of each layer's output. aligned: all tensors that are read are
    aligned, see is_aligned_tensor.
    """
    if len(widths) - 1 > MOST_LAYERS or max(widths[1:]) > WIDEST or min(widths) < 1:
        return None
    few = cdiv(M, FEW_ROWS[kind].BLOCK_M) <= num_sms
    if few or not aligned or max(widths[1:]) > NARROW or kind not in THROUGH_CACHE:
        return FEW_ROWS[kind]
    if forward and kind == "half" and len(widths) - 1 <= MOST_IN_REGISTERS:
        return IN_REGISTERS
    return THROUGH_CACHE[kind]


def wins(form: Form, M: int, weights: int, launches: int, columns: int, itemsize: int, num_sms: int) -> bool:
    """True if one launch is expected to be faster than one for each layer, by a rule, not by measurement.

    Every block of rows reads all weights (``weights`` elements) from the L2 cache, one after the other. This
    saves ``launches`` launches, and one more read or write of ``columns`` columns of M rows.
    """
    if cdiv(M, form.BLOCK_M) <= num_sms:
        return weights * itemsize <= launches * BYTES_A_LAUNCH
    # Memory is about half as fast as the cache.
    return weights <= 2 * form.BLOCK_M * columns


@triton.jit
def rows_product(
    a,  # (BLOCK_M, PADDED_K): the block of rows in registers, zero past K; or None: it is read from a_ptr
    a_ptr,  # start of the block's first row in A (M, K)
    b_ptr,  # B (K, N)
    offs_m,
    valid_m,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    N,  # columns of B from b_ptr on, of which at most PADDED_N are used
    zero,  # see _narrow_forward_kernel
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """A block of rows of A times all of B, in float32: (BLOCK_M, PADDED_N)."""
    n = tl.arange(0, PADDED_N)
    if a is None:
        product = tile_product(
            a_ptr, b_ptr, offs_m, n, valid_m, n < N, 0, K + zero, stride_am, stride_ak, stride_bk, stride_bn,
            BLOCK_M, PADDED_N, BLOCK_K, INPUT_PRECISION,
        )  # fmt: skip
    else:
        k = tl.arange(0, PADDED_K)
        b = tl.load(
            b_ptr + k[:, None] * stride_bk + n[None, :] * stride_bn,
            mask=(k < K)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        product = dot(a, b, None, INPUT_PRECISION)
    return product


@triton.jit
def store_rows(out_ptr, rows, offs_m, valid_m, N, pitch, PADDED_N: tl.constexpr):
    """Store N columns of a block of rows; out_ptr is where its first row starts."""
    n = tl.arange(0, PADDED_N)
    mask = valid_m[:, None] & (n < N)[None, :]
    tl.store(out_ptr + offs_m[:, None] * pitch + n[None, :], rows, mask=mask)


@triton.jit
def _finished(
    z,
    bias_ptr,
    stride_b,
    y_ptr,  # (rows, N), contiguous, or None
    first_m,  # the row of y where the block starts
    offs_m,
    valid_m,
    N: tl.constexpr,
    PADDED_N: tl.constexpr,
    RELU: tl.constexpr,
    dtype: tl.constexpr,
):
    """``y = relu(z + bias)`` for a block of rows, stored unless y_ptr is None."""
    n = tl.arange(0, PADDED_N)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + n * stride_b, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if RELU:
        # A NaN stays NaN, as in torch.relu; by default, tl.maximum drops it.
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if N < PADDED_N:
        z = tl.where((n < N)[None, :], z, 0.0)  # the next product reads it, and inf * 0 would be NaN
    y = z.to(dtype)
    if y_ptr is not None:
        store_rows(y_ptr + first_m * N, y, offs_m, valid_m, N, N, PADDED_N)
    return y


@triton.jit(do_not_specialize=["M"])
def _narrow_forward_kernel(
    x_ptr,  # (M, K)
    weight_ptrs,  # of each layer: (N, K)
    bias_ptrs,  # (N,) or None
    y_ptrs,  # (M, N), contiguous, for layers from KEEP on; for others (programs * BLOCK_M, N) or None
    M,
    stride_xm,
    stride_xk,
    # Always 0, but the compiler must not know: it would compute the addresses of all layers once, before the
    # loop over blocks of rows, and unroll short reductions. Both spill registers.
    zero,
    WIDTHS: tl.constexpr,  # K of the first layer, then each layer's N
    PADDED: tl.constexpr,  # the same, rounded up to a power of two
    STRIDES: tl.constexpr,  # of each layer: those of weight, and that of bias
    KEEP: tl.constexpr,
    FINAL_RELU: tl.constexpr,
    STAGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    for block in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=1):
        first_m, offs_m, valid_m = tile_range(tl.cast(block, tl.int32), BLOCK_M, M, False)
        origin = block * zero
        own = tl.program_id(0).to(tl.int64) * BLOCK_M
        dtype = x_ptr.dtype.element_ty
        held = None
        for i in tl.static_range(len(WIDTHS) - 1):
            if i == 0:
                h_ptr, stride_hm, stride_hk = x_ptr + first_m * stride_xm, stride_xm, stride_xk
            else:
                tl.debug_barrier()  # makes visible what the other threads of this program stored
                h_ptr = y_ptrs[i - 1] + (first_m if i > KEEP else own) * WIDTHS[i] if STAGED else None
                stride_hm, stride_hk = WIDTHS[i], 1
            z = rows_product(  # h[i] @ weight[i].T
                held, h_ptr, weight_ptrs[i] + origin, offs_m, valid_m,
                stride_hm, stride_hk, STRIDES[i][1], STRIDES[i][0],
                WIDTHS[i + 1], zero, WIDTHS[i], PADDED[i], PADDED[i + 1],
                BLOCK_M, BLOCK_K, INPUT_PRECISION,
            )  # fmt: skip
            y = _finished(  # h[i + 1]
                z, bias_ptrs[i], STRIDES[i][2], y_ptrs[i], first_m if i >= KEEP else own, offs_m, valid_m,
                WIDTHS[i + 1], PADDED[i + 1], FINAL_RELU or i < len(WIDTHS) - 2, dtype,
            )  # fmt: skip
            held = None if STAGED else y
        if STAGED and KEEP > 0:
            tl.debug_barrier()  # the next block overwrites scratch rows that other threads may still read


def options_of(form: Form, widths: tuple[int, ...], setting: Setting) -> dict[str, Any]:
    """The options that forward and backward share."""
    sizes = {"WIDTHS": widths, "PADDED": tuple(map(block_of, widths))}
    return options_for(setting.kind) | form._asdict() | sizes


def programs(form: Form, M: int, num_sms: int) -> int:
    """The size of a persistent grid: 16 warps on each SM, but not more programs than blocks of rows."""
    return min(cdiv(M, form.BLOCK_M), num_sms * (16 // form.num_warps))


@functools.lru_cache(PLANS)
def _plan(
    M: int,
    widths: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    final_relu: bool,
    keep: int,
    aligned: bool,
    setting: Setting,
    form: Form | None,
) -> tuple[int, int, dict[str, Any]] | None:
    """Number of programs, scratch rows and options, or None if one launch for each layer is better."""
    num_sms = setting.device.num_sms
    if form is None:
        form = select_form(M, widths, setting.kind, aligned, True, num_sms)
        hidden = widths[1:-1]
        columns = 2 * sum(hidden) - sum(hidden[keep:])  # written and read; those that are kept only read
        weights = sum(N * K for K, N in itertools.pairwise(widths))
        if form is None:
            return None
        mode = "inference" if keep == len(hidden) else "training"
        better = setting.table.in_one_launch(mode, setting.kind, M, widths, final_relu)
        if better is None:
            better = wins(form, M, weights, len(hidden), columns, ITEMSIZE[setting.kind], num_sms)
        if not better:
            return None
    options = options_of(form, widths, setting) | {"STRIDES": strides, "KEEP": keep, "FINAL_RELU": final_relu}
    grid = programs(form, M, num_sms)
    return grid, grid * form.BLOCK_M if form.STAGED else 0, options


def narrow_forward(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    final_relu: bool,
    keep: int,
    setting: Setting,
    form: Form | None = None,
) -> list[torch.Tensor] | None:
    """The result of mlp_forward, by one launch; None if one launch for each layer is better.

    form: use one launch of this form in any case, for tests and timings.
    """
    M = x.shape[0]
    steps = [0 if bias is None else bias.stride(0) for bias in biases]
    if M == 0 or max(steps) >= 2**22 or not all(map(counts_in_32_bits, (x, *weights))):
        return None
    strides = tuple([(*weight.stride(), step) for weight, step in zip(weights, steps, strict=True)])
    widths = (x.shape[1], *[weight.shape[0] for weight in weights])
    aligned = is_aligned_tensor(x) and all(map(is_aligned_tensor, weights))
    plan = _plan(M, widths, strides, final_relu, keep, aligned, setting, form)
    if plan is None:
        return None
    grid, scratch_rows, options = plan
    ys = [
        x.new_empty(M if i >= keep else scratch_rows, N) if i >= keep or scratch_rows else None
        for i, N in enumerate(widths[1:])
    ]
    args = (x, tuple(weights), tuple(biases), tuple(ys), M, *x.stride(), 0)
    launch(_narrow_forward_kernel, (grid,), x, args, options)
    return [y for y in ys[keep:] if y is not None]


def counts_in_32_bits(x: torch.Tensor) -> bool:
    """True if offsets within a block of rows, and within the largest weight, are less than 2**31 elements."""
    return max(x.stride()) < 2**22 and x.shape[1] < 2**22
