"""Weight gradients of a chain's layers, ``grad_z.T @ x`` each, in one launch.

The tiles of all layers share one persistent grid, and where they are too few for the chip the rows are cut
into parts, the same for all. What is left of the bias gradients, that of a last layer without ReLU, goes
along.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..gemm import tile_position, tile_product, tile_range
from ..launch import PLANS, Setting, launch, listener
from ..layer.relu_backward import BLOCK_M, BLOCK_N, chunks_of, relu_backward, relu_backward_chunk
from ..partial_sums import Sums, parts_of
from ..tiles import IRREGULAR, Tile, cdiv, count_tiles, most_splits, select_splits, select_tile


class Layer(NamedTuple):
    grad_z: torch.Tensor  # (M, N)
    x: torch.Tensor  # (M, K)
    regular: bool  # both are, see is_regular
    grad: torch.Tensor  # (N, K), contiguous: the result


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
    GROUP: tl.constexpr,
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
        tile_n, tile_k = tile_position(tile - begin, tiles_n, tiles_k, GROUP)
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
    GROUP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SUM_BLOCK_M: tl.constexpr,
    SUM_BLOCK_N: tl.constexpr,
):
    if layers is not None:
        _tiles_of_layers(
            layers[0], layers[1], layers[2], layers[3], layers[4], layers[5], layers[6],
            M, splits, rows_per_split,
            False, BLOCK_N, BLOCK_K, BLOCK_M, GROUP, INPUT_PRECISION, UPCAST,
        )  # fmt: skip
    if odd_layers is not None:
        _tiles_of_layers(
            odd_layers[0], odd_layers[1], odd_layers[2], odd_layers[3],
            odd_layers[4], odd_layers[5], odd_layers[6],
            M, splits, rows_per_split,
            True, ODD_BLOCK_N, ODD_BLOCK_K, ODD_BLOCK_M, GROUP, INPUT_PRECISION, UPCAST,
        )  # fmt: skip
    if grad_z_ptr is not None:
        blocks_n = tl.cdiv(N, SUM_BLOCK_N)
        for item in tl.range(tl.program_id(0), blocks_n * chunks, tl.num_programs(0)):
            relu_backward_chunk(
                item % blocks_n, item // blocks_n, grad_z_ptr, None, None, partials_ptr,
                M, N, rows_per_chunk, stride_zm, 1, 0, 0, SUM_BLOCK_M, SUM_BLOCK_N,
            )  # fmt: skip


class _Plan(NamedTuple):
    splits: int
    rows_per_split: int
    grid: tuple[int]
    options: dict[str, Any]


@functools.lru_cache(PLANS)
def _plan(
    M: int,
    sizes: tuple[tuple[int, int], ...],
    odd_sizes: tuple[tuple[int, int], ...],
    chunks: int,
    setting: Setting,
    tile: Tile | None,
) -> _Plan:
    """For layers of these sizes (N, K), regular and not, and with so many parts of a bias gradient."""
    num_sms = setting.device.num_sms
    odd_tile = IRREGULAR[setting.kind]
    # One program's warps and stages are those of the larger tile, and that of the largest layer.
    if sizes:
        tile, _ = setting.measured("grad_weight", M, *max(sizes, key=math.prod), True, tile)
        tile = tile or select_tile(sizes, setting.kind, True, num_sms, most_splits(M))
    else:
        tile = odd_tile
    tiles = count_tiles(sizes, tile) + count_tiles(odd_sizes, odd_tile)
    splits = select_splits(tiles, M, num_sms)
    rows_per_split = cdiv(cdiv(M, splits), tile.BLOCK_K) * tile.BLOCK_K
    blocks = {"BLOCK_N": tile.BLOCK_R, "BLOCK_K": tile.BLOCK_C, "BLOCK_M": tile.BLOCK_K}
    blocks |= {"ODD_BLOCK_N": odd_tile.BLOCK_R, "ODD_BLOCK_K": odd_tile.BLOCK_C}
    blocks |= {"ODD_BLOCK_M": odd_tile.BLOCK_K, "SUM_BLOCK_M": BLOCK_M, "SUM_BLOCK_N": BLOCK_N}
    grid = setting.programs(max(tiles * splits, chunks), tile)
    return _Plan(splits, rows_per_split, grid, blocks | setting.product_options(tile))


def _one_launch(
    layers: Sequence[Layer],
    bias_left: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    setting: Setting,
    sums: Sums,
    tile: Tile | None,
) -> None:
    """At most MOST_AT_ONCE layers, none of them empty, and a bias gradient."""
    M = layers[0].x.shape[0]
    regular: list[Layer] = []
    odd: list[Layer] = []
    for layer in layers:
        (regular if layer.regular else odd).append(layer)
    partials, N, stride, chunks, rows_per_chunk, blocks = None, 0, 0, 0, 0, 0
    if bias_left is not None and grad_bias is not None:
        N, stride = bias_left.shape[1], bias_left.stride(0)
        chunks, rows_per_chunk, blocks = chunks_of(M, N, setting.device.num_sms)
        partials = parts_of(grad_bias, chunks, sums)
    plan = _plan(
        M, tuple([layer.grad.shape for layer in regular]), tuple([layer.grad.shape for layer in odd]),
        chunks * blocks, setting, tile,
    )  # fmt: skip
    args = (
        _arguments(regular, plan.splits, sums), _arguments(odd, plan.splits, sums),
        M, plan.splits, plan.rows_per_split, bias_left, partials, N, stride, chunks, rows_per_chunk,
    )  # fmt: skip
    launch(_grad_weights_kernel, plan.grid, layers[0].x, args, plan.options)


def _arguments(layers: Sequence[Layer], splits: int, sums: Sums) -> tuple[object, ...] | None:
    """What _tiles_of_layers takes."""
    if not layers:
        return None
    return (
        tuple([layer.grad_z for layer in layers]),
        tuple([layer.x for layer in layers]),
        tuple([parts_of(layer.grad, splits, sums) for layer in layers]),
        tuple([layer.grad.shape[0] for layer in layers]),
        tuple([layer.grad.shape[1] for layer in layers]),
        tuple([layer.grad_z.stride(0) for layer in layers]),
        tuple([layer.x.stride(0) for layer in layers]),
    )


@functools.lru_cache(PLANS)
def _by_torch(M: int, N: int, K: int, regular: bool, setting: Setting) -> bool:
    """Whether PyTorch's operator is faster for a layer of these sizes."""
    return setting.measured("grad_weight", M, N, K, regular, None)[1]


