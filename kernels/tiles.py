"""Which tile a product uses: a small explicit table and a pure function, testable without a GPU."""

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
    descriptors: bool = False  # operands and output through tensor descriptors (TMA, sm_90 and newer)

    def shared_memory(self, itemsize: int) -> int:
        """Bytes of shared memory: the operands' buffers, and with descriptors one for half of the output."""
        operands = (self.BLOCK_R + self.BLOCK_C) * self.BLOCK_K * itemsize * self.num_stages
        return operands + (self.BLOCK_R * self.BLOCK_C // 2 * itemsize if self.descriptors else 0)


# Largest first. tests/kernels/test_codegen.py compiles every entry for sm_80, sm_90 and sm_100: each has
# its tensor-core instructions, no spills and no serialised wgmma, which larger tiles do not have.
# All fit in 99 KB, the least shared memory of these chips (sm_86, sm_89, sm_120). None has been timed yet.
TILES: dict[str, tuple[Tile, ...]] = {
    "half": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)),
    "tf32": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 4)),
    "ieee": (Tile(64, 64, 16, 8, 3),),
}

# For operands that are not regular (launch.is_regular): copied in smaller pieces or element by element,
# through registers, with 64-bit offsets, and only small tiles leave room for that.
IRREGULAR: dict[str, Tile] = {
    "half": Tile(64, 64, 32, 8, 3),
    "tf32": Tile(64, 32, 32, 8, 3),
    "ieee": Tile(64, 32, 16, 8, 3),
}

# For grad_input alone, of operands that are regular, on sm_90 and newer. Never chosen yet: that wants a check
# of values and times on a GPU first, for wrong results of host descriptors on an H200 are on record
# (triton-lang/triton issue 9719).
DESCRIPTOR_TILES: dict[str, tuple[Tile, ...]] = {
    "half": (Tile(128, 256, 64, 8, 3, True), Tile(128, 128, 64, 8, 3, True)),
    "tf32": (),
    "ieee": (),
}

OPERATIONS = ("forward", "grad_input", "grad_weight")

# Among which a measurement chooses, for each operation; all pass tests/kernels/test_codegen.py.
CANDIDATES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "forward": TILES,
    "grad_input": {kind: TILES[kind] + DESCRIPTOR_TILES[kind] for kind in TILES},
    "grad_weight": TILES,
}

ITEMSIZE = {"half": 2, "tf32": 4, "ieee": 4}
GROUP = 8  # tiles of rows that run together, see gemm.tile_position


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def select_tile(
    sizes: Sequence[tuple[int, int]], kind: str, regular: bool, num_sms: int, most_splits: int = 1
) -> Tile:
    """The largest tile that the largest product half fills and that gives every multiprocessor work.

    sizes: rows and columns of the products of one launch. kind: "half" (float16, bfloat16), "tf32" or "ieee"
    (float32). regular: all operands are, see launch.is_regular. most_splits: into how many parts at most
    each tile's reduction may be cut.
    """
    if not regular:
        return IRREGULAR[kind]
    rows, cols = max(sizes, key=math.prod)
    for tile in TILES[kind]:
        half_filled = 2 * rows > tile.BLOCK_R and 2 * cols > tile.BLOCK_C
        if half_filled and count_tiles(sizes, tile) * most_splits >= num_sms:
            return tile
    return TILES[kind][-1]


def count_tiles(sizes: Sequence[tuple[int, int]], tile: Tile) -> int:
    return sum(cdiv(rows, tile.BLOCK_R) * cdiv(cols, tile.BLOCK_C) for rows, cols in sizes)


def most_splits(reduction: int) -> int:
    """A part keeps at least 256 of the reduction, below which its float32 partial sums cost more than it."""
    return max(1, reduction // 256)


def select_splits(tiles: int, reduction: int, num_sms: int) -> int:
    """Into how many parts to cut the reduction, so that few tiles still fill the chip.

    Depends on sizes and chip alone, so that the same call adds in the same order, always.
    """
    return max(1, min(num_sms // tiles, most_splits(reduction)))


def candidates(
    operation: str, kind: str, regular: bool, shared_memory: int, descriptors: bool
) -> tuple[Tile, ...]:
    """Those that a device can run.

    shared_memory: bytes that a program may use there; descriptors: whether it has them (sm_90 and newer).
    """
    if not regular:
        return (IRREGULAR[kind],)
    # A KB for barriers, which the compiler adds.
    return tuple(
        tile
        for tile in CANDIDATES[operation][kind]
        if tile.shared_memory(ITEMSIZE[kind]) + 1024 <= shared_memory
        and (descriptors or not tile.descriptors)
    )
