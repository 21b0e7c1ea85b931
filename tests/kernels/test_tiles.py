"""The tile table and the pure functions that choose from it."""

import pytest
from available import HAS_TRITON
from hypothesis import given, settings
from hypothesis import strategies as st

if not HAS_TRITON:
    pytest.skip("Triton is not installed: no kernels to choose tiles for", allow_module_level=True)

from fusedmlp.kernels.tiles import (
    ITEMSIZE,
    TILES,
    UNALIGNED,
    count_tiles,
    most_splits,
    select_splits,
    select_tile,
)

sizes = st.integers(1, 100_000)
kinds = st.sampled_from(list(TILES))


@settings(deadline=None)
@given(sizes, sizes, kinds, st.booleans(), st.integers(1, 200), st.integers(1, 64))
def test_every_choice_ships(rows: int, cols: int, kind: str, aligned: bool, sms: int, splits: int) -> None:
    tile = select_tile([(rows, cols)], kind, aligned, sms, splits)
    assert tile in (TILES[kind] if aligned else (UNALIGNED[kind],))
    if aligned and tile != TILES[kind][-1]:  # a large tile is at least half full and occupies the chip
        assert 2 * rows > tile.BLOCK_R
        assert 2 * cols > tile.BLOCK_C
        assert count_tiles([(rows, cols)], tile) * splits >= sms


@settings(deadline=None)
@given(sizes, sizes, st.integers(1, 200))
def test_splits_keep_enough_rows_and_never_outnumber_the_chip(tiles: int, rows: int, sms: int) -> None:
    splits = select_splits(tiles, rows, sms)
    assert splits >= 1
    assert splits == 1 or (rows // splits >= 256 and splits * tiles <= sms)
    assert splits <= most_splits(rows)


def test_large_products_get_large_tiles_and_narrow_ones_small() -> None:
    assert select_tile([(8192, 8192)], "half", True, 132) == TILES["half"][0]
    assert select_tile([(8192, 10)], "half", True, 132) == TILES["half"][-1]
    assert select_tile([(256, 256)], "half", True, 132) == TILES["half"][-1]
    # If the reduction can be split, large tiles are better: they read each operand half as often.
    assert select_tile([(256, 256)], "half", True, 132, most_splits(65536)) == TILES["half"][0]


def test_every_tile_fits_every_chip() -> None:
    for table in (TILES, {kind: (tile,) for kind, tile in UNALIGNED.items()}):
        for kind, tiles in table.items():
            for tile in tiles:
                assert tile.shared_memory(ITEMSIZE[kind]) + 1024 <= 99 * 1024  # barriers take 1 KB
                # tl.dot and tl.arange need powers of two, and tl.dot at least 16
                for block in (tile.BLOCK_R, tile.BLOCK_C, tile.BLOCK_K):
                    assert block >= 16
                    assert block & (block - 1) == 0
