"""Which tile a product uses: a small table and pure functions, testable without a GPU."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Tile(NamedTuple):
    """Sizes of one program's tile of C (R, C) = A (R, K) @ B (K, C), and how it is compiled."""

    BLOCK_R: int
    BLOCK_C: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def shared_memory(self, itemsize: int) -> int:
        """Bytes of shared memory that the operands' buffers take."""
        return (self.BLOCK_R + self.BLOCK_C) * self.BLOCK_K * itemsize * self.num_stages


# Largest first. tests/kernels/test_codegen.py compiles every entry for sm_80, sm_90 and sm_100: each uses
# the tensor cores, spills no registers and has no serialised wgmma; larger tiles fail one of these.
# All fit in 99 KB, the least shared memory of these chips (sm_86, sm_89, sm_120). None has been timed yet.
TILES: dict[str, tuple[Tile, ...]] = {
    "half": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)),
    "tf32": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 4)),
    "ieee": (Tile(64, 64, 16, 8, 3),),
}

# For unaligned operands (see launch.is_aligned_tensor). They are copied through registers in small pieces,
# with 64-bit offsets, and only small tiles leave room for that.
UNALIGNED: dict[str, Tile] = {
    "half": Tile(64, 64, 32, 8, 3),
    "tf32": Tile(64, 32, 32, 8, 3),
    "ieee": Tile(64, 32, 16, 8, 3),
}

OPERATIONS = ("forward", "grad_input", "grad_weight")
ITEMSIZE = {"half": 2, "tf32": 4, "ieee": 4}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def block_of(width: int) -> int:
    """The power of two that holds a layer's outputs, at least 16, the least that tensor cores multiply."""
    return max(16, 1 << (width - 1).bit_length())


def candidates(kind: str, aligned: bool) -> tuple[Tile, ...]:
    """The tiles among which a measurement chooses. Every supported chip can run all of them."""
    return TILES[kind] if aligned else (UNALIGNED[kind],)


def select_tile(
    sizes: Sequence[tuple[int, int]], kind: str, aligned: bool, num_sms: int, most_splits: int = 1
) -> Tile:
    """The largest tile that the largest product fills at least by half and that gives every SM work.

    sizes: rows and columns of the products of one launch. kind: "half" (float16, bfloat16), "tf32" or "ieee"
    (float32). aligned: all operands are, see launch.is_aligned_tensor. most_splits: the largest number of
    parts into which a tile's reduction may be cut.
    """
    if not aligned:
        return UNALIGNED[kind]
    rows, cols = max(sizes, key=math.prod)
    for tile in TILES[kind]:
        half_filled = 2 * rows > tile.BLOCK_R and 2 * cols > tile.BLOCK_C
        if half_filled and count_tiles(sizes, tile) * most_splits >= num_sms:
            return tile
    return TILES[kind][-1]


def count_tiles(sizes: Sequence[tuple[int, int]], tile: Tile) -> int:
    return sum(cdiv(rows, tile.BLOCK_R) * cdiv(cols, tile.BLOCK_C) for rows, cols in sizes)


def most_splits(reduction: int) -> int:
    """The largest number of parts: float32 sums of parts shorter than 256 would cost too much."""
    return max(1, reduction // 256)


def select_splits(tiles: int, reduction: int, num_sms: int) -> int:
    """The number of parts into which the reduction is cut, so that few tiles still fill the chip.

    It depends only on the sizes and the chip, so the same call always adds in the same order.
    """
    return max(1, min(num_sms // tiles, most_splits(reduction)))
