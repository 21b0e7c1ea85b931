"""``verify(model, x)``: is what is fused as right as PyTorch, on this model and these data?"""

import collections
import contextlib
import dataclasses
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch

from fusedmlp import _dispatch, _measure
from fusedmlp._explain import Explanation, explain
from fusedmlp._runs import Ask, Run, Runs, in_words

Verdict = Literal["right", "WRONG", "unknown", "skipped"]

_WIDTH = 80
_MOST_SETTINGS = 32  # of requires_grad
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
        bad = _verdicts(self.rows, self.checks) & {"WRONG", "unknown"}
        return bool(self.rows) and not self.failures and not bad

    def to_dict(self) -> dict[str, Any]:
        """Dicts, tuples, strings and numbers, fit for ``json.dumps``."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        wrong = "WRONG" in _verdicts(self.rows, self.checks)
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


def verify(
    model: torch.nn.Module,
    x: Any,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    *,
    verbose: bool = True,
) -> Verification:
    """Compare the model as it runs fused and as it runs on ``torch.nn`` with float64, on these data.

    x: the input, or a tuple of positional, or a dict of keyword arguments. ``loss_fn(output)`` is the scalar
    whose gradients are taken; without it, the output times fixed random numbers. Fused is what runs under the
    settings of the caller, ``with fusedmlp.backend("triton")`` for one; plain is the same model with the
    layers of ``torch.nn``, not compiled; exact is a copy whose every operator computes in float64. Each draws
    the same random numbers. Then, where the plain model can do it: parameters and inputs frozen, in up to 32
    combinations; a gradient of stride 0 and a transposed one; backward twice; the gradient of the gradient's
    norm; and that nothing was written to that the plain model leaves alone.

    Prints the table, unless ``verbose=False``, and returns it as an object that is true if all holds. Raises
    TypeError unless model is a ``torch.nn.Module`` and ValueError unless the loss is a scalar. What the plain
    model raises comes through; what only the fused one raises makes the result false. Parameters, gradients,
    modes, buffers, attributes and the global random states are put back, and x is not written to.

    What fails is measured again, against the worst of PyTorch's own errors on 8 inputs and parameters one
    rounding away: where the input of a ReLU is close to 0 its gradient jumps, in PyTorch too. The model's
    hooks are called in every run, and no other thread should run it meanwhile.

    >>> assert fusedmlp.verify(fusedmlp.MLP(784, [256, 128], 10), torch.randn(128, 784))
    right: 3 layers in 1 stretch on PyTorch's operators: x is on the cpu, ...
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"verify takes a torch.nn.Module, not {type(model).__name__}")
    # What was made in inference mode has no gradients, and runs in that mode only.
    inference = any(parameter.is_inference() for parameter in model.parameters())
    with (
        torch.inference_mode(inference),
        torch.set_grad_enabled(not inference),
        Runs(model, x, loss_fn).put_back() as runs,
    ):
        result = _Verifier(runs).result()
    if verbose:
        print(result)
    return result


