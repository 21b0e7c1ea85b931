"""The report of ``fuse``: what happens to each Linear of a model, as data and as a table for a terminal."""

import collections
from typing import Any, NamedTuple

from fusedmlp.torch_tools.text import WIDTH, common_name, count, paragraph, pattern, shortened


class Row(NamedTuple):
    """One Linear: its names in the model (several if it is shared), its shape, and what fuse does to it.

    status is "pair in a Sequential", "pair in forward of X", "Linear only" or "left alone"; reason says in a
    few words why the Linear is not fused with a ReLU, and is empty if it is.
    """

    names: tuple[str, ...]
    in_features: int
    out_features: int
    status: str
    reason: str


class Report(NamedTuple):
    """What fuse does to a model: one row for each Linear, and how many Sequentials become fused ones.

    ``str(report)`` is a table for a terminal.

    >>> fusedmlp.convert.report(model).pairs
    2
    """

    rows: tuple[Row, ...]
    sequentials: int

    @property
    def pairs(self) -> int:
        """How many Linears are fused with their ReLU."""
        return sum(row.status.startswith("pair") for row in self.rows)

    @property
    def linears(self) -> int:
        """How many Linears the model has."""
        return len(self.rows)

    def __str__(self) -> str:
        head = f"{self.pairs} of {count(self.linears, 'Linear')} fused with ReLU"
        lines = [f"{head}, {count(self.sequentials, 'Sequential')} fused"]
        sections: dict[str, list[Row]] = collections.defaultdict(list)
        for row in sorted(self.rows, key=lambda row: not row.status.startswith("pair")):
            sections[f"{row.status}: {row.reason}" if row.reason else row.status].append(row)
        for title, rows in sections.items():
            lines += ["", paragraph(f"{title} ({len(rows)})"), *_table(rows)]
        return "\n".join(lines)


def _table(rows: list[Row]) -> list[str]:
    """Lines with name and shape; layers of one shape whose names differ only in numbers share a line."""
    alike: dict[Any, list[Row]] = collections.defaultdict(list)
    for row in rows:
        alike[pattern(row.names[0]), len(row.names), row.in_features, row.out_features].append(row)
    table = []
    for (_, names, in_features, out_features), same in alike.items():
        name = common_name([row.names[0] for row in same]) or "(the model)"
        others = f" (and {count(names - 1, 'other name')})" if names > 1 else ""
        times = f"  x {len(same)}" if len(same) > 1 else ""
        table.append((name + others, f"{in_features} -> {out_features}{times}"))
    room = WIDTH - len("    ") - max(len(shape) for _, shape in table)
    width = min(room, max(len(name) for name, _ in table))
    return [f"  {shortened(name, width):{width}}  {shape}" for name, shape in table]
