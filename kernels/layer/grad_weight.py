"""Weight gradients of a chain's layers, ``grad_weight = grad_z.T @ x`` of each, in one launch.

The tiles of all layers share one persistent grid. If there are too few tiles to fill the chip, the rows are
cut into ``splits`` parts, the same number for all layers. The same launch computes the bias gradient of a
last layer without ReLU, which no other kernel computes.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..gemm import select, tile_position, tile_product, tile_range
from ..launch import PLANS, Setting, launch, mm
from ..partial_sums import Sums, parts_of
from ..tiles import UNALIGNED, Tile, cdiv, count_tiles, most_splits, select_splits, select_tile
from .relu_backward import SUM_N, chunks_of, relu_backward, relu_backward_kernel


class Layer(NamedTuple):
    grad_z: torch.Tensor  # (M, N)
    x: torch.Tensor  # (M, K)
    aligned: bool  # both are, see is_aligned_tensor
    grad: torch.Tensor  # (N, K), contiguous: the result


MOST_AT_ONCE = 16  # layers in one launch: the kernel searches them one by one for the layer of a tile


@triton.jit
def _tiles_of_layers(
    layers,  # (grad_z_ptrs, x_ptrs, out_ptrs, Ns, Ks, strides_zm, strides_xm): see _arguments
    M,
    splits,
    rows_per_split,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Compute this program's share of the jobs: job number ``split * tiles + tile`` is one tile of one part.

    The tiles of all layers are numbered one layer after the other; a layer's tiles are begin <= tile < end.
    """
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_K: tl.constexpr = TILE[1]
    Ns, Ks = layers[3], layers[4]
    tiles = tl.cdiv(Ns[0], BLOCK_N) * tl.cdiv(Ks[0], BLOCK_K)
    for i in tl.static_range(1, len(Ns)):
        tiles += tl.cdiv(Ns[i], BLOCK_N) * tl.cdiv(Ks[i], BLOCK_K)
    for job in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0)):
        split = job // tiles
        tile = job % tiles
        layer, begin = [column[0] for column in layers], 0
        end = tl.cdiv(Ns[0], BLOCK_N) * tl.cdiv(Ks[0], BLOCK_K)
        for i in tl.static_range(1, len(Ns)):
            here = tile >= end
            layer = select(here, [column[i] for column in layers], layer)
            begin = tl.where(here, end, begin)
            end += tl.cdiv(Ns[i], BLOCK_N) * tl.cdiv(Ks[i], BLOCK_K)
        grad_z_ptr, x_ptr, out_ptr, N, K, stride_zm, stride_xm = layer
        tiles_n = tl.cdiv(N, BLOCK_N)
        tiles_k = tl.cdiv(K, BLOCK_K)
        tile_n, tile_k = tile_position(tile - begin, tiles_n, tiles_k)
        first_n, offs_n, valid_n = tile_range(tile_n, BLOCK_N, N, WIDE)
        first_k, offs_k, valid_k = tile_range(tile_k, BLOCK_K, K, WIDE)
        row_begin = split * rows_per_split
        row_end = tl.minimum(row_begin + rows_per_split, M)
        acc = tile_product(  # grad_z.T @ x over the rows of this part
            grad_z_ptr + first_n, x_ptr + first_k,
            offs_n, offs_k, valid_n, valid_k, row_begin, row_end,
            1, stride_zm, stride_xm, 1,
            BLOCK_N, BLOCK_K, TILE[2], INPUT_PRECISION,
        )  # fmt: skip
        first = (split.to(tl.int64) * N + first_n) * K + first_k
        out_tile = out_ptr + first + offs_n[:, None] * K + offs_k[None, :]
        tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=valid_n[:, None] & valid_k[None, :])


