"""A training step's first phase, over rows: gather, forward, loss, and backward through the activations.

    h[0] = x[index] * scale;  h[i + 1] = relu(h[i] @ W[i].T + b[i]), and z for the last layer, without ReLU
    g[L - 1] = softmax(z) - one_hot(target), or z - target
    g[i - 1] = g[i] @ W[i] where h[i] > 0, else 0

Rows are independent of each other, so a program carries BLOCK_M rows through all layers and back. It stores h
and g, over whose rows the second phase sums, and its parts of two more sums: of the loss, and of the number
that the loss is divided by.
"""

import triton
import triton.language as tl

from ..gemm import dot

IGNORED: tl.constexpr = tl.constexpr(-100)  # torch's ignore_index: labels that cross_entropy leaves out
# The record of wrong labels, which are no class: this, or the smallest code of such a label. A code has the
# number of the step in its upper 32 bits, and in its lower ones the label, clamped to int32, plus 2**31.
NONE_WRONG: tl.constexpr = tl.constexpr(2**63 - 1)


@triton.jit
def unknown_zero(n):
    """0 to add to offsets and bounds; the compiler takes it for a multiple of 16 that changes with n.

    As layers have constant sizes, the compiler would otherwise unroll their loops and compute every layer's
    addresses once for all steps, which needs far more registers than there are.
    """
    return n * tl.program_id(1) * 16