class _Verifier:
    """Runs, compares and gathers what is to be said."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.notes: list[str] = []
        self.failures: list[str] = []
        self.factor, self.floor = _measure.FACTOR, _measure.FLOOR
        self.explanation: Explanation | None = None
        self.written: set[str] = set()
        self.nearby: dict[Ask, dict[str, tuple[float, float]]] = {}

    def result(self) -> Verification:
        rows: list[Row] = []
        checks: list[Check] = []
        plain, self.notes = self.runs.probe()
        try:
            fused = self.runs.fused("loss", self.runs.leaves)
        except Exception as error:
            checks = [Check("run", "WRONG", 1, math.nan, (f"only the fused model raises {in_words(error)}",))]
            with contextlib.suppress(Exception):
                self.explain()
        else:
            self.explain()
            rows = list(self.rows("loss", fused, plain))
            if not rows:
                self.failures.append("There is no output of floating-point numbers to compare.")
            if any(value is not None for name, value in plain.results.items() if _is_gradient(name)):
                checks = list(self.checks())
            else:
                self.notes.append(
                    "No output depends on anything that requires grad: no gradients to compare."
                )
        unknown = "unknown" in _verdicts(rows, checks)
        (self.failures if unknown else self.notes).extend(dict.fromkeys(self.runs.exact_problems.values()))
        return Verification(
            tuple(rows), tuple(checks), tuple(self.failures), tuple(self.notes), self.explanation
        )

    def explain(self) -> None:
        args, kwargs = self.runs.arguments()
        self.explanation = explain(self.runs.model, *args, **kwargs)
        on_kernels = {row.dtype for row in self.explanation.rows if row.reason is None}
        if "bfloat16" in on_kernels and _dispatch.kernels().interpreting():
            self.factor, self.floor = 4.0, torch.finfo(torch.bfloat16).eps
            self.notes.append(
                "Triton's interpreter truncates to bfloat16 where a GPU rounds: here 4 times PyTorch's own "
                "error and one unit in the last place of bfloat16 are allowed."
            )

    @property
    def compiled(self) -> bool:
        return self.explanation is not None and self.explanation.compiled

    def rows(self, ask: Ask, fused: Run, plain: Run) -> Iterator[Row]:
        """A row for each result that there is."""
        self.written |= fused.written - plain.written
        exact = self.runs.exact(ask)
        for name in dict.fromkeys((*plain.results, *fused.results)):
            ours, torchs = fused.results.get(name), plain.results.get(name)
            if ours is not None and torchs is not None:
                yield self.row(ask, name, ours, torchs, exact.get(name))
            elif ours is not None:
                yield _wrong(name, "there is one, and PyTorch has none")
            elif torchs is not None:
                yield _wrong(name, "it is missing")

    def row(
        self, ask: Ask, name: str, ours: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor | None
    ) -> Row:
        for what in ("dtype", "shape", "device"):
            if getattr(ours, what) != getattr(torchs, what):
                return _wrong(name, f"its {what} is {getattr(ours, what)}, PyTorch's {getattr(torchs, what)}")
        if exact is None or exact.shape != torchs.shape:
            # The plain result in the place of the exact one: the error is the difference.
            found = _measure.compare(ours, torchs, torchs, self.factor, self.floor)
            error = found.errors[0] / (found.largest or 1.0)
            if error == 0 and found.problem is None:
                return Row(name, 0.0, math.nan, 1.0, "right", None)
            return Row(name, error, math.nan, math.nan, "unknown", "it differs from PyTorch's")
        found = _measure.compare(ours, torchs, exact, self.factor, self.floor)
        if found.problem is not None:
            known = self.errors_nearby(ask).get(name, (0.0, 0.0))
            found = _measure.compare(ours, torchs, exact, self.factor, self.floor, known)
        # What is 0 but for rounding has nothing larger to be measured by than its error.
        scale = max(found.largest, found.torchs_errors[0]) or 1.0
        return Row(
            name,
            found.errors[0] / scale,
            found.torchs_errors[0] / scale,
            max(map(_ratio, found.errors, found.torchs_errors)),
            "WRONG" if found.problem else "right",
            found.problem,
        )

    def errors_nearby(self, ask: Ask) -> dict[str, tuple[float, float]]:
        """The largest of PyTorch's own errors from a rounding away, for what is then finite."""
        if ask not in self.nearby:
            worst = self.nearby[ask] = {}
            exact = self.runs.exact(ask)
            for results in self.runs.nearby(ask):
                for name, value in results.items():
                    right = exact.get(name)
                    if value is not None and right is not None and value.numel():
                        errors = _measure.errors_of(value, right)
                        if all(map(math.isfinite, errors)):
                            before = worst.get(name, errors)
                            worst[name] = max(before[0], errors[0]), max(before[1], errors[1])
        return self.nearby[ask]

    def checks(self) -> Iterator[Check]:
        settings = _settings(self.runs.leaves, self.runs.as_given)
        if self.compiled:
            settings = settings[:3]  # for each the compiler starts anew
        yield self.check("frozen parameters", "loss", settings)
        everything = [frozenset(self.runs.leaves)]
        for name, ask in _FURTHER.items():
            yield self.check(name, ask, everything)
        problems = tuple(f"it writes to {name}" for name in sorted(self.written))
        yield Check("nothing written to", "WRONG" if problems else "right", 0, math.nan, problems)

    def check(self, name: str, ask: Ask, settings: list[frozenset[str]]) -> Check:
        problems: list[str] = []
        skipped: list[str] = []
        verdicts: set[Verdict] = set()
        ratios: list[float] = []
        runs = 0
        for needs in settings:
            where = "" if len(settings) == 1 else _setting(needs, self.runs.leaves) + ": "
            try:
                plain = self.runs.plain(ask, needs)
            except Exception as error:
                skipped.append(f"{where}the plain model raises {in_words(error)}")
                continue
            runs += 1
            try:
                fused = self.runs.fused(ask, needs)
            except Exception as error:
                if self.compiled and "compile" in str(error):
                    skipped.append(f"{where}{in_words(error)}")  # its own limits are none of ours
                    continue
                verdicts.add("WRONG")
                problems.append(f"{where}only the fused model raises {in_words(error)}")
                continue
            for row in self.rows(ask, fused, plain):
                verdicts.add(row.verdict)
                ratios += [row.ratio] if not math.isnan(row.ratio) else []
                if row.problem is not None:
                    problems.append(f"{where}{row.name}: {row.problem}")
        verdict: Verdict = next((v for v in _WORST_FIRST if v in verdicts), "skipped")
        return Check(name, verdict, runs, max(ratios, default=math.nan), (*problems, *skipped))


