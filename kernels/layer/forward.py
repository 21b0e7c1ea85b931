"""Layer forward: ``y = relu(x @ weight.T + bias)``, or without the ReLU, in one launch."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ..gemm import tile_position, tile_product, tile_range
from ..launch import PLANS, Setting, dry_run_note, launch
from ..tiles import Tile, count_tiles, select_tile


@triton.jit(do_not_specialize=["M"])
def _linear_forward_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,) or None
    y_ptr,  # (M, N), contiguous
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Programs are persistent: for sm_90, ptxas serialises wgmma in programs that compute one tile.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n)
        first_m, offs_m, valid_m = tile_range(tile_m, BLOCK_M, M, WIDE)
        first_n, offs_n, valid_n = tile_range(tile_n, BLOCK_N, N, WIDE)
        acc = tile_product(  # x @ weight.T
            x_ptr + first_m * stride_xm, weight_ptr + first_n * stride_wn,
            offs_m, offs_n, valid_m, valid_n, 0, K,
            stride_xm, stride_xk, stride_wk, stride_wn,
            BLOCK_M, BLOCK_N, BLOCK_K, INPUT_PRECISION,
        )  # fmt: skip
        # In two halves: the bias beside all of acc needs more registers than sm_100 has.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        y_rows = y_ptr + first_m * N + offs_m[:, None] * N
        for half in tl.static_range(2):
            first_n, offs_n, valid_n = tile_range(2 * tile_n + half, BLOCK_N // 2, N, WIDE)
            y = left if half == 0 else right
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + first_n * stride_b + offs_n * stride_b, mask=valid_n, other=0.0)
                y += bias.to(tl.float32)[None, :]
            if RELU:
                # A NaN stays NaN, as in torch.relu; by default, tl.maximum drops it.
                y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
            y_tile = y_rows + first_n + offs_n[None, :]
            tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=valid_m[:, None] & valid_n[None, :])


@functools.lru_cache(PLANS)
def _plan(
    M: int, N: int, K: int, relu: bool, aligned: bool, setting: Setting, tile: Tile | None
) -> tuple[tuple[int], dict[str, Any]] | None:
    """Grid and options for these sizes, or None where PyTorch's operators are faster."""
    tile, by_torch = setting.measured("forward", M, N, K, aligned, tile)
    if by_torch:
        return None
    tile = tile or select_tile([(M, N)], setting.kind, aligned, setting.device.num_sms)
    blocks = {"BLOCK_M": tile.BLOCK_R, "BLOCK_N": tile.BLOCK_C, "BLOCK_K": tile.BLOCK_K, "WIDE": not aligned}
    blocks["RELU"] = relu
    return setting.programs(count_tiles([(M, N)], tile), tile), blocks | setting.product_options(tile)


def linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    relu: bool,
    aligned: bool,
    setting: Setting,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``x (M, K) @ weight.T (K, N) + bias (N,)``, then ReLU if ``relu``: ``(M, N)``, contiguous.

    All tensors are float32, float16 or bfloat16, one dtype for all, of any strides. Sums, bias and ReLU are
    computed in float32 and rounded once; float32 products are IEEE unless torch's settings allow TF32. NaN
    stays NaN under ReLU. aligned: x, weight and the result are aligned, see is_aligned_tensor. tile: used
    instead of the measured or chosen one, for tests and timings.
    """
    M, K = x.shape
    N = weight.shape[0]
    if M == 0 or N == 0:
        return x.new_empty(M, N)
    plan = _plan(M, N, K, relu, aligned, setting, tile)
    if plan is None:
        return _by_torch(x, weight, bias, relu)
    grid, options = plan
    y = x.new_empty(M, N)
    strides = *x.stride(), *weight.stride(), 1 if bias is None else bias.stride(0)
    launch(_linear_forward_kernel, grid, x, (x, weight, bias, y, M, N, K, *strides), options)
    return y


def _by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool) -> torch.Tensor:
    """Compute y with PyTorch's operators, but not with cuBLAS's own ReLU, which turns NaN into 0."""
    note = dry_run_note()
    if note is None:
        y = torch.nn.functional.linear(x, weight, bias)
        return y.relu_() if relu else y
    y = x.new_empty(x.shape[0], weight.shape[0])
    note("linear", (x, weight, bias, y))
    if relu:
        note("relu_", (y, y))
    return y