@triton.jit
def _product(
    a_ptr,
    a_rows,  # (BLOCK_M,) where the rows of a, (BLOCK_M, K), start; rows are contiguous
    valid_m,
    b_ptr,  # (K, C)
    like_ptr,  # its dtype is that of the product
    scale,  # integers in a are multiplied by it
    zero,
    K: tl.constexpr,
    C: tl.constexpr,
    stride_bk: tl.constexpr,
    stride_bc: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``a @ b`` in float32, (BLOCK_M, BLOCK_C), where C <= BLOCK_C: zeros past the last row and column."""
    offs_k = zero + tl.arange(0, BLOCK_K)
    offs_c = zero + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for k in tl.range(0, K + zero, BLOCK_K):
        valid_k = offs_k < K - k
        a = tl.load(
            a_ptr + a_rows[:, None] + (k + offs_k)[None, :], mask=valid_m[:, None] & valid_k[None, :], other=0
        )
        b = tl.load(
            b_ptr + (k + offs_k)[:, None] * stride_bk + offs_c[None, :] * stride_bc,
            mask=valid_k[:, None] & (offs_c < C)[None, :],
            other=0.0,
        )
        a = converted(a, like_ptr, scale)
        acc = dot(a, b, acc, INPUT_PRECISION)
    return acc


@triton.jit
def converted(x, like_ptr, scale):
    """x in the dtype of like_ptr; integers (pixels) are multiplied by scale."""
    if x.dtype.is_int():
        x = x.to(tl.float32) * scale
    return x.to(like_ptr.dtype.element_ty)


@triton.jit
def _cross_entropy(z, target_ptr, source, valid_m, number, wrong_ptr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """``(loss, counted, gradient)`` of logits z (BLOCK_M, BLOCK_N), to be divided by the sum of counted.

        loss = log(sum(exp(z))) - z[label],   gradient = softmax(z) - one_hot(label)

    A wrong label makes its row's loss NaN and is recorded as one of step ``number``.
    """
    offs_n = tl.arange(0, BLOCK_N)
    label = tl.load(target_ptr + source, mask=valid_m, other=0).to(tl.int64)
    counted = valid_m & (label != IGNORED)
    exists = counted & (label >= 0) & (label < N)
    z = tl.where((offs_n < N)[None, :], z, float("-inf"))
    top = tl.max(z, axis=1)
    e = tl.exp(z - top[:, None])
    total = tl.sum(e, axis=1)
    hit = offs_n[None, :] == label[:, None]
    loss = top + tl.log(total) - tl.sum(tl.where(hit, z, 0.0), axis=1)
    loss = tl.where(exists, loss, tl.where(counted, float("nan"), 0.0))
    low = tl.minimum(tl.maximum(label, -(2**31)), 2**31 - 1) + 2**31
    code = tl.where(counted & (exists == 0), tl.cast(number, tl.int64) * 2**32 + low, NONE_WRONG)
    code = tl.min(code, axis=0)
    tl.atomic_min(wrong_ptr, code, mask=code != NONE_WRONG, sem="relaxed")
    grad = e / total[:, None] - tl.where(hit, 1.0, 0.0)
    return loss, counted.to(tl.float32), tl.where(exists[:, None], grad, 0.0)


@triton.jit
def _squared_error(z, target_ptr, source, valid_m, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same for ``(z - target)**2``, targets (..., N); the gradient ``z - target`` lacks the factor 2."""
    offs_n = tl.arange(0, BLOCK_N)
    valid = valid_m[:, None] & (offs_n < N)[None, :]
    target = tl.load(target_ptr + source[:, None] * N + offs_n[None, :], mask=valid, other=0.0)
    grad = tl.where(valid, z - target.to(tl.float32), 0.0)
    return tl.sum(grad * grad, axis=1), tl.where(valid_m, 1.0 * N, 0.0), grad


@triton.jit
def rows_of_step(
    tile,  # which BLOCK_M rows
    tiles,  # how many tiles there are: the pitch of partials
    rows,  # of this step
    # (x_ptr, index_ptr, first, scale): x (..., WIDTHS[0]), contiguous, integers or floats; the order (...,)
    # in which its rows are taken, or None; where the step's rows start in that order, or in x; see converted
    data,
    target_ptr,  # class indices (...,), or floats (..., WIDTHS[-1]), contiguous
    weights,  # of each layer: (N, K), contiguous, of the dtype of products
    biases,  # of each layer: (N,) float32
    # (hidden, grads), of the dtype of products: the output h of each layer but the last, (rows, BLOCK of N);
    # the gradient g of each layer's product, likewise
    activations,
    partials_ptr,  # (2, tiles): for each tile, the sum of the loss and of what it is to be divided by
    number,  # of the step, for the record of wrong labels
    wrong_ptr,  # that record, one int64
    zero,  # see unknown_zero
    WIDTHS: tl.constexpr,  # of x and of each layer's output
    BLOCKS: tl.constexpr,  # the powers of two that hold them
    LOSS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    x_ptr, index_ptr, first, scale = data
    hidden, grads = activations
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_m = m < rows
    m = m.to(tl.int64)
    source = m + first
    if index_ptr is not None:
        source = tl.load(index_ptr + source, mask=valid_m, other=0).to(tl.int64)
    last: tl.constexpr = len(WIDTHS) - 2
    for i in tl.static_range(last + 1):
        if i == 0:
            a_ptr, a_rows = x_ptr, source * WIDTHS[0]
        else:
            tl.debug_barrier()  # makes visible what the other threads of this program stored
            a_ptr, a_rows = hidden[i - 1], m * BLOCKS[i]
        z = _product(  # h[i] @ W[i].T
            a_ptr, a_rows, valid_m, weights[i], weights[i], scale, zero,
            WIDTHS[i], WIDTHS[i + 1], 1, WIDTHS[i], BLOCK_M, BLOCK_K, BLOCKS[i + 1], INPUT_PRECISION,
        )  # fmt: skip
        offs_n = zero + tl.arange(0, BLOCKS[i + 1])
        z += tl.load(biases[i] + offs_n, mask=offs_n < WIDTHS[i + 1], other=0.0)[None, :]
        if i < last:
            # A NaN stays NaN, as in torch.relu; by default, tl.maximum drops it.
            h = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
            tile_of_hidden = hidden[i] + m[:, None] * BLOCKS[i + 1] + offs_n[None, :]
            tl.store(tile_of_hidden, h.to(hidden[i].dtype.element_ty), mask=valid_m[:, None])
        else:
            if LOSS == "cross_entropy":
                loss, counted, grad = _cross_entropy(
                    z, target_ptr, source, valid_m, number, wrong_ptr, WIDTHS[i + 1], BLOCKS[i + 1]
                )
            else:
                loss, counted, grad = _squared_error(
                    z, target_ptr, source, valid_m, WIDTHS[i + 1], BLOCKS[i + 1]
                )
            tl.store(partials_ptr + tile, tl.sum(loss, axis=0))
            tl.store(partials_ptr + tiles + tile, tl.sum(counted, axis=0))
            tile_of_grad = grads[i] + m[:, None] * BLOCKS[i + 1] + offs_n[None, :]
            tl.store(tile_of_grad, grad.to(grads[i].dtype.element_ty), mask=valid_m[:, None])
    for i in tl.static_range(last, 0, -1):
        tl.debug_barrier()
        grad = _product(  # g[i] @ W[i]
            grads[i], m * BLOCKS[i + 1], valid_m, weights[i], weights[i], scale, zero,
            WIDTHS[i + 1], WIDTHS[i], WIDTHS[i], 1, BLOCK_M, BLOCK_K, BLOCKS[i], INPUT_PRECISION,
        )  # fmt: skip
        offs_k = m[:, None] * BLOCKS[i] + (zero + tl.arange(0, BLOCKS[i]))[None, :]
        h = tl.load(hidden[i - 1] + offs_k, mask=valid_m[:, None], other=0.0)
        # As in torch, the gradient passes unless h <= 0, so also where h is NaN.
        grad = tl.where(h.to(tl.float32) <= 0.0, 0.0, grad)
        tl.store(grads[i - 1] + offs_k, grad.to(grads[i - 1].dtype.element_ty), mask=valid_m[:, None])
