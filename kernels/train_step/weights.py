"""A training step's second phase, over weights: their gradients, and the optimizer's update in place.

Each tile of a weight belongs to one program, which sums over all rows in order: the same bits every time. The
optimizers' formulas are torch.optim's. What they multiply by comes from a row of eight numbers for each
parameter and step, in which the host has computed in double what depends on them alone.
"""

import triton
import triton.language as tl

from ..train_step.rows import NONE_WRONG, as_number

# A row of numbers, see step.sgd_numbers and step.adam_numbers:
#       0          1             2              3          4          5                     6
# sgd   lr         weight_decay  momentum       1 - dampening
# adam  lr / c1    weight_decay  1 - beta1      beta2      1 - beta2  1 / sqrt(c2)          eps
# adamw lr / c1    lr * decay    1 - beta1      beta2      1 - beta2  1 / sqrt(c2)          eps
NUMBERS: tl.constexpr = tl.constexpr(8)

BLOCK_TILES: tl.constexpr = tl.constexpr(256)


@triton.jit
def _update(
    grad,  # of the loss, float32
    param_ptr,  # float32
    copy_ptr,  # the same in the dtype of products, or None
    moment_ptr,  # float32: momentum_buffer, exp_avg, or None
    square_ptr,  # float32: exp_avg_sq, or None
    offs,
    mask,
    numbers_ptr,  # (NUMBERS,) float32
    OPTIMIZER: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    param = tl.load(param_ptr + offs, mask=mask, other=0.0)
    rate = tl.load(numbers_ptr)
    decay = tl.load(numbers_ptr + 1)
    if OPTIMIZER == "adamw":
        param -= decay * param
    else:
        grad += decay * param
    if OPTIMIZER == "sgd":
        if moment_ptr is not None:
            momentum = tl.load(numbers_ptr + 2)
            moment = tl.load(moment_ptr + offs, mask=mask, other=0.0)
            moment = momentum * moment + tl.load(numbers_ptr + 3) * grad
            tl.store(moment_ptr + offs, moment, mask=mask)
            grad = grad + momentum * moment if NESTEROV else moment
        param -= rate * grad
    else:
        moment = tl.load(moment_ptr + offs, mask=mask, other=0.0)
        moment += tl.load(numbers_ptr + 2) * (grad - moment)
        tl.store(moment_ptr + offs, moment, mask=mask)
        square = tl.load(square_ptr + offs, mask=mask, other=0.0)
        square = tl.load(numbers_ptr + 3) * square + tl.load(numbers_ptr + 4) * grad * grad
        tl.store(square_ptr + offs, square, mask=mask)
        root = tl.sqrt(square) * tl.load(numbers_ptr + 5) + tl.load(numbers_ptr + 6)
        param -= rate * (moment / root)
    tl.store(param_ptr + offs, param, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offs, param.to(copy_ptr.dtype.element_ty), mask=mask)


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
    tile,
    tiles,  # of rows
    first,
    rows,
    a_ptr,  # the layer's input, (..., K)
    index_ptr,  # which rows of it, or None
    pitch_a,
    grad_ptr,  # (rows, pitch_g)
    pitch_g,
    partials_ptr,
    scale,
    weight_ptr,
    bias_ptr,
    copy_ptr,
    weight_moment_ptr,
    bias_moment_ptr,
    weight_square_ptr,
    bias_square_ptr,
    numbers_ptr,  # (2, NUMBERS): the weight's and the bias's
    go,  # whether to update anything
    N,
    K,
    FACTOR: tl.constexpr,
    OPTIMIZER: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
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
        a = as_number(a, grad_ptr, scale)
        if UPCAST:
            grad = grad.to(tl.float32)
            a = a.to(tl.float32)
        acc = tl.dot(tl.trans(grad), a, acc, input_precision=INPUT_PRECISION)
        sums += grad.to(tl.float32)
    counted = total_of(partials_ptr + tiles, tiles)
    mean = tl.where(counted > 0.0, FACTOR / counted, 0.0)
    _update(
        acc * mean, weight_ptr, copy_ptr, weight_moment_ptr, weight_square_ptr,
        offs_n[:, None] * K + offs_k[None, :], valid_n[:, None] & valid_k[None, :],
        numbers_ptr, OPTIMIZER, NESTEROV,
    )  # fmt: skip
    if tile % tiles_k == 0:
        _update(
            tl.sum(sums, axis=0) * mean, bias_ptr, None, bias_moment_ptr, bias_square_ptr,
            offs_n, valid_n, numbers_ptr + NUMBERS, OPTIMIZER, NESTEROV,
        )  # fmt: skip


@triton.jit
def weights_of_step(
    tile,  # which tile of all layers' weights
    tiles,  # of rows, in the first phase
    first,
    rows,
    x_ptr,
    index_ptr,
    parameters,  # of all layers: see step.Parameters
    hidden,
    grads,
    partials_ptr,
    wrong_ptr,  # the record of labels that are no class: with one in it, no step updates anything
    numbers_ptr,  # (layers, 2, NUMBERS): this step's
    loss_ptr,  # this step's mean loss goes there, or NaN
    scale,
    WIDTHS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LOSS: tl.constexpr,
    OPTIMIZER: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    FACTOR: tl.constexpr = 1.0 if LOSS == "cross_entropy" else 2.0
    go = True
    if LOSS == "cross_entropy":
        go = tl.load(wrong_ptr) == NONE_WRONG
    begin = tl.cdiv(WIDTHS[1], BLOCK_N) * tl.cdiv(WIDTHS[0], BLOCK_K)
    if tile < begin:
        _weight_tile(
            tile, tiles, first, rows, x_ptr, index_ptr, WIDTHS[0], grads[0], BLOCKS[1], partials_ptr, scale,
            parameters[0][0], parameters[1][0], parameters[2][0], parameters[3][0],
            parameters[4][0], parameters[5][0], parameters[6][0],
            numbers_ptr, go, WIDTHS[1], WIDTHS[0], FACTOR, OPTIMIZER, NESTEROV,
            BLOCK_N, BLOCK_K, BLOCK_M, INPUT_PRECISION, UPCAST,
        )  # fmt: skip
    elif len(WIDTHS) > 2:
        # The other layers share their code: a copy for each would cost registers, or the instruction cache.
        a_ptr, grad_ptr, numbers_ptr = hidden[0], grads[1], numbers_ptr + 2 * NUMBERS
        N, K, pitch_a, pitch_g = WIDTHS[2], WIDTHS[1], BLOCKS[1], BLOCKS[2]
        weight_ptr, bias_ptr = parameters[0][1], parameters[1][1]
        copy_ptr, weight_moment_ptr, bias_moment_ptr = parameters[2][1], parameters[3][1], parameters[4][1]
        weight_square_ptr, bias_square_ptr = parameters[5][1], parameters[6][1]
        end = begin + tl.cdiv(WIDTHS[2], BLOCK_N) * tl.cdiv(WIDTHS[1], BLOCK_K)
        for i in tl.static_range(2, len(WIDTHS) - 1):
            here = tile >= end
            a_ptr, grad_ptr = tl.where(here, hidden[i - 1], a_ptr), tl.where(here, grads[i], grad_ptr)
            numbers_ptr = tl.where(here, numbers_ptr + 2 * NUMBERS, numbers_ptr)
            N, K = tl.where(here, WIDTHS[i + 1], N), tl.where(here, WIDTHS[i], K)
            pitch_a, pitch_g = tl.where(here, BLOCKS[i], pitch_a), tl.where(here, BLOCKS[i + 1], pitch_g)
            weight_ptr = tl.where(here, parameters[0][i], weight_ptr)
            bias_ptr = tl.where(here, parameters[1][i], bias_ptr)
            if copy_ptr is not None:
                copy_ptr = tl.where(here, parameters[2][i], copy_ptr)
            if weight_moment_ptr is not None:
                weight_moment_ptr = tl.where(here, parameters[3][i], weight_moment_ptr)
                bias_moment_ptr = tl.where(here, parameters[4][i], bias_moment_ptr)
            if weight_square_ptr is not None:
                weight_square_ptr = tl.where(here, parameters[5][i], weight_square_ptr)
                bias_square_ptr = tl.where(here, parameters[6][i], bias_square_ptr)
            begin = tl.where(here, end, begin)
            end += tl.cdiv(WIDTHS[i + 1], BLOCK_N) * tl.cdiv(WIDTHS[i], BLOCK_K)
        _weight_tile(
            tile - begin, tiles, 0, rows, a_ptr, None, pitch_a, grad_ptr, pitch_g, partials_ptr, scale,
            weight_ptr, bias_ptr, copy_ptr, weight_moment_ptr, bias_moment_ptr,
            weight_square_ptr, bias_square_ptr, numbers_ptr, go, N, K, FACTOR, OPTIMIZER, NESTEROV,
            BLOCK_N, BLOCK_K, BLOCK_M, INPUT_PRECISION, UPCAST,
        )  # fmt: skip
    if tile == 0:
        loss = total_of(partials_ptr, tiles) / total_of(partials_ptr + tiles, tiles)
        tl.store(loss_ptr, tl.where(go, loss, float("nan")))
