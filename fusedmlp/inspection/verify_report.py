"""The result of ``verify``: data, a table for a terminal, and true or false."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from fusedmlp.dispatch import predicate
from fusedmlp.inspection.explain import Explanation
from fusedmlp.torch_tools import text

Verdict = Literal["right", "WRONG", "unknown", "skipped"]

_MOST_LINES = 24  # of a table; in a longer one similar rows are shown as one


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor: the error of the fused result and that of PyTorch's own.

    The errors are the largest differences from float64, divided by the largest value. ratio is the quotient
    of the two errors, or of their RMS if that is larger. Without a float64 result, error is the difference
    from PyTorch's result, the other numbers are NaN, and the verdict is ``"right"`` if there is no
    difference, else ``"unknown"``.
    """

    name: str
    error: float
    torchs_error: float
    ratio: float
    verdict: Verdict
    problem: str | None


@dataclasses.dataclass(frozen=True)
class Check:
    """One further check: its number of runs, the worst ratio, and the problems or why it was skipped."""

    name: str
    verdict: Verdict
    runs: int
    ratio: float
    problems: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`, true if all is right. ``str()`` makes a table, ``to_dict()`` plain data.

    rows hold the output and every gradient, checks the further runs. failures say what could not be compared,
    and make the result false. notes hold further remarks. explanation is the result of :func:`explain` for
    the fused run, or None if it raised.
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
        """Return dicts, tuples, strings and numbers, fit for ``json.dumps``."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        wrong = "WRONG" in verdicts(self.rows, self.checks)
        verdict = "right" if self else "WRONG" if wrong else "unknown"
        parts = ["\n".join(map(text.paragraph, (f"{verdict}: {_where(self.explanation)}", *self.failures)))]
        if self.rows:
            parts.append("\n".join(_table(self.rows)))
        if self.checks:
            parts.append("\n".join(line for check in self.checks for line in _lines_of_check(check)))
        parts.append("\n".join(map(text.paragraph, (*self.notes, _LEGEND))))
        return "\n\n".join(parts)


_LEGEND = (
    "Errors are differences from float64, divided by the largest value. Right: the largest and the RMS error "
    "are at most 2 times PyTorch's own, plus two units in the last place of float32."
)


def verdicts(rows: Iterable[Row], checks: Iterable[Check]) -> set[Verdict]:
    return {row.verdict for row in rows} | {check.verdict for check in checks}


def is_gradient(name: str) -> bool:
    return name.startswith("gradient of ")


def _where(explanation: Explanation | None) -> str:
    """Sentences that say which implementation the layers ran on."""
    if explanation is None:
        return "it is not known on what the fused layers run."
    counts: dict[str | None, list[int]] = {}
    for row in explanation.rows:
        counts.setdefault(row.reason, []).append(len(row.layers))
    parts = []
    for reason, layers in counts.items():
        many = f"{text.count(sum(layers), 'layer')} in {text.count(len(layers), 'chain')}"
        if reason is None:
            slow = ", in Triton's interpreter" if predicate.kernels().interpreting() else ""
            parts.append(f"{many} on the Triton kernels{slow}.")
        else:
            parts.append(f"{many} on PyTorch's operators. {reason}")
    if not explanation.rows:
        parts.append("no fused layer ran.")
    if explanation.compiled:
        parts.append("Compiled parts of the model run torch.compile's own code.")
    if explanation.layers_not_fused:
        plain = len(explanation.layers_not_fused)
        parts.append(f"{plain} plain torch.nn.Linear, which fusedmlp.fuse(model) changes.")
    return " ".join(parts)


def _table(rows: tuple[Row, ...]) -> Iterator[str]:
    yield f"{'':44}{'error':>9}{'PyTorch':>9}{'ratio':>8}  verdict"
    groups: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        alike = len(rows) > _MOST_LINES and row.verdict == "right"
        groups[text.pattern(row.name) if alike else row.name].append(row)
    before = False
    for name, group in groups.items():
        if is_gradient(name) and not before:
            yield "gradient of"
        before = is_gradient(name)
        many = f", worst of {len(group)}" if len(group) > 1 else ""
        indent = "  " if before else ""
        name = indent + text.shortened(name.removeprefix("gradient of "), 44 - len(indent + many)) + many
        worst = max(group, key=lambda row: row.ratio)
        yield (
            f"{name:44}{_number(worst.error, '.1e'):>9}{_number(worst.torchs_error, '.1e'):>9}"
            f"{_number(worst.ratio, '.2f'):>8}  {worst.verdict}"
        )
        if worst.problem is not None:
            yield text.paragraph(worst.problem, "      ")


def _lines_of_check(check: Check) -> list[str]:
    name = check.name + (f", {check.runs} combinations" if check.runs > 1 else "")
    lines = [f"{name:62}{_number(check.ratio, '.2f'):>8}  {check.verdict}"]
    lines += [text.paragraph(problem, "    ") for problem in check.problems[:3]]
    return lines + ([f"    and {len(check.problems) - 3} more"] if len(check.problems) > 3 else [])


def _number(number: float, form: str) -> str:
    return "-" if math.isnan(number) else format(number, form if number < 1000 else ".1e")
