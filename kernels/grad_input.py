"""Input gradient of a layer: ``grad_x = grad_z @ weight``."""

import torch
import triton
import triton.language as tl

from ._gemm import tile_position, tile_product, tile_range
from ._launch import arithmetic, is_regular, launch, limits_of, precision_options, programs
from ._tiles import GROUP_R, count_tiles, select_tile


@triton.jit(do_not_specialize=["M"])
def _grad_input_kernel(
    grad_z_ptr,  # (M, N)
    weight_ptr,  # (N, K)
    grad_x_ptr,  # (M, K), contiguous
    M,
    N,
    K,
    stride_zm,
    stride_zn,
    stride_wn,
    stride_wk,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_k = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_k, tl.num_programs(0)):
        tile_m, tile_k = tile_position(tile, tiles_m, tiles_k, GROUP_M)
        first_m, offs_m, valid_m = tile_range(tile_m, BLOCK_M, M, WIDE)
        first_k, offs_k, valid_k = tile_range(tile_k, BLOCK_K, K, WIDE)
        acc = tile_product(
            grad_z_ptr + first_m * stride_zm, weight_ptr + first_k * stride_wk,
            offs_m, offs_k, valid_m, valid_k, 0, N,
            stride_zm, stride_zn, stride_wn, stride_wk,
            BLOCK_M, BLOCK_K, BLOCK_N, INPUT_PRECISION, UPCAST,
        )  # fmt: skip
        grad_x_tile = grad_x_ptr + first_m * K + first_k + offs_m[:, None] * K + offs_k[None, :]
        tl.store(grad_x_tile, acc.to(grad_x_ptr.dtype.element_ty), mask=valid_m[:, None] & valid_k[None, :])


def grad_input(grad_z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``grad_z (M, N) @ weight (N, K)``: ``(M, K)``, contiguous. Dtypes and strides as in linear_forward."""
    M, N = grad_z.shape
    K = weight.shape[1]
    grad_x = grad_z.new_empty(M, K)
    if grad_x.numel() == 0:
        return grad_x
    device = limits_of(grad_z)
    kind = arithmetic(grad_z.dtype)
    regular = is_regular(grad_z, K) and is_regular(weight, K)
    tile = select_tile(M, K, kind, regular, device.num_sms)
    tiles = count_tiles(M, K, tile)
    launch(
        _grad_input_kernel, (programs(tiles, tile, kind, device),), grad_z,
        grad_z, weight, grad_x, M, N, K,
        grad_z.stride(0), grad_z.stride(1), weight.stride(0), weight.stride(1),
        WIDE=not regular,
        BLOCK_M=tile.BLOCK_R, BLOCK_K=tile.BLOCK_C, BLOCK_N=tile.BLOCK_K, GROUP_M=GROUP_R,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        **precision_options(kind, grad_z.dtype),
    )  # fmt: skip
    return grad_x
