"""Tables of measurements, from which tiles and paths are chosen, read from JSON files.

Each file is for one minor version of Triton, because their compilers differ too much to share measurements.
Our files lie beside this module, one for each family of devices. The user's file is for one exact device, is
in the platform's cache folder, and takes precedence over ours.
"""

import dataclasses
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

from .tiles import ITEMSIZE, OPERATIONS, Tile, candidates

FORMAT = 1
MODES = ("inference", "training")


class Product(NamedTuple):
    """One product of a layer: our fastest tile, its microseconds, and those of PyTorch's operator.

    "forward" is ``relu(x @ weight.T + bias)``; "grad_weight" is ``grad_z.T @ x``; "grad_input" is
    ``grad_z @ weight`` with the mask and the bias gradient of the layer below. After PyTorch's operator, our
    relu_backward computes these two.
    """

    tile: Tile
    us: float
    torch_us: float


class Stretch(NamedTuple):
    """Microseconds of a whole chain of layers, including launching, by our kernels and by eager PyTorch.

    "inference" is the forward; "training" is forward and backward with every gradient. in_one: the kernels
    were faster with one launch for all layers (see narrow/) than with one for each layer. source: the device,
    Triton and date of the measurement.
    """

    us: float
    torch_us: float
    in_one: bool
    source: str


ProductKey = tuple[str, str, int, int, int]  # operation, arithmetic, bucket of M, N, K
StretchKey = tuple[str, str, int, tuple[int, ...], bool]  # mode, arithmetic, bucket of M, widths, final_relu


def bucket(M: int) -> int:
    """The power of two nearest to M, by ratio. One measurement is used for all M of a bucket."""
    if M < 1:
        return 0
    below = 1 << (M.bit_length() - 1)
    return below if 2 * below**2 > M**2 else 2 * below


@dataclasses.dataclass(eq=False)
class Table:
    """The measurements of one device. Hashed by identity, so a table that is read again is new to caches."""

    products: dict[ProductKey, Product] = dataclasses.field(default_factory=dict)
    stretches: dict[StretchKey, Stretch] = dataclasses.field(default_factory=dict)

    def product(self, operation: str, kind: str, M: int, N: int, K: int) -> Product | None:
        """The measurement of this product with about M rows, or None."""
        return self.products.get((operation, kind, bucket(M), N, K))

    def in_one_launch(
        self, mode: str, kind: str, M: int, widths: tuple[int, ...], final_relu: bool
    ) -> bool | None:
        """Whether these layers were faster in one launch; None if nothing was measured.

        False if only products of single layers were measured, because their tiles need one launch per layer.
        """
        whole = self.stretches.get((mode, kind, bucket(M), widths, final_relu))
        if whole is not None:
            return whole.in_one
        layers = itertools.pairwise(widths)
        known = any(self.product(operation, kind, M, N, K) for K, N in layers for operation in OPERATIONS)
        return False if known else None

    def joined(self, other: "Table") -> "Table":
        """A table with the entries of both; the other's take precedence."""
        return Table(self.products | other.products, self.stretches | other.stretches)

    @functools.lru_cache(4096)  # noqa: B019  # called for every chain, with any batch size; tables are few
    def stretch(
        self, mode: str, kind: str, M: int, widths: tuple[int, ...], final_relu: bool
    ) -> tuple[Stretch, str] | None:
        """``(measurement of this chain with about M rows, how it was found in words)``, or None.

        Either the chain was measured as a whole, or each of its layers was, and their times are added. The
        sum is an upper limit: a chain saves launches and passes.
        """
        rows, last = bucket(M), len(widths) - 2
        whole = self.stretches.get((mode, kind, rows, widths, final_relu))
        if whole is not None:
            return whole, "as a whole"
        layers = enumerate(itertools.pairwise(widths))
        found = [self.stretches.get((mode, kind, rows, layer, final_relu or i < last)) for i, layer in layers]
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None
        us, torch_us = sum(s.us for s in known), sum(s.torch_us for s in known)
        return Stretch(us, torch_us, False, known[0].source), "as the sum of its layers"


class Where(NamedTuple):
    """The device and the compiler that a table is for."""

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
    """The user's own table, in the platform's cache folder (~/.cache on Linux)."""
    try:
        import platformdirs

        folder = platformdirs.user_cache_path("fusedmlp")
    except ImportError:  # use its result for Linux
        caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        folder = caches / "fusedmlp"
    slug = re.sub(r"[^A-Za-z0-9]+", "-", here.device).strip("-")
    return folder / f"tuned_{slug}_triton_{here.triton}.json"


class Unusable(ValueError):
    """A file cannot be used as a table; the message says why."""


class NewerFormat(Unusable):
    """The file was written by a later version of this package."""