_WORST_FIRST: tuple[Verdict, ...] = ("WRONG", "unknown", "right")
_FURTHER: dict[str, Ask] = {
    "stride-0 gradient": "stride 0",
    "transposed gradient": "transposed",
    "backward twice": "twice",
    "double backward": "double",
}


def _settings(leaves: list[str], as_given: frozenset[str]) -> list[frozenset[str]]:
    """Which of them require grad in each run: of few all combinations, of many each alone on or off, and all
    from the first to one frozen; evenly picked, if they are very many."""
    everything = frozenset(leaves)
    settings = [as_given, frozenset(), everything]
    if 2 ** len(leaves) <= _MOST_SETTINGS:
        choices = itertools.product((False, True), repeat=len(leaves))
        settings += [frozenset(itertools.compress(leaves, choice)) for choice in choices]
    else:
        count = min(len(leaves), (_MOST_SETTINGS - len(settings)) // 3)
        for number in range(count):
            at = number * len(leaves) // count
            settings += [frozenset([leaves[at]]), everything - {leaves[at]}, frozenset(leaves[at:])]
    return list(dict.fromkeys(settings))


def _setting(needs: frozenset[str], leaves: list[str]) -> str:
    frozen = [leaf for leaf in leaves if leaf not in needs]
    if not frozen or not needs:
        return "all frozen" if frozen else "none frozen"
    if len(frozen) <= len(needs):
        return f"{', '.join(frozen)} frozen"
    return f"all but {', '.join(leaf for leaf in leaves if leaf in needs)} frozen"


def _verdicts(rows: Iterable[Row], checks: Iterable[Check]) -> set[Verdict]:
    return {row.verdict for row in rows} | {check.verdict for check in checks}


def _is_gradient(name: str) -> bool:
    return name.startswith("gradient of ")


def _wrong(name: str, problem: str) -> Row:
    return Row(name, math.nan, math.nan, math.inf, "WRONG", problem)


def _ratio(error: float, torchs_error: float) -> float:
    return error / torchs_error if torchs_error else 1.0 if error == 0 else math.inf


def _where(explanation: Explanation | None) -> str:
    """On what the layers ran."""
    if explanation is None:
        return "the fused model did not run."
    counts: dict[str | None, list[int]] = {}
    for row in explanation.rows:
        count = counts.setdefault(row.reason, [0, 0])
        count[0] += len(row.layers)
        count[1] += 1
    parts = []
    for reason, (layers, stretches) in counts.items():
        many = f"{layers} layer{'s'[: layers != 1]} in {stretches} stretch{'es' if stretches != 1 else ''}"
        if reason is None:
            slow = ", in Triton's interpreter" if _dispatch.kernels().interpreting() else ""
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
        if _is_gradient(name) and not before:
            yield "gradient of"
        before = _is_gradient(name)
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
