"""Weight gradient of a layer: ``grad_weight = grad_z.T @ x``, the rows cut into parts where tiles are few."""

import torch
import triton
import triton.language as tl

from ._gemm import tile_position, tile_product, tile_range
from ._launch import arithmetic, is_regular, launch, limits_of, precision_options, programs
from ._partials import sum_partials
from ._tiles import GROUP_R, cdiv, count_tiles, most_splits, select_splits, select_tile


@triton.jit(do_not_specialize=["M", "rows_per_split", "splits"])
def _grad_weight_kernel(
    grad_z_ptr,  # (M, N)
    x_ptr,  # (M, K)
    out_ptr,  # (splits, N, K), contiguous: float32 partial sums, or the gradient itself where splits is 1
    M,
    N,
    K,
    splits,
    rows_per_split,
    stride_zm,
    stride_zn,
    stride_xm,
    stride_xk,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tiles_n * tiles_k
    for item in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0)):
        split = item // tiles
        tile_n, tile_k = tile_position(item % tiles, tiles_n, tiles_k, GROUP_N)
        first_n, offs_n, valid_n = tile_range(tile_n, BLOCK_N, N, WIDE)
        first_k, offs_k, valid_k = tile_range(tile_k, BLOCK_K, K, WIDE)
        row_begin = split * rows_per_split
        row_end = tl.minimum(row_begin + rows_per_split, M)
        acc = tile_product(
            grad_z_ptr + first_n * stride_zn, x_ptr + first_k * stride_xk,
            offs_n, offs_k, valid_n, valid_k, row_begin, row_end,
            stride_zn, stride_zm, stride_xm, stride_xk,
            BLOCK_N, BLOCK_K, BLOCK_M, INPUT_PRECISION, UPCAST,
        )  # fmt: skip
        first = (split * N + first_n) * K + first_k
        out_tile = out_ptr + first + offs_n[:, None] * K + offs_k[None, :]
        tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=valid_n[:, None] & valid_k[None, :])


def grad_weight(grad_z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``grad_z.T (N, M) @ x (M, K)``: ``(N, K)``, contiguous. Dtypes and strides as in linear_forward.

    The same bits every time: partial sums over the rows are added in a fixed order, without atomics.
    """
    M, N = grad_z.shape
    K = x.shape[1]
    grad_w = x.new_empty(N, K)
    if grad_w.numel() == 0:
        return grad_w
    device = limits_of(x)
    kind = arithmetic(x.dtype)
    regular = is_regular(grad_z, K) and is_regular(x, K)
    tile = select_tile(N, K, kind, regular, device.num_sms, most_splits(M))
    tiles = count_tiles(N, K, tile)
    splits = select_splits(tiles, M, device.num_sms)
    rows_per_split = cdiv(cdiv(M, splits), tile.BLOCK_K) * tile.BLOCK_K
    out = grad_w if splits == 1 else x.new_empty(splits, N, K, dtype=torch.float32)
    launch(
        _grad_weight_kernel, (programs(tiles * splits, tile, kind, device),), x,
        grad_z, x, out, M, N, K, splits, rows_per_split,
        grad_z.stride(0), grad_z.stride(1), x.stride(0), x.stride(1),
        WIDE=not regular,
        BLOCK_N=tile.BLOCK_R, BLOCK_K=tile.BLOCK_C, BLOCK_M=tile.BLOCK_K, GROUP_N=GROUP_R,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        **precision_options(kind, x.dtype),
    )  # fmt: skip
    if splits > 1:
        sum_partials(out, grad_w)
    return grad_w
