"""Weight gradients of a chain's layers, ``grad_z.T @ x`` each, in one launch.

The tiles of all layers share one persistent grid, and where they are too few for the chip the rows are cut
into parts, the same for all. What is left of the bias gradients, that of a last layer without ReLU, goes
along.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._gemm import tile_position, tile_product, tile_range
from ._launch import arithmetic, is_regular, launch, limits_of, precision_options, programs
from ._partials import Sums, parts_of
from ._tiles import GROUP_R, IRREGULAR, cdiv, count_tiles, most_splits, select_splits, select_tile
from .relu_backward import BLOCK_M, BLOCK_N, chunks_of, relu_backward, relu_backward_chunk

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # grad_z (M, N), x (M, K), and where to (N, K)

MOST_AT_ONCE = 16  # layers in one launch: the kernel looks for a tile's layer one after the other


@triton.jit
def _tiles_of_layers(
    grad_z_ptrs,  # of each layer: (M, N), rows contiguous
    x_ptrs,  # (M, K), rows contiguous
    out_ptrs,  # (splits, N, K), contiguous: float32 partial sums, or the gradient itself where splits is 1
    Ns,
    Ks,
    strides_zm,
    strides_xm,
    M,
    splits,
    rows_per_split,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tiles = tl.cdiv(Ns[0], BLOCK_N) * tl.cdiv(Ks[0], BLOCK_K)
    for i in tl.static_range(1, len(Ns)):
        tiles += tl.cdiv(Ns[i], BLOCK_N) * tl.cdiv(Ks[i], BLOCK_K)
    for item in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0)):
        split = item // tiles
        tile = item % tiles
        grad_z_ptr, x_ptr, out_ptr, N, K = grad_z_ptrs[0], x_ptrs[0], out_ptrs[0], Ns[0], Ks[0]
        stride_zm, stride_xm, begin = strides_zm[0], strides_xm[0], 0
        end = tl.cdiv(N, BLOCK_N) * tl.cdiv(K, BLOCK_K)
        for i in tl.static_range(1, len(Ns)):
            here = tile >= end
            grad_z_ptr = tl.where(here, grad_z_ptrs[i], grad_z_ptr)
            x_ptr = tl.where(here, x_ptrs[i], x_ptr)
            out_ptr = tl.where(here, out_ptrs[i], out_ptr)
            N = tl.where(here, Ns[i], N)
            K = tl.where(here, Ks[i], K)
            stride_zm = tl.where(here, strides_zm[i], stride_zm)
            stride_xm = tl.where(here, strides_xm[i], stride_xm)
            begin = tl.where(here, end, begin)
            end += tl.cdiv(Ns[i], BLOCK_N) * tl.cdiv(Ks[i], BLOCK_K)
        tiles_n = tl.cdiv(N, BLOCK_N)
        tiles_k = tl.cdiv(K, BLOCK_K)
        tile_n, tile_k = tile_position(tile - begin, tiles_n, tiles_k, GROUP_N)
        first_n, offs_n, valid_n = tile_range(tile_n, BLOCK_N, N, WIDE)
        first_k, offs_k, valid_k = tile_range(tile_k, BLOCK_K, K, WIDE)
        row_begin = split * rows_per_split
        row_end = tl.minimum(row_begin + rows_per_split, M)
        acc = tile_product(
            grad_z_ptr + first_n, x_ptr + first_k,
            offs_n, offs_k, valid_n, valid_k, row_begin, row_end,
            1, stride_zm, stride_xm, 1,
            BLOCK_N, BLOCK_K, BLOCK_M, INPUT_PRECISION, UPCAST,
        )  # fmt: skip
        first = (split.to(tl.int64) * N + first_n) * K + first_k
        out_tile = out_ptr + first + offs_n[:, None] * K + offs_k[None, :]
        tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=valid_n[:, None] & valid_k[None, :])


@triton.jit(do_not_specialize=["M", "rows_per_split", "splits", "rows_per_chunk", "chunks"])
def _grad_weights_kernel(
    layers,  # arguments of _tiles_of_layers, from grad_z_ptrs to strides_xm, or None: no regular layer
    odd_layers,  # the same of the irregular layers, in small tiles with 64-bit offsets, or None
    M,
    splits,
    rows_per_split,
    grad_z_ptr,  # (M, N), rows contiguous, of the layer whose bias gradient is left, or None
    partials_ptr,  # (chunks, N), contiguous
    N,
    stride_zm,
    chunks,
    rows_per_chunk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ODD_BLOCK_N: tl.constexpr,
    ODD_BLOCK_K: tl.constexpr,
    ODD_BLOCK_M: tl.constexpr,
    GROUP_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SUM_BLOCK_M: tl.constexpr,
    SUM_BLOCK_N: tl.constexpr,
):
    if layers is not None:
        _tiles_of_layers(
            layers[0], layers[1], layers[2], layers[3], layers[4], layers[5], layers[6],
            M, splits, rows_per_split,
            False, BLOCK_N, BLOCK_K, BLOCK_M, GROUP_N, INPUT_PRECISION, UPCAST,
        )  # fmt: skip
    if odd_layers is not None:
        _tiles_of_layers(
            odd_layers[0], odd_layers[1], odd_layers[2], odd_layers[3],
            odd_layers[4], odd_layers[5], odd_layers[6],
            M, splits, rows_per_split,
            True, ODD_BLOCK_N, ODD_BLOCK_K, ODD_BLOCK_M, GROUP_N, INPUT_PRECISION, UPCAST,
        )  # fmt: skip
    if grad_z_ptr is not None:
        blocks_n = tl.cdiv(N, SUM_BLOCK_N)
        for item in tl.range(tl.program_id(0), blocks_n * chunks, tl.num_programs(0)):
            relu_backward_chunk(
                item % blocks_n, item // blocks_n, grad_z_ptr, None, None, partials_ptr,
                M, N, rows_per_chunk, stride_zm, 1, 0, 0, SUM_BLOCK_M, SUM_BLOCK_N,
            )  # fmt: skip


def _arguments(layers: Sequence[Layer]) -> tuple[object, ...] | None:
    """``(grad_z, x, out)`` of each layer, as _tiles_of_layers takes them."""
    if not layers:
        return None
    grad_zs, xs, outs = zip(*layers, strict=True)
    return (
        grad_zs, xs, outs,
        tuple(grad_z.shape[1] for grad_z in grad_zs), tuple(x.shape[1] for x in xs),
        tuple(grad_z.stride(0) for grad_z in grad_zs), tuple(x.stride(0) for x in xs),
    )  # fmt: skip


def _one_launch(
    layers: Sequence[Layer],
    bias_left: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    sums: Sums,
) -> None:
    """The ``(grad_z, x, out)`` of at most MOST_AT_ONCE layers, none of them empty, and a bias gradient."""
    x = layers[0][1]
    M = x.shape[0]
    device = limits_of(x)
    kind = arithmetic(x.dtype)
    regular: list[Layer] = []
    odd: list[Layer] = []
    for layer in layers:
        columns = layer[1].shape[1]
        both = is_regular(layer[0], columns) and is_regular(layer[1], columns)
        (regular if both else odd).append(layer)
    # One program's warps and stages are those of the larger tile.
    odd_tile = IRREGULAR[kind]
    sizes, odd_sizes = ([(out.shape[0], out.shape[1]) for _, _, out in group] for group in (regular, odd))
    tile = select_tile(sizes, kind, True, device.num_sms, most_splits(M)) if regular else odd_tile
    tiles = count_tiles(sizes, tile) + count_tiles(odd_sizes, odd_tile)
    splits = select_splits(tiles, M, device.num_sms)
    rows_per_split = cdiv(cdiv(M, splits), tile.BLOCK_K) * tile.BLOCK_K
    stored = [[(z, x, parts_of(out, splits, sums)) for z, x, out in group] for group in (regular, odd)]
    partials, N, stride, chunks, rows_per_chunk = None, 0, 0, 0, 0
    if bias_left is not None and grad_bias is not None:
        N, stride = bias_left.shape[1], bias_left.stride(0)
        chunks, rows_per_chunk = chunks_of(bias_left)
        partials = parts_of(grad_bias, chunks, sums)
    items = max(tiles * splits, cdiv(N, BLOCK_N) * chunks)
    launch(
        _grad_weights_kernel, (programs(items, tile, kind, device),), x,
        _arguments(stored[0]), _arguments(stored[1]), M, splits, rows_per_split,
        bias_left, partials, N, stride, chunks, rows_per_chunk,
        BLOCK_N=tile.BLOCK_R, BLOCK_K=tile.BLOCK_C, BLOCK_M=tile.BLOCK_K,
        ODD_BLOCK_N=odd_tile.BLOCK_R, ODD_BLOCK_K=odd_tile.BLOCK_C, ODD_BLOCK_M=odd_tile.BLOCK_K,
        GROUP_N=GROUP_R, SUM_BLOCK_M=BLOCK_M, SUM_BLOCK_N=BLOCK_N,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        **precision_options(kind, x.dtype),
    )  # fmt: skip


def grad_weights(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]], bias_left: torch.Tensor | None, sums: Sums
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """``grad_z.T (N, M) @ x (M, K)`` for each ``(grad_z, x)``: ``(N, K)``, contiguous.

    One M and one dtype for all, and the elements of a row side by side (stride 1). bias_left: a grad_z (M, N)
    whose rows are to be summed as well, to ``(N,)``, the second result. All are complete once
    ``add_up(sums)`` has run, and the same bits every time: partial sums are added in a fixed order, without
    atomics.
    """
    outs = [x.new_empty(grad_z.shape[1], x.shape[1]) for grad_z, x in layers]
    work = [(*pair, out) for pair, out in zip(layers, outs, strict=True) if out.numel()]
    grad_bias = None
    if bias_left is not None and work and bias_left.shape[1]:
        grad_bias = bias_left.new_empty(bias_left.shape[1])
    elif bias_left is not None:  # there is nothing to go along with
        _, grad_bias = relu_backward(bias_left, None, True, sums)
        bias_left = None
    for first in range(0, len(work), MOST_AT_ONCE):
        _one_launch(work[first : first + MOST_AT_ONCE], bias_left if first == 0 else None, grad_bias, sums)
    return outs, grad_bias
