"""Input gradient of a layer, ``grad_x = grad_z @ weight``, with mask and bias gradient of the layer below.

If there is a layer below, y is its output, and the kernel also applies the mask and sums over rows:

    grad_x    = grad_z @ weight where y > 0, else 0    this is the grad_z of the layer below
    grad_bias = grad_x.sum(0)                          its bias gradient

Both happen while the product is in registers, so backward needs no extra pass over the activations.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ..gemm import tile_position, tile_product, tile_range
from ..launch import PLANS, Setting, launch, mm
from ..partial_sums import Sums, parts_of
from ..tiles import Tile, cdiv, count_tiles, select_tile
from .relu_backward import relu_backward


@triton.jit(do_not_specialize=["M"])
def _grad_input_kernel(
    grad_z_ptr,  # (M, N)
    weight_ptr,  # (N, K)
    y_ptr,  # (M, K), the output of the ReLU below, or None without one
    grad_x_ptr,  # (M, K), contiguous
    partials_ptr,  # (tiles of rows, K), contiguous: sums of grad_x's rows, or None
    M,
    N,
    K,
    stride_zm,
    stride_zn,
    stride_wn,
    stride_wk,
    stride_ym,
    stride_yk,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_k = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_k, tl.num_programs(0)):
        tile_m, tile_k = tile_position(tile, tiles_m, tiles_k)
        first_m, offs_m, valid_m = tile_range(tile_m, BLOCK_M, M, WIDE)
        first_k, offs_k, valid_k = tile_range(tile_k, BLOCK_K, K, WIDE)
        acc = tile_product(  # grad_z @ weight
            grad_z_ptr + first_m * stride_zm, weight_ptr + first_k * stride_wk,
            offs_m, offs_k, valid_m, valid_k, 0, N,
            stride_zm, stride_zn, stride_wn, stride_wk,
            BLOCK_M, BLOCK_K, BLOCK_N, INPUT_PRECISION,
        )  # fmt: skip
        valid = valid_m[:, None] & valid_k[None, :]
        if y_ptr is not None:
            y_tile = y_ptr + first_m * stride_ym + first_k * stride_yk
            y_offs = offs_m[:, None] * stride_ym + offs_k[None, :] * stride_yk
            y = tl.load(y_tile + y_offs, mask=valid, other=0.0)
            # As in torch, the gradient passes unless y <= 0, so also where y is NaN. Rows past the last are
            # loaded as y = 0: otherwise a 0 * inf there would get into the sums below.
            acc = tl.where(y.to(tl.float32) <= 0.0, 0.0, acc)
        grad_x_tile = grad_x_ptr + first_m * K + first_k + offs_m[:, None] * K + offs_k[None, :]
        tl.store(grad_x_tile, acc.to(grad_x_ptr.dtype.element_ty), mask=valid)
        if partials_ptr is not None:
            sums_tile = partials_ptr + tile_m.to(tl.int64) * K + first_k + offs_k
            tl.store(sums_tile, tl.sum(acc, axis=0).to(partials_ptr.dtype.element_ty), mask=valid_k)


@functools.lru_cache(PLANS)
def _plan(
    M: int, N: int, K: int, aligned: bool, setting: Setting, tile: Tile | None
) -> tuple[Tile, tuple[int], dict[str, Any]] | None:
    """Tile, grid and options for these sizes, or None where PyTorch's operator is faster."""
    tile, by_torch = setting.measured("grad_input", M, N, K, aligned, tile)
    if by_torch:
        return None
    tile = tile or select_tile([(M, K)], setting.kind, aligned, setting.device.num_sms)
    blocks = {"BLOCK_M": tile.BLOCK_R, "BLOCK_K": tile.BLOCK_C, "BLOCK_N": tile.BLOCK_K}
    options = blocks | {"WIDE": not aligned} | setting.product_options(tile)
    return tile, setting.programs(count_tiles([(M, K)], tile), tile), options


def grad_input(
    grad_z: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor | None,
    need_grad_bias: bool,
    aligned: bool,
    setting: Setting,
    sums: Sums,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``grad_z (M, N) @ weight (N, K)``: ``(M, K)``, contiguous. Dtypes and strides as in linear_forward.

    With y (M, K), the output of the ReLU below, the product is set to 0 where y <= 0. If ``need_grad_bias``,
    the second result is the bias gradient (K,) of the layer below, complete once ``add_up(sums)`` has run.
    aligned: all tensors that are read are aligned, see is_aligned_tensor. tile: as in linear_forward.
    """
    M, N = grad_z.shape
    K = weight.shape[1]
    plan = _plan(M, N, K, aligned, setting, tile)
    if plan is None:
        grad_x = mm(grad_z, weight, grad_z.new_empty(M, K))
        return (grad_x, None) if y is None else relu_backward(grad_x, y, need_grad_bias, setting, sums, True)
    tile, grid, options = plan
    grad_x = grad_z.new_empty(M, K)
    grad_bias = grad_z.new_empty(K) if need_grad_bias else None
    partials = None if grad_bias is None else parts_of(grad_bias, cdiv(M, tile.BLOCK_R), sums)
    if M == 0 or K == 0:
        return grad_x, grad_bias
    strides = *grad_z.stride(), *weight.stride(), *((0, 1) if y is None else y.stride())
    args = (grad_z, weight, y, grad_x, partials, M, N, K, *strides)
    launch(_grad_input_kernel, grid, grad_z, args, options)
    return grad_x, grad_bias
