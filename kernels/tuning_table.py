"""What was measured on which device: the tables from which tiles and paths are chosen, read from JSON files.

One file for a device and a minor version of Triton, whose compilers differ too much to share one. Ours lie
beside this module, one for each family of devices; the user's, for the very device, in the platform's cache
folder, and what is in it goes before ours.
"""

import functools
import itertools
import json
import math
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton

from .tiles import CANDIDATES, IRREGULAR, OPERATIONS, Tile

FORMAT = 1
MODES = ("inference", "training")


class Product(NamedTuple):
    """One product of a layer alone: our fastest tile, and microseconds of it and of PyTorch's operator.

    "forward" is ``relu(x @ weight.T + bias)``; "grad_input" ``grad_z @ weight`` with the mask and the bias
    gradient of the layer below, PyTorch's with our pass for those behind it; "grad_weight" ``grad_z.T @ x``.
    """

    tile: Tile
    us: float
    torch_us: float


class Stretch(NamedTuple):
    """Microseconds of a whole stretch of layers, with launching, on the kernels' path and on eager PyTorch.

    "inference" is its forward, "training" forward and backward with every gradient. in_one: with one launch
    for all layers' activations and one for their gradients, see narrow.py, else with one a layer, whichever
    was faster. source: measured on what.
    """

    us: float
    torch_us: float
    in_one: bool
    source: str


ProductKey = tuple[str, str, int, int, int]  # operation, arithmetic, bucket of M, N, K
StretchKey = tuple[str, str, int, tuple[int, ...], bool]  # mode, arithmetic, bucket of M, widths, final_relu


def bucket(M: int) -> int:
    """The power of two nearest to M rows, in ratio: one measurement stands for all of a bucket."""
    if M < 1:
        return 0
    below = 1 << (M.bit_length() - 1)
    return below if 2 * below**2 > M**2 else 2 * below


class Table:
    """What was measured on one device. Hashed by identity: one read anew is another to caches."""

    def __init__(
        self,
        products: dict[ProductKey, Product] | None = None,
        stretches: dict[StretchKey, Stretch] | None = None,
    ) -> None:
        self.products = products or {}
        self.stretches = stretches or {}
        self._found: dict[Any, tuple[Stretch, str] | None] = {}

    def product(self, operation: str, kind: str, M: int, N: int, K: int) -> Product | None:
        """What was measured of this product, with about as many rows."""
        return self.products.get((operation, kind, bucket(M), N, K))

    def in_one_launch(
        self, mode: str, kind: str, M: int, widths: tuple[int, ...], final_relu: bool
    ) -> bool | None:
        """Whether these layers go in one launch, as was measured; None where nothing was.

        Where only products of them were, the best is known for one launch a layer.
        """
        whole = self.stretches.get((mode, kind, bucket(M), widths, final_relu))
        if whole is not None:
            return whole.in_one
        layers = itertools.pairwise(widths)
        known = any(self.product(operation, kind, M, N, K) for K, N in layers for operation in OPERATIONS)
        return False if known else None

    def stretch(
        self, mode: str, kind: str, M: int, widths: tuple[int, ...], final_relu: bool
    ) -> tuple[Stretch, str] | None:
        """What was measured of this stretch, with about as many rows, and in words how; None if nothing.

        As a whole; else as the sum of its layers, each measured alone, to which a chain adds nothing: it
        saves launches and passes.
        """
        key = mode, kind, M, widths, final_relu
        try:
            return self._found[key]
        except KeyError:
            if len(self._found) >= 4096:  # a batch of ever new sizes
                self._found.clear()
            found = self._found[key] = self._look_up(mode, kind, bucket(M), widths, final_relu)
            return found

    def joined(self, other: "Table") -> "Table":
        """This one, and on top of it the other."""
        return Table(self.products | other.products, self.stretches | other.stretches)

    def _look_up(
        self, mode: str, kind: str, rows: int, widths: tuple[int, ...], final_relu: bool
    ) -> tuple[Stretch, str] | None:
        whole = self.stretches.get((mode, kind, rows, widths, final_relu))
        if whole is not None:
            return whole, "as a whole"
        layers = len(widths) - 1
        parts = [
            self.stretches.get((mode, kind, rows, widths[i : i + 2], final_relu or i < layers - 1))
            for i in range(layers)
        ]
        known = [part for part in parts if part is not None]
        if len(known) < layers:
            return None
        us, torch_us = sum(s.us for s in known), sum(s.torch_us for s in known)
        return Stretch(us, torch_us, False, known[0].source), "as the sum of its layers"


class Where(NamedTuple):
    """The device and compiler that a table is for."""

    device: str  # its exact name
    family: str
    triton: str  # minor version


def where(index: int | None) -> Where:
    """CUDA device ``index``, or Triton's interpreter for None."""
    minor = ".".join(triton.__version__.split(".")[:2])
    if index is None:
        return Where("interpreter", "interpreter", minor)
    major, small = torch.cuda.get_device_capability(index)
    return Where(torch.cuda.get_device_name(index), f"sm_{major}{small}", minor)


def shipped_file(here: Where) -> pathlib.Path:
    return pathlib.Path(__file__).parent / f"tuned_{here.family}_triton_{here.triton}.json"


def users_file(here: Where) -> pathlib.Path:
    """Where the user's own table is kept: in the platform's cache folder, which is ~/.cache on Linux."""
    try:
        import platformdirs
    except ImportError:  # then as it does on Linux, where Triton is
        caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        folder = caches / "fusedmlp"
    else:
        folder = platformdirs.user_cache_path("fusedmlp")
    slug = re.sub(r"[^A-Za-z0-9]+", "-", here.device).strip("-")
    return folder / f"tuned_{slug}_triton_{here.triton}.json"