def grad_weights(
    layers: Sequence[Layer],
    bias_left: torch.Tensor | None,
    setting: Setting,
    sums: Sums,
    tile: Tile | None = None,
) -> torch.Tensor | None:
    """``grad_z.T (N, M) @ x (M, K)`` into each layer's ``grad (N, K)``.

    One M and one dtype for all, and the elements of a row side by side (stride 1). bias_left: a grad_z (M, N)
    whose rows are to be summed as well, to the result ``(N,)``. All are complete once ``add_up(sums)`` has
    run, and the same bits every time: partial sums are added in a fixed order, without atomics. tile: another
    than the measured one or the table's choice for regular layers, for tests and timings.
    """
    work = [layer for layer in layers if layer.grad.numel()]
    if setting.table.products and tile is None:
        work = [layer for layer in work if not _done_by_torch(layer, setting)]
    if bias_left is None:
        grad_bias = None
    elif work and bias_left.shape[1]:
        grad_bias = bias_left.new_empty(bias_left.shape[1])
    else:  # there is nothing to go along with
        _, grad_bias = relu_backward(bias_left, None, True, setting, sums)
        bias_left = None
    for first in range(0, len(work), MOST_AT_ONCE):
        now = work[first : first + MOST_AT_ONCE]
        _one_launch(now, None if first else bias_left, grad_bias, setting, sums, tile)
    return grad_bias


def _done_by_torch(layer: Layer, setting: Setting) -> bool:
    """Whether PyTorch's operator is faster here; then it has run."""
    M, K = layer.x.shape
    if not _by_torch(M, layer.grad_z.shape[1], K, layer.regular, setting):
        return False
    note = listener()
    if note is None:
        torch.mm(layer.grad_z.t(), layer.x, out=layer.grad)
    else:
        note("mm", (layer.grad_z, layer.x, layer.grad))
    return True
