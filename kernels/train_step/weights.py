"""A training step's second phase, over weights: their gradients, and the optimizer's update in place.

    grad_W[i] = c * g[i].T @ h[i],   grad_b[i] = c * g[i].sum(0),   then optimizers.update

c is 1 / counted labels for cross-entropy and 2 / elements for the squared error. One program computes a tile
of a weight and sums over all rows in order, so results are the same bits every time.
"""

import triton
import triton.language as tl

from ..gemm import dot, select
from .optimizers import COEFFICIENTS, update
from .rows import NONE_WRONG, converted

BLOCK_TILES: tl.constexpr = tl.constexpr(256)


@triton.jit
def total_of(partials_ptr, tiles):
    """The sum of (tiles,) in a fixed order."""
    sums = tl.zeros((BLOCK_TILES,), dtype=tl.float32)
    for t in range(0, tiles, BLOCK_TILES):
        offs = t + tl.arange(0, BLOCK_TILES)
        sums += tl.load(partials_ptr + offs, mask=offs < tiles, other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _weight_tile(
    tile,  # which tile of the layer's weight
    N,
    K,
    parameters,  # the layer's entries of step.Parameters
    coefficients_ptr,  # (2, COEFFICIENTS): the weight's and the bias's
    inputs,  # h: (pointer to (..., K), index of its rows or None, first row)
    pitch_a,
    grad_ptr,  # g: (rows, N)
    pitch_g,
    rows,
    tiles,  # of rows, in the first phase
    partials_ptr,
    scale,
    go,  # whether to update anything
    FACTOR: tl.constexpr,
    OPTIMIZER: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Compute one tile of grad_W and, in the first column of tiles, of grad_b; update these parameters."""
    a_ptr, index_ptr, first = inputs
    weight, bias, low_precision, weight_moment, bias_moment, weight_square, bias_square = parameters
    tiles_k = tl.cdiv(K, BLOCK_K)
    offs_n = tile // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    valid_n = (offs_n < N) & go
    valid_k = offs_k < K
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row in tl.range(0, rows, BLOCK_M):
        m = row + tl.arange(0, BLOCK_M)
        valid_m = m < rows
        source = tl.cast(m, tl.int64) + first
        if index_ptr is not None:
            source = tl.load(index_ptr + source, mask=valid_m, other=0).to(tl.int64)
        grad = tl.load(
            grad_ptr + tl.cast(m, tl.int64)[:, None] * pitch_g + offs_n[None, :],
            mask=valid_m[:, None] & valid_n[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + source[:, None] * pitch_a + offs_k[None, :],
            mask=valid_m[:, None] & valid_k[None, :],
            other=0,
        )
        a = converted(a, grad_ptr, scale)
        acc = dot(tl.trans(grad), a, acc, INPUT_PRECISION)  # g.T @ h
        sums += grad.to(tl.float32)
    counted = total_of(partials_ptr + tiles, tiles)
    mean = tl.where(counted > 0.0, FACTOR / counted, 0.0)  # c; without counted labels there is no gradient
    update(
        acc * mean, weight, low_precision, weight_moment, weight_square,
        offs_n[:, None] * K + offs_k[None, :], valid_n[:, None] & valid_k[None, :],
        coefficients_ptr, OPTIMIZER, NESTEROV,
    )  # fmt: skip
    if tile % tiles_k == 0:
        update(
            tl.sum(sums, axis=0) * mean, bias, None, bias_moment, bias_square,
            offs_n, valid_n, coefficients_ptr + COEFFICIENTS, OPTIMIZER, NESTEROV,
        )  # fmt: skip


@triton.jit
def weights_of_step(
    tile,  # which tile of all layers' weights
    tiles,  # of rows, in the first phase
    rows,  # of this step
    data,  # (x_ptr, index_ptr, first, scale): see rows.rows_of_step
    parameters,  # step.Parameters
    activations,  # (hidden, grads): see rows.rows_of_step
    partials_ptr,
    wrong_ptr,  # the record of wrong labels: once it holds one, no step updates anything
    coefficients_ptr,  # (layers, 2, COEFFICIENTS): this step's
    loss_ptr,  # where this step's mean loss goes, or NaN
    WIDTHS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LOSS: tl.constexpr,
    OPTIMIZER: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Find the layer of this tile and update its part of that layer's parameters.

    The tiles of all layers are numbered one layer after the other; a layer's tiles are begin <= tile < end.
    """
    x_ptr, index_ptr, first, scale = data
    hidden, grads = activations
    FACTOR: tl.constexpr = 1.0 if LOSS == "cross_entropy" else 2.0
    go = True
    if LOSS == "cross_entropy":
        go = tl.load(wrong_ptr) == NONE_WRONG
    begin = tl.cdiv(WIDTHS[1], BLOCK_N) * tl.cdiv(WIDTHS[0], BLOCK_K)
    if tile < begin:
        _weight_tile(
            tile, WIDTHS[1], WIDTHS[0], [column[0] for column in parameters], coefficients_ptr,
            (x_ptr, index_ptr, first), WIDTHS[0], grads[0], BLOCKS[1], rows, tiles, partials_ptr, scale, go,
            FACTOR, OPTIMIZER, NESTEROV, BLOCK_N, BLOCK_K, BLOCK_M, INPUT_PRECISION,
        )  # fmt: skip
    elif len(WIDTHS) > 2:
        # The other layers share their code: separate code for each would cost registers or instruction cache.
        # A name assigned in both branches would need the same type in both, hence two names for a column.
        own = [entries[1] for entries in parameters]
        pointers = (hidden[0], grads[1], coefficients_ptr + 2 * COEFFICIENTS)
        N, K, pitch_a, pitch_g = WIDTHS[2], WIDTHS[1], BLOCKS[1], BLOCKS[2]
        end = begin + tl.cdiv(WIDTHS[2], BLOCK_N) * tl.cdiv(WIDTHS[1], BLOCK_K)
        for i in tl.static_range(2, len(WIDTHS) - 1):
            here = tile >= end
            pointers = select(here, (hidden[i - 1], grads[i], pointers[2] + 2 * COEFFICIENTS), pointers)
            N, K = tl.where(here, WIDTHS[i + 1], N), tl.where(here, WIDTHS[i], K)
            pitch_a, pitch_g = tl.where(here, BLOCKS[i], pitch_a), tl.where(here, BLOCKS[i + 1], pitch_g)
            own = [  # like select, which cannot return None
                own[j] if own[j] is None else tl.where(here, parameters[j][i], own[j])
                for j in (0, 1, 2, 3, 4, 5, 6)
            ]
            begin = tl.where(here, end, begin)
            end += tl.cdiv(WIDTHS[i + 1], BLOCK_N) * tl.cdiv(WIDTHS[i], BLOCK_K)
        a_ptr, grad_ptr, own_coefficients_ptr = pointers
        _weight_tile(
            tile - begin, N, K, own, own_coefficients_ptr,
            (a_ptr, None, 0), pitch_a, grad_ptr, pitch_g, rows, tiles, partials_ptr, scale, go,
            FACTOR, OPTIMIZER, NESTEROV, BLOCK_N, BLOCK_K, BLOCK_M, INPUT_PRECISION,
        )  # fmt: skip
    if tile == 0:
        loss = total_of(partials_ptr, tiles) / total_of(partials_ptr + tiles, tiles)
        tl.store(loss_ptr, tl.where(go, loss, float("nan")))
