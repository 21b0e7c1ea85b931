"""What ``tune`` found, as plain data and as a table for a terminal."""

import dataclasses
from typing import Any, NamedTuple


class Product(NamedTuple):
    """One product of a layer ``weight (N, K)`` on ``rows``; tile: our fastest, None if all were wrong."""

    operation: str
    rows: int
    N: int
    K: int
    tile: str | None
    us: float | None
    torch_us: float
    problem: str | None  # of the tiles that were not right


class Stretch(NamedTuple):
    """One stretch as a whole, ``mode`` "inference" or "training", launching included.

    in_one: one launch for all of its layers was faster than one for each; problem: what was wrong with it.
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
    """What :func:`tune` measured: ``str()`` of it is a table for a terminal, ``to_dict()`` is plain data.

    Times are microseconds, ``torch_us`` those of eager PyTorch; left_out: shapes for which there was no time
    or no memory, and why; path: the file that holds all of it.
    """

    device: str
    dtype: str
    products: tuple[Product, ...]
    stretches: tuple[Stretch, ...]
    left_out: tuple[str, ...]
    path: str

    def to_dict(self) -> dict[str, Any]:
        """Dicts, tuples, strings and numbers, fit for ``json.dumps``."""
        return dataclasses.asdict(self) | {
            "products": [product._asdict() for product in self.products],
            "stretches": [stretch._asdict() for stretch in self.stretches],
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
            lines += ["", f"{'a stretch, with launching':<34}{_HEAD}"]
        for s in self.stretches:
            what = f"{s.mode} {s.rows} x {'-'.join(map(str, s.widths))}{' ReLU' if s.final_relu else ''}"
            lines.append(f"{what:<34}{_row(s.us, s.torch_us)}{'  in one launch' if s.in_one else ''}")
            lines += [f"    in one launch: {s.problem}"] if s.problem else []
        if not self.products and not self.stretches:
            lines.append("Everything asked for is in the table already; delete the file to measure anew.")
        lines += ["", "ratio: PyTorch's time by ours. backend('auto') takes what took less time here."]
        lines += [f"left out: {what}" for what in self.left_out]
        return "\n".join([*lines, f"saved in {self.path}"])


_HEAD = f"{'kernels us':>11}{'PyTorch us':>11}{'ratio':>7}"


def _row(us: float | None, torch_us: float) -> str:
    if us is None:
        return f"{'-':>11}{torch_us:>11.2f}{'-':>7}"
    return f"{us:>11.2f}{torch_us:>11.2f}{torch_us / us:>6.2f}x"
