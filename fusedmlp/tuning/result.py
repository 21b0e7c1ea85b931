"""The result of ``tune``, as plain data and as a table for a terminal."""

import dataclasses
from typing import Any, NamedTuple

_HEAD = f"{'kernels us':>11}{'PyTorch us':>11}{'ratio':>7}"


class Product(NamedTuple):
    """One product of a layer ``weight (N, K)`` with ``rows`` rows.

    tile, us: our fastest tile and its microseconds, None if no tile is accurate. problem: says which tiles
    were left out, and why.
    """

    operation: str
    rows: int
    N: int
    K: int
    tile: str | None
    us: float | None
    torch_us: float
    problem: str | None


class Stretch(NamedTuple):
    """A chain of layers as a whole, with launching; mode: "inference" or "training".

    in_one: True if one launch for all layers was faster than one launch per layer. problem: says why one
    launch for all was left out.
    """

    mode: str
    rows: int
    widths: tuple[int, ...]
    final_relu: bool
    in_one: bool
    us: float
    torch_us: float
    problem: str | None


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The measurements of :func:`tune`. ``str()`` makes a table for a terminal, ``to_dict()`` plain data.

    products, stretches: the products of single layers, and whole chains of layers, in microseconds;
    ``torch_us`` is eager PyTorch's time. left_out: says what was not measured, and why: there was no time or
    memory for it, or it failed. path: the file of the table.

    >>> fusedmlp.tune([(4096, 784, 256)]).products[0].tile
    '128x128x64, 8 warps'
    """

    device: str
    dtype: str
    products: tuple[Product, ...]
    stretches: tuple[Stretch, ...]
    left_out: tuple[str, ...]
    path: str

    def to_dict(self) -> dict[str, Any]:
        """Dicts, tuples, strings and numbers, fit for ``json.dumps``."""
        return vars(self) | {
            "products": [product._asdict() for product in self.products],
            "stretches": [chain._asdict() for chain in self.stretches],
        }

    def __str__(self) -> str:
        lines = [f"{self.device}, {self.dtype}"]
        if self.device == "interpreter":
            lines.append("Triton's interpreter: these times mean nothing.")
        if self.products:
            lines += ["", f"{'one product':<34}{_HEAD}  {'tile':<14}"]
        for p in self.products:
            what = f"{p.operation} {p.rows} x {p.K} -> {p.N}"
            lines.append(f"{what:<34}{_row(p.us, p.torch_us)}  {p.tile or 'none'}")
            lines += [f"    {p.problem}"] if p.problem else []
        if self.stretches:
            lines += ["", f"{'a chain, with launching':<34}{_HEAD}"]
        for s in self.stretches:
            what = f"{s.mode} {s.rows} x {'-'.join(map(str, s.widths))}{' ReLU' if s.final_relu else ''}"
            lines.append(f"{what:<34}{_row(s.us, s.torch_us)}{'  in one launch' if s.in_one else ''}")
            lines += [f"    in one launch: {s.problem}"] if s.problem else []
        if not self.products and not self.stretches:
            lines.append("All of this is in the table already. Delete the file to measure it again.")
        lines += ["", "ratio: PyTorch's time divided by ours. backend('auto') chooses the faster one."]
        lines += [f"left out: {what}" for what in self.left_out]
        return "\n".join([*lines, f"saved in {self.path}"])


def _row(us: float | None, torch_us: float) -> str:
    if us is None:
        return f"{'-':>11}{torch_us:>11.2f}{'-':>7}"
    return f"{us:>11.2f}{torch_us:>11.2f}{torch_us / us:>6.2f}x"
