"""Device code that the three matrix products share: the order of tiles and the loop over the reduction.

All three are ``C (R, C) = A (R, K) @ B (K, C)`` for some strides:

==========  ===========  ===========  =========
product     A            B            reduction
==========  ===========  ===========  =========
forward     x            weight.T     features in
grad_input  grad_z       weight       features out
grad_weight grad_z.T     x            rows
==========  ===========  ===========  =========
"""

import triton
import triton.language as tl

from .launch import interpreting

GROUP_R: tl.constexpr = tl.constexpr(8)  # tiles of rows that run together, see tile_position
INTERPRETED: tl.constexpr = tl.constexpr(interpreting())


@triton.jit
def tile_position(tile, tiles_r, tiles_c):
    """Position ``(tile_r, tile_c)`` of tile number ``tile``.

    Tiles run down GROUP_R rows of a column before they step to the next column, so that the tiles computed at
    the same time share rows of A and columns of B in the L2 cache (Triton's matrix multiplication tutorial).
    """
    tiles_in_group = GROUP_R * tiles_c
    first_r = (tile // tiles_in_group) * GROUP_R
    group_r = tl.minimum(tiles_r - first_r, GROUP_R)
    within = tile % tiles_in_group
    return first_r + within % group_r, within // group_r


@triton.jit
def tile_range(tile, BLOCK: tl.constexpr, limit, WIDE: tl.constexpr):
    """``(first, offs, valid)`` of a tile along one dimension: start, offsets from it, and which are inside.

    ``first`` is int64, as a row times its stride can exceed 2**31. Within a tile 32 bits are enough and take
    half the registers, unless strides are huge (WIDE). Mask invalid offsets: if they were redirected to a
    valid row, the compiler would no longer see that the offsets are contiguous.
    """
    first = tile.to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    valid = offs < limit - tile * BLOCK
    if WIDE:
        offs = offs.to(tl.int64)
    return first, offs, valid


@triton.jit
def select(here, new, old):
    """The tuple ``new`` where ``here`` holds, else the tuple ``old``.

    A kernel whose tiles belong to several layers calls it for each layer in turn to find a tile's layer.
    """
    chosen = ()
    for i in tl.static_range(len(old)):
        chosen += (tl.where(here, new[i], old[i]),)  # type: ignore[assignment]
    return chosen


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """``acc + a @ b``, in float32."""
    if INTERPRETED:  # Triton's interpreter computes bfloat16 products wrongly
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


@triton.jit
def tile_product(
    a_ptr,  # start of the tile's first row in A
    b_ptr,  # start of the tile's first column in B
    offs_r,  # (BLOCK_R,) rows from there
    offs_c,  # (BLOCK_C,) columns from there
    valid_r,  # (BLOCK_R,) which of the rows are inside A
    valid_c,  # (BLOCK_C,) which of the columns are inside B
    k_begin,  # the reduction runs over k_begin <= k < k_end
    k_end,
    stride_ar,
    stride_ak,
    stride_bk,
    stride_bc,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One tile of ``A @ B`` in float32, (BLOCK_R, BLOCK_C).

    Every iteration computes addresses from k: with incremented pointers, ptxas serialises the wgmma
    instructions of sm_90 far more often. Both operands are masked in k, because 0 * NaN is NaN.
    """
    offs_k = tl.arange(0, BLOCK_K)
    wide_k = offs_k.to(offs_r.dtype)
    a_offs = offs_r[:, None] * stride_ar + wide_k[None, :] * stride_ak
    b_offs = wide_k[:, None] * stride_bk + offs_c[None, :] * stride_bc
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for k in tl.range(k_begin, k_end, BLOCK_K):
        valid_k = offs_k < k_end - k
        first = tl.cast(k, tl.int64)
        a = tl.load(a_ptr + first * stride_ak + a_offs, mask=valid_r[:, None] & valid_k[None, :], other=0.0)
        b = tl.load(b_ptr + first * stride_bk + b_offs, mask=valid_k[:, None] & valid_c[None, :], other=0.0)
        acc = dot(a, b, acc, INPUT_PRECISION)
    return acc
