"""What verify found: as data, as a table, and as one truth."""

import collections
import dataclasses
import math
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from fusedmlp.dispatch import predicate
from fusedmlp.inspection.explain import Explanation

Verdict = Literal["right", "WRONG", "unknown", "skipped"]

_WIDTH = 80
_MOST_LINES = 24  # of a table, before rows that are alike become one


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor: the error of the fused result and that of PyTorch's own.

    The errors are the largest ones against float64, as parts of the largest value; ratio is that of the two,
    or of their RMS if that is more. Without a float64 result error is the difference from PyTorch's, the
    rest is NaN and the verdict ``"unknown"``, but where fused and plain are the same bits.
    """

    name: str
    error: float
    torchs_error: float
    ratio: float
    verdict: Verdict
    problem: str | None


@dataclasses.dataclass(frozen=True)
class Check:
    """One further check: how many runs it made, the worst ratio, and what was wrong or why it was skipped."""

    name: str
    verdict: Verdict
    runs: int
    ratio: float
    problems: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Verification:
    """What :func:`verify` found: true if all holds, ``str()`` of it is a table, ``to_dict()`` plain data.

    rows of the output and of every gradient; checks; failures: why what was not compared keeps it from being
    true; notes: what to know besides; explanation: what :func:`explain` says of the fused run, if it ran.
    """

    rows: tuple[Row, ...]
    checks: tuple[Check, ...]
    failures: tuple[str, ...]
    notes: tuple[str, ...]
    explanation: Explanation | None

    def __bool__(self) -> bool:
        bad = verdicts(self.rows, self.checks) & {"WRONG", "unknown"}
        return bool(self.rows) and not self.failures and not bad

    def to_dict(self) -> dict[str, Any]:
        """Dicts, tuples, strings and numbers, fit for ``json.dumps``."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        wrong = "WRONG" in verdicts(self.rows, self.checks)
        verdict = "right" if self else "WRONG" if wrong else "unknown"
        paragraphs = [f"{verdict}: {_where(self.explanation)}", *self.failures]
        parts = ["\n".join(map(_paragraph, paragraphs))]
        if self.rows:
            parts.append("\n".join(_table(self.rows)))
        if self.checks:
            parts.append("\n".join(line for check in self.checks for line in _lines_of_check(check)))
        parts.append("\n".join(map(_paragraph, (*self.notes, _LEGEND))))
        return "\n\n".join(parts)


_LEGEND = (
    "Errors are against float64, as parts of the largest value. Right: at most 2 times PyTorch's own, the "
    "largest and in RMS, and two units in the last place of float32."
)


def verdicts(rows: Iterable[Row], checks: Iterable[Check]) -> set[Verdict]:
    return {row.verdict for row in rows} | {check.verdict for check in checks}


def is_gradient(name: str) -> bool:
    return name.startswith("gradient of ")


def _where(explanation: Explanation | None) -> str:
    """On what the layers ran."""
    if explanation is None:
        return "on what the fused layers run is not known."
    counts: dict[str | None, list[int]] = {}
    for row in explanation.rows:
        count = counts.setdefault(row.reason, [0, 0])
        count[0] += len(row.layers)
        count[1] += 1
    parts = []
    for reason, (layers, stretches) in counts.items():
        many = f"{layers} layer{'s'[: layers != 1]} in {stretches} stretch{'es' if stretches != 1 else ''}"
        if reason is None:
            slow = ", in Triton's interpreter" if predicate.kernels().interpreting() else ""
            parts.append(f"{many} on the Triton kernels{slow}")
        else:
            parts.append(f"{many} on PyTorch's operators: {reason}")
    if explanation.compiled:
        parts.append("what torch.compile traced as its own code")
    if not parts:
        parts.append("no fused layer ran")
    if explanation.layers_not_fused:
        count_plain = len(explanation.layers_not_fused)
        parts.append(f"{count_plain} plain torch.nn.Linear, which fusedmlp.fuse(model) changes")
    return "; ".join(parts) + "."


def _table(rows: tuple[Row, ...]) -> Iterator[str]:
    yield f"{'':44}{'error':>9}{'PyTorch':>9}{'ratio':>8}  verdict"
    groups: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:  # in a long table those that are right and differ in numbers in their names only are one
        alike = len(rows) > _MOST_LINES and row.verdict == "right"
        groups[re.sub(r"\d+", "*", row.name) if alike else row.name].append(row)
    before = False
    for name, group in groups.items():
        if is_gradient(name) and not before:
            yield "gradient of"
        before = is_gradient(name)
        many = f", worst of {len(group)}" if len(group) > 1 else ""
        name = "  " + name.removeprefix("gradient of ") if before else name
        room = 44 - len(many)
        name = name if len(name) <= room else name[:5] + "..." + name[8 - room :]
        worst = max(group, key=lambda row: row.ratio)
        yield (
            f"{name + many:44}{_number(worst.error, '.1e'):>9}{_number(worst.torchs_error, '.1e'):>9}"
            f"{_number(worst.ratio, '.2f'):>8}  {worst.verdict}"
        )
        if worst.problem is not None:
            yield _paragraph(worst.problem, "      ")


def _lines_of_check(check: Check) -> list[str]:
    name = check.name + (f", {check.runs} combinations" if check.runs > 1 else "")
    lines = [f"{name:62}{_number(check.ratio, '.2f'):>8}  {check.verdict}"]
    lines += [_paragraph(problem, "    ") for problem in check.problems[:3]]
    return lines + ([f"    and {len(check.problems) - 3} more"] if len(check.problems) > 3 else [])


def _number(number: float, form: str) -> str:
    return "-" if math.isnan(number) else format(number, form if number < 1000 else ".1e")


def _paragraph(text: str, start: str = "") -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)
