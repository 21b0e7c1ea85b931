"""Backward through the activations of a whole chain of narrow layers in one launch.

As in the forward, each program carries a block of rows through all layers, here from the last to the first:

    grad_z[i - 1] = grad_z[i] @ weight[i] where h[i] > 0, else 0
    partial sums for grad_bias[i - 1]: the sum of grad_z[i - 1] over the block's rows
    grad_x = grad_z[0] @ weight[0]

The weight gradients are sums over all rows, which layer/grad_weight.py computes afterwards.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..gemm import tile_range
from ..launch import PLANS, Setting, is_aligned_tensor, launch
from ..partial_sums import Sums, parts_of
from ..tiles import ITEMSIZE, cdiv
from .forward import (
    Form,
    counts_in_32_bits,
    options_of,
    programs,
    rows_product,
    select_form,
    store_rows,
    wins,
)

BLOCK_C: tl.constexpr = tl.constexpr(64)  # columns of the first layer's input gradient at a time


@triton.jit
def _through_relu(
    grad,  # (BLOCK_M, PADDED_N) float32: the gradient of the layer's output
    y_ptr,  # (M, N), contiguous: that output
    partials_ptr,  # (blocks of rows, N), contiguous, or None
    grad_z_ptr,  # (M, N), contiguous, or None
    block,
    first_m,
    offs_m,
    valid_m,
    N: tl.constexpr,
    PADDED_N: tl.constexpr,
    dtype: tl.constexpr,
):
    """``grad_z``, the gradient before the ReLU that gave y. It and its sum over rows are stored if wanted."""
    y_ptr += first_m * N
    n = tl.arange(0, PADDED_N)
    mask = valid_m[:, None] & (n < N)[None, :]
    y = tl.load(y_ptr + offs_m[:, None] * N + n[None, :], mask=mask, other=0.0)
    # As in torch, the gradient passes unless y <= 0, so also where y is NaN. Past an edge y is loaded as 0:
    # otherwise a 0 * inf there would get into sums and products.
    grad = tl.where(y.to(tl.float32) <= 0.0, 0.0, grad)
    if partials_ptr is not None:
        sums_ptr = partials_ptr + tl.cast(block, tl.int64) * N
        tl.store(sums_ptr + n, tl.sum(grad, axis=0).to(partials_ptr.dtype.element_ty), mask=n < N)
    grad_z = grad.to(dtype)
    if grad_z_ptr is not None:
        store_rows(grad_z_ptr + first_m * N, grad_z, offs_m, valid_m, N, N, PADDED_N)
    return grad_z


# What the kernel does depends on three compile-time conditions:
#
# FINAL_RELU    _through_relu computes the last layer's grad_z; else it is grad_output itself
# STAGED        grad_z is stored, and the next product reads it from memory (the L2 cache); else it stays in
#               registers
# grad_x_ptr    None: the chain's input needs no gradient, and the first layer's product is skipped
@triton.jit(do_not_specialize=["M"])
def _narrow_backward_kernel(
    grad_output_ptr,  # (M, N)
    weight_ptrs,  # of each layer: (N, K); None for the first if grad_x_ptr is None
    y_ptrs,  # of each layer: its output (M, N), contiguous; None for the last if it has no ReLU
    grad_z_ptrs,  # of each layer: (M, N), contiguous; None if it need not be stored
    partials_ptrs,  # of each layer: (blocks of rows, N), contiguous, or None
    grad_x_ptr,  # (M, K), contiguous, or None
    M,
    stride_gm,
    stride_gn,
    zero,  # 0, see _narrow_forward_kernel
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    STRIDES: tl.constexpr,  # of each layer's weight
    FINAL_RELU: tl.constexpr,
    STAGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    L: tl.constexpr = len(WIDTHS) - 1
    dtype = grad_output_ptr.dtype.element_ty
    for block in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=1):
        first_m, offs_m, valid_m = tile_range(tl.cast(block, tl.int32), BLOCK_M, M, False)
        origin = block * zero
        if FINAL_RELU or not STAGED:
            n = tl.arange(0, PADDED[L])
            grad = tl.load(
                grad_output_ptr + first_m * stride_gm + offs_m[:, None] * stride_gm + n[None, :] * stride_gn,
                mask=valid_m[:, None] & (n < WIDTHS[L])[None, :],
                other=0.0,
            ).to(tl.float32)
            if FINAL_RELU:
                grad_z = _through_relu(
                    grad, y_ptrs[L - 1], partials_ptrs[L - 1], grad_z_ptrs[L - 1],
                    block, first_m, offs_m, valid_m, WIDTHS[L], PADDED[L], dtype,
                )  # fmt: skip
            else:
                grad_z = grad.to(dtype)
        for i in tl.static_range(L - 1, -1, -1):  # the layer whose input gradient is computed
            held = None if STAGED else grad_z
            if STAGED and (i < L - 1 or FINAL_RELU) and (i > 0 or grad_x_ptr is not None):
                a_ptr = grad_z_ptrs[i] + first_m * WIDTHS[i + 1]
                stride_am = WIDTHS[i + 1]
                stride_an = 1
            else:
                a_ptr = grad_output_ptr + first_m * stride_gm
                stride_am = stride_gm
                stride_an = stride_gn
            tl.debug_barrier()  # makes visible what the other threads of this program stored
            if i > 0:
                grad = rows_product(  # grad_z[i] @ weight[i]
                    held, a_ptr, weight_ptrs[i] + origin, offs_m, valid_m,
                    stride_am, stride_an, STRIDES[i][0], STRIDES[i][1], WIDTHS[i], zero,
                    WIDTHS[i + 1], PADDED[i + 1], PADDED[i], BLOCK_M, BLOCK_K, INPUT_PRECISION,
                )  # fmt: skip
                grad_z = _through_relu(
                    grad, y_ptrs[i - 1], partials_ptrs[i - 1], grad_z_ptrs[i - 1],
                    block, first_m, offs_m, valid_m, WIDTHS[i], PADDED[i], dtype,
                )  # fmt: skip
            elif grad_x_ptr is not None:
                # The first layer's input may be wide, so its gradient is computed BLOCK_C columns at a time.
                for c in tl.range(0, WIDTHS[0], BLOCK_C, num_stages=1):
                    weight_ptr = weight_ptrs[0] + origin + tl.cast(c, tl.int64) * STRIDES[0][1]
                    grad_x = rows_product(
                        held, a_ptr, weight_ptr, offs_m, valid_m,
                        stride_am, stride_an, STRIDES[0][0], STRIDES[0][1], WIDTHS[0] - c, zero,
                        WIDTHS[1], PADDED[1], BLOCK_C, BLOCK_M, BLOCK_K, INPUT_PRECISION,
                    )  # fmt: skip
                    store_rows(
                        grad_x_ptr + first_m * WIDTHS[0] + c, grad_x.to(grad_x_ptr.dtype.element_ty),
                        offs_m, valid_m, WIDTHS[0] - c, WIDTHS[0], BLOCK_C,
                    )  # fmt: skip


@functools.lru_cache(PLANS)
def _plan(
    M: int,
    columns_in: int,  # of the chain's input; in widths they are 1 where x needs no gradient
    widths: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    final_relu: bool,
    need_x: bool,
    aligned: bool,
    setting: Setting,
    form: Form | None,
) -> tuple[Form, tuple[int], dict[str, Any]] | None:
    """Form, grid and options, or None if one launch for each layer is better."""
    num_sms = setting.device.num_sms
    if form is None:
        form = select_form(M, widths, setting.kind, aligned, False, num_sms)
        sizes = list(itertools.pairwise(widths))[0 if need_x else 1 :]
        launches = len(sizes) + final_relu - 1
        weights = sum(K * N for K, N in sizes)
        columns = sum(widths[1:]) if final_relu else sum(widths[1:-1])  # written and not read again
        if form is None or launches < 1:
            return None
        whole = (columns_in, *widths[1:])
        better = setting.table.in_one_launch("training", setting.kind, M, whole, final_relu)
        if better is None:
            better = wins(form, M, weights, launches, columns, ITEMSIZE[setting.kind], num_sms)
        if not better:
            return None
    options = options_of(form, widths, setting)
    options |= {"STRIDES": strides, "FINAL_RELU": final_relu}
    return form, (programs(form, M, num_sms),), options


class Chain(NamedTuple):
    """The arguments of a chain's backward: those of mlp_backward, but only from the lowest layer on."""

    grad_output: torch.Tensor
    activations: Sequence[torch.Tensor | None]
    weights: Sequence[torch.Tensor | None]
    final_relu: bool
    need_x: bool
    need_weights: Sequence[bool]
    need_biases: Sequence[bool]
    setting: Setting
    sums: Sums