@triton.jit(do_not_specialize=["M", "rows_per_split", "splits", "rows_per_chunk", "chunks"])
def _grad_weights_kernel(
    layers,  # the aligned layers for _tiles_of_layers, or None if there are none
    unaligned_layers,  # likewise, to be computed in small tiles with 64-bit offsets, or None
    M,
    splits,
    rows_per_split,
    grad_z_ptr,  # (M, N), rows contiguous, of the layer whose bias gradient is left, or None
    partials_ptr,  # (chunks, N), contiguous
    N,
    stride_zm,
    chunks,
    rows_per_chunk,
    TILE: tl.constexpr,  # (outputs, inputs, rows), of aligned layers
    UNALIGNED_TILE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    if layers is not None:
        _tiles_of_layers(layers, M, splits, rows_per_split, False, TILE, INPUT_PRECISION)
    if unaligned_layers is not None:
        _tiles_of_layers(unaligned_layers, M, splits, rows_per_split, True, UNALIGNED_TILE, INPUT_PRECISION)
    if grad_z_ptr is not None:  # grad_bias = grad_z.sum(0)
        blocks_n = tl.cdiv(N, SUM_N)
        for job in tl.range(tl.program_id(0), blocks_n * chunks, tl.num_programs(0)):
            relu_backward_kernel(
                grad_z_ptr, None, None, partials_ptr, M, N, rows_per_chunk, stride_zm, 1, 0, 0,
                job % blocks_n, job // blocks_n,
            )  # fmt: skip


@functools.lru_cache(PLANS)
def _plan(
    M: int,
    sizes: tuple[tuple[int, int], ...],
    unaligned_sizes: tuple[tuple[int, int], ...],
    jobs: int,
    setting: Setting,
    tile: Tile | None,
) -> tuple[int, int, tuple[int], dict[str, Any]]:
    """Splits, rows per split, grid and options for layers of these sizes (N, K), aligned and unaligned.

    jobs: how many jobs sum the rows for a bias gradient.
    """
    num_sms = setting.device.num_sms
    small = UNALIGNED[setting.kind]
    # A launch has one number of warps and stages: those of the aligned tile, chosen for the largest layer.
    if sizes:
        tile, _ = setting.measured("grad_weight", M, *max(sizes, key=math.prod), True, tile)
        tile = tile or select_tile(sizes, setting.kind, True, num_sms, most_splits(M))
    else:
        tile = small
    tiles = count_tiles(sizes, tile) + count_tiles(unaligned_sizes, small)
    splits = select_splits(tiles, M, num_sms)
    rows_per_split = cdiv(cdiv(M, splits), tile.BLOCK_K) * tile.BLOCK_K
    options = setting.product_options(tile) | {"TILE": tile[:3], "UNALIGNED_TILE": small[:3]}
    return splits, rows_per_split, setting.programs(max(tiles * splits, jobs), tile), options


def _one_launch(
    layers: Sequence[Layer],
    bias_left: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    setting: Setting,
    sums: Sums,
    tile: Tile | None,
) -> None:
    """Launch the kernel for at most MOST_AT_ONCE layers, none of them empty, and perhaps a bias gradient."""
    M = layers[0].x.shape[0]
    aligned = [layer for layer in layers if layer.aligned]
    unaligned = [layer for layer in layers if not layer.aligned]
    partials, N, stride, chunks, rows_per_chunk, blocks = None, 0, 0, 0, 0, 0
    if bias_left is not None and grad_bias is not None:
        N, stride = bias_left.shape[1], bias_left.stride(0)
        chunks, rows_per_chunk, blocks = chunks_of(M, N, setting.device.num_sms)
        partials = parts_of(grad_bias, chunks, sums)
    sizes = (tuple([layer.grad.shape for layer in some]) for some in (aligned, unaligned))
    splits, rows_per_split, grid, options = _plan(M, *sizes, chunks * blocks, setting, tile)
    args = (
        _arguments(aligned, splits, sums), _arguments(unaligned, splits, sums),
        M, splits, rows_per_split, bias_left, partials, N, stride, chunks, rows_per_chunk,
    )  # fmt: skip
    launch(_grad_weights_kernel, grid, layers[0].x, args, options)


def _arguments(layers: Sequence[Layer], splits: int, sums: Sums) -> tuple[object, ...] | None:
    """The argument ``layers`` of _tiles_of_layers: a tuple for each column, with an entry for each layer.

    out is (splits, N, K), contiguous: float32 partial sums, or the gradient itself if splits is 1.
    """
    rows = [
        (z, x, parts_of(grad, splits, sums), *grad.shape, z.stride(0), x.stride(0))
        for z, x, _, grad in layers
    ]
    return tuple(zip(*rows, strict=True)) or None


def grad_weights(
    layers: Sequence[Layer],
    bias_left: torch.Tensor | None,
    setting: Setting,
    sums: Sums,
    tile: Tile | None = None,
) -> torch.Tensor | None:
    """Compute ``grad_z.T (N, M) @ x (M, K)`` into each layer's ``grad (N, K)``.

    All layers have the same M and dtype, and contiguous rows (stride 1 within a row). bias_left: a grad_z
    (M, N) whose rows are to be summed as well, to the result ``(N,)``. All results are complete once
    ``add_up(sums)`` has run, and the same bits every time: partial sums are added in a fixed order, without
    atomics. tile: used for aligned layers instead of the measured or chosen one, for tests and timings.
    """
    work = [layer for layer in layers if layer.grad.numel()]
    if setting.table.products and tile is None:
        work = [layer for layer in work if not _done_by_torch(layer, setting)]
    if bias_left is None:
        grad_bias = None
    elif work and bias_left.shape[1]:
        grad_bias = bias_left.new_empty(bias_left.shape[1])
    else:  # there is no launch to add it to
        _, grad_bias = relu_backward(bias_left, None, True, setting, sums)
        bias_left = None
    for first in range(0, len(work), MOST_AT_ONCE):
        now = work[first : first + MOST_AT_ONCE]
        _one_launch(now, None if first else bias_left, grad_bias, setting, sums, tile)
    return grad_bias


@functools.lru_cache(PLANS)
def _by_torch(M: int, N: int, K: int, aligned: bool, setting: Setting) -> bool:
    """Whether PyTorch's operator was measured to be faster for a layer of these sizes."""
    return setting.measured("grad_weight", M, N, K, aligned, None)[1]


def _done_by_torch(layer: Layer, setting: Setting) -> bool:
    """Compute this layer's gradient with PyTorch's operator and return True, if that is faster."""
    M, K = layer.x.shape
    if not _by_torch(M, layer.grad_z.shape[1], K, layer.aligned, setting):
        return False
    mm(layer.grad_z.t(), layer.x, layer.grad)
    return True