def parse(text: str, here: Where, exact: bool) -> tuple[Table, int]:
    """``(table, number of entries left out)`` of a file's text.

    Entries with tiles that this version does not have are left out. exact: the table must be for this exact
    device, not only for its family. Raises Unusable with the reason.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise Unusable(f"is not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise Unusable("is not a table written by fusedmlp")
    if content["format"] > FORMAT:
        raise NewerFormat(f"has format {content['format']}, and this version of fusedmlp reads {FORMAT}")
    for name in ("device", "family", "triton") if exact else ("family", "triton"):
        if content.get(name) != getattr(here, name):
            raise Unusable(f"is for {name} {content.get(name)!r}, but this is {getattr(here, name)!r}")
    try:
        products = dict(_product(entry) for entry in content["products"])
        source = f"{content['device']}, Triton {content['triton']}, {content['date']}"
        stretches = dict(_stretch(entry, source) for entry in content["stretches"])
    except (KeyError, TypeError, ValueError) as error:
        raise Unusable(f"has an invalid entry ({type(error).__name__}: {error})") from None
    known = {
        (operation, kind, M, N, K): product
        for (operation, kind, M, N, K), product in products.items()
        if product.tile in candidates(kind, aligned=N % 16 == 0 and K % 16 == 0)
    }
    return Table(known, stretches), len(products) - len(known)


def _product(entry: Any) -> tuple[ProductKey, Product]:
    operation, kind, rows, N, K, tile, us, torch_us = entry
    _check(entry, operation in OPERATIONS, kind, (rows, N, K), (us, torch_us))
    if tile[5:] == [False]:  # files used to say of each tile that it does without tensor descriptors
        tile = tile[:5]
    return (operation, kind, rows, N, K), Product(Tile(*tile), float(us), float(torch_us))


def _stretch(entry: Any, source: str) -> tuple[StretchKey, Stretch]:
    mode, kind, rows, widths, final_relu, in_one, us, torch_us = entry
    valid = mode in MODES and type(final_relu) is type(in_one) is bool and len(widths) > 1
    _check(entry, valid, kind, (rows, *widths), (us, torch_us))
    key = mode, kind, rows, tuple(widths), final_relu
    return key, Stretch(float(us), float(torch_us), in_one, source)


def _check(entry: Any, valid: bool, kind: Any, sizes: tuple[Any, ...], times: tuple[Any, ...]) -> None:
    """Raise ValueError if the entry is not valid. sizes: the first is a number of rows."""
    if not (
        valid
        and kind in ITEMSIZE
        and all(type(size) is int and size > 0 for size in sizes)
        and bucket(sizes[0]) == sizes[0]
        and all(type(time) in (int, float) and 0 < time < math.inf for time in times)
    ):
        raise ValueError(json.dumps(entry)[:200])


def to_text(here: Where, about: dict[str, str], table: Table) -> str:
    """The text of a table's file: what it was measured on, then one entry on each line."""

    def lines(entries: Sequence[Any]) -> str:
        return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in entries) + "\n ]"

    head = {"format": FORMAT, **here._asdict(), **about}
    products = [[*key, p.tile, *_rounded(p)] for key, p in sorted(table.products.items())]
    stretches = [[*key, s.in_one, *_rounded(s)] for key, s in sorted(table.stretches.items())]
    parts = [f' "{name}": {json.dumps(value)}' for name, value in head.items()]
    parts += [f' "products": {lines(products)}', f' "stretches": {lines(stretches)}']
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _rounded(measured: Product | Stretch) -> tuple[float, float]:
    return round(measured.us, 2), round(measured.torch_us, 2)


def read(file: pathlib.Path, here: Where, exact: bool) -> Table | None:
    """The table in a file; None if there is no file; None with a warning if it cannot be used."""
    table = None
    try:
        table, left_out = parse(file.read_text(encoding="utf-8"), here, exact)
        if not left_out:
            return table
        problem = f"has {left_out} entries with tiles that this version of fusedmlp lacks; they are not used"
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read ({type(error).__name__}: {error}); it is not used"
    except Unusable as error:
        problem = f"{error}; it is not used"
    warnings.warn(
        f"the table of measurements {file} {problem}. Delete it, or measure again with fusedmlp.tune or "
        "python -m fusedmlp tune",
        stacklevel=2,
    )
    return table


def in_a_distributed_job() -> bool:
    """True if other processes must choose the same kernels as this one. Their users' files may differ."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size() > 1
    world = os.environ.get("WORLD_SIZE", "1")
    return world.isdigit() and int(world) > 1


# For each device, the table that all ranks of a distributed job have agreed on.
_agreed: dict[int | None, Table] = {}


def _read(index: int | None) -> Table:
    here = where(index)
    ours = read(shipped_file(here), here, exact=False)
    theirs = _agreed.get(index)
    if theirs is None and not in_a_distributed_job():
        theirs = read(users_file(here), here, exact=True)
    return (ours or Table()).joined(theirs or Table())


@functools.cache
def table_of(index: int | None) -> Table:
    """The table of CUDA device ``index``, or of Triton's interpreter for None; read once."""
    return _read(index)


forget: Callable[[], None] = table_of.cache_clear  # to be called after files have changed


def agree(index: int | None, table: Table) -> None:
    """From now on use this table instead of the user's file."""
    _agreed[index] = table
    forget()


def disagree(index: int | None) -> None:
    """From now on use the user's file again."""
    _agreed.pop(index, None)
    forget()