class Unusable(ValueError):
    """Why a table is not used."""


class NewerFormat(Unusable):
    """It was written by a later version of this package."""


def parse(text: str, here: Where, exact: bool) -> tuple[Table, int]:
    """The table in a file's text, and how many of its entries name tiles that this version does not have.

    exact: it must be for this very device, not only for its family. Raises Unusable with the reason.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise Unusable(f"is not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise Unusable("is not a table of fusedmlp's")
    if content["format"] > FORMAT:
        raise NewerFormat(f"has format {content['format']}, and this version of fusedmlp reads {FORMAT}")
    for name in ("device", "family", "triton") if exact else ("family", "triton"):
        if content.get(name) != getattr(here, name):
            raise Unusable(f"is for {name} {content.get(name)!r}, and here is {getattr(here, name)!r}")
    try:
        products = dict(_product(entry) for entry in content["products"])
        source = f"{content['device']}, Triton {content['triton']}, {content['date']}"
        stretches = dict(_stretch(entry, source) for entry in content["stretches"])
    except (KeyError, TypeError, ValueError) as error:
        raise Unusable(f"has an entry that is none ({type(error).__name__}: {error})") from None
    known = {key: product for key, product in products.items() if _offered(key, product.tile)}
    return Table(known, stretches), len(products) - len(known)


def _product(entry: Any) -> tuple[ProductKey, Product]:
    operation, kind, rows, N, K, tile, us, torch_us = entry
    _check(operation in OPERATIONS and kind in CANDIDATES[operation], entry)
    _check(all(type(size) is int and size > 0 for size in (rows, N, K)) and bucket(rows) == rows, entry)
    return (operation, kind, rows, N, K), Product(Tile(*tile), *_times(us, torch_us, entry))


def _stretch(entry: Any, source: str) -> tuple[StretchKey, Stretch]:
    mode, kind, rows, widths, final_relu, in_one, us, torch_us = entry
    _check(mode in MODES and kind in CANDIDATES["forward"], entry)
    _check(type(final_relu) is bool and type(in_one) is bool, entry)
    _check(all(type(size) is int and size > 0 for size in (rows, *widths)) and bucket(rows) == rows, entry)
    _check(len(widths) >= 2, entry)
    times = _times(us, torch_us, entry)
    return (mode, kind, rows, tuple(widths), final_relu), Stretch(*times, in_one, source)


def _times(us: Any, torch_us: Any, entry: Any) -> tuple[float, float]:
    for time in (us, torch_us):
        _check(type(time) in (int, float) and math.isfinite(time) and time > 0, entry)
    return float(us), float(torch_us)


def _check(right: bool, entry: Any) -> None:
    if not right:
        raise ValueError(json.dumps(entry)[:200])


def _offered(key: ProductKey, tile: Tile) -> bool:
    operation, kind, _, N, K = key
    regular = N % 16 == 0 and K % 16 == 0
    return tile in CANDIDATES[operation][kind] if regular else tile == IRREGULAR[kind]


def to_text(here: Where, about: dict[str, str], table: Table) -> str:
    """A table as a file: what it was measured on and with, then an entry a line."""

    def lines(entries: Sequence[Any]) -> str:
        return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in entries) + "\n ]"

    head = {"format": FORMAT, "device": here.device, "family": here.family, "triton": here.triton} | about
    products = [
        [*key, product.tile, round(product.us, 2), round(product.torch_us, 2)]
        for key, product in sorted(table.products.items())
    ]
    stretches = [
        [*key, stretch.in_one, round(stretch.us, 2), round(stretch.torch_us, 2)]
        for key, stretch in sorted(table.stretches.items())
    ]
    parts = [f' "{name}": {json.dumps(value)}' for name, value in head.items()]
    parts += [f' "products": {lines(products)}', f' "stretches": {lines(stretches)}']
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read(file: pathlib.Path, here: Where, exact: bool) -> Table | None:
    """The table in a file, or None where there is none, or, with a warning, none that can be used."""
    table = None
    try:
        table, strange = parse(file.read_text(encoding="utf-8"), here, exact)
        if not strange:
            return table
        problem = f"has {strange} entries with tiles that this version of fusedmlp has not; they are not used"
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read ({type(error).__name__}: {error}); it is not used"
    except Unusable as error:
        problem = f"{error}; it is not used"
    warnings.warn(
        f"the table of measurements {file} {problem}. Delete it, or measure anew with fusedmlp.tune or "
        "python -m fusedmlp tune",
        stacklevel=2,
    )
    return table


def in_a_distributed_job() -> bool:
    """Whether other processes have to choose as this one does; their files may differ, and change."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size() > 1
    world = os.environ.get("WORLD_SIZE", "1")
    return world.isdigit() and int(world) > 1


# Of each device the table that all ranks of a distributed job agreed upon.
_agreed: dict[int | None, Table] = {}


def _read(index: int | None) -> Table:
    here = where(index)
    ours = read(shipped_file(here), here, exact=False)
    theirs = _agreed.get(index)
    if theirs is None and not in_a_distributed_job():
        theirs = read(users_file(here), here, exact=True)
    both = Table()
    for table in (ours, theirs):
        if table is not None:
            both = both.joined(table)
    return both


@functools.cache
def table_of(index: int | None) -> Table:
    """What is known of CUDA device ``index``, or of Triton's interpreter for None; read once."""
    return _read(index)


forget: Callable[[], None] = table_of.cache_clear  # the files have changed


def agree(index: int | None, table: Table) -> None:
    """From now on use this table and no file of the user's."""
    _agreed[index] = table
    forget()


def disagree(index: int | None) -> None:
    """Back to the files."""
    _agreed.pop(index, None)
    forget()