def narrow_backward(
    chain: Chain, form: Form | None = None
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]] | None:
    """``(grad_x, grads_z, grads_b)`` of a chain, by one launch; None if one launch for each layer is better.

    grads_z: ``grad_z (M, N)`` of each
    layer whose weight needs a gradient; of a last layer without ReLU, it is grad_output itself. grads_b: the
    bias gradients ``(N,)`` that are needed, except of a last layer without ReLU; they are complete once
    ``add_up(sums)`` has run. form: as in narrow_forward.
    """
    grad_output, activations, weights, final_relu, need_x, need_weights, need_biases, setting, sums = chain
    M = grad_output.shape[0]
    last = len(weights) - 1
    outputs = [y if i < last or final_relu else None for i, y in enumerate(activations[1:])]
    used = [weight for weight in weights[0 if need_x else 1 :] if weight is not None]
    if M == 0 or not all(map(counts_in_32_bits, (grad_output, *used))):
        return None
    if not all(y is None or y.is_contiguous() for y in outputs):
        return None
    K = used[0].shape[1] if need_x else 1  # the kernel does not use it then
    columns_in = K if activations[0] is None else activations[0].shape[1]
    widths = (K, *[y.shape[1] for y in outputs[:last] if y is not None], grad_output.shape[1])
    aligned = is_aligned_tensor(grad_output) and all(map(is_aligned_tensor, used))
    strides = tuple([(0, 0) if weight is None else weight.stride() for weight in weights])
    plan = _plan(M, columns_in, widths, strides, final_relu, need_x, aligned, setting, form)
    if plan is None:
        return None
    form, grid, options = plan
    grad_x = grad_output.new_empty(M, K) if need_x else None
    grads_z: list[torch.Tensor | None] = []
    grads_b: list[torch.Tensor | None] = []
    partials: list[torch.Tensor | None] = []
    for i in range(last + 1):
        inside = i < last or final_relu
        stored = inside and (need_weights[i] or (form.STAGED and (i > 0 or need_x)))
        grads_z.append(grad_output.new_empty(M, widths[i + 1]) if stored else None)
        grads_b.append(grad_output.new_empty(widths[i + 1]) if inside and need_biases[i] else None)
        grad_b = grads_b[i]
        partials.append(None if grad_b is None else parts_of(grad_b, cdiv(M, form.BLOCK_M), sums))
    args = (
        grad_output, (weights[0] if need_x else None, *weights[1:]), tuple(outputs), tuple(grads_z),
        tuple(partials), grad_x, M, *grad_output.stride(), 0,
    )  # fmt: skip
    launch(_narrow_backward_kernel, grid, grad_output, args, options)
    if not final_relu:
        grads_z[last] = grad_output
    return grad_x, grads_z, grads_b
