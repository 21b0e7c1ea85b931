"""``verify(model, x)``: check that the fused results are as accurate as PyTorch's, on these data."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch.utils._pytree import tree_leaves

from fusedmlp.dispatch import predicate
from fusedmlp.inspection.explain import Explanation, explain
from fusedmlp.inspection.verify_report import Check, Row, Verdict, Verification, is_gradient, verdicts
from fusedmlp.inspection.verify_runs import Ask, Outcome, Runs, Value
from fusedmlp.torch_tools import accuracy
from fusedmlp.torch_tools.warn import first_line

_MOST_SETTINGS = 32  # of requires_grad


def verify(
    model: torch.nn.Module,
    x: Any,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    *,
    verbose: bool = True,
) -> Verification:
    """Compare the fused model and the same model on ``torch.nn`` with float64, on these data.

    x is the input, a tuple of positional arguments or a dict of keyword arguments, of any shapes and dtypes
    that the model takes. Gradients are those of the scalar ``loss_fn(output)``, or without a loss_fn of the
    output times fixed random numbers. Three models run: the fused one under the caller's settings, for
    example ``with fusedmlp.backend("triton")``; the plain one, with torch.nn's layers and not compiled; and a
    copy in which every operator computes in float64. Further checks are made if the plain model passes them:
    parameters and inputs frozen, in up to 32 combinations; an incoming gradient of stride 0 and a transposed
    one; backward twice; and the gradient of the gradient's norm. A last check finds tensors that the fused
    model writes to and the plain model does not.

    Prints a table, unless ``verbose=False``, and returns it as an object that is true if all results are
    right. The model, its gradients, modes and buffers, the global random states and x are left as they were.
    Raises TypeError unless model is a ``torch.nn.Module``, ValueError unless the loss is a scalar, and what
    the plain model raises. If only the fused model raises an error, the result is false.

    A model that draws random numbers, as dropout does in training mode, is not compared with float64, where
    the same seed gives other numbers: call ``model.eval()`` first. Without float64, a result that differs
    from the plain one is "unknown", and the object false.

    A result that fails is compared again with the largest of PyTorch's own errors on 8 copies of the inputs
    and parameters, each one rounding away, because the gradient of a ReLU whose input is close to 0 jumps, in
    PyTorch too. Hooks of the model are called in every run, and no other thread should use the model
    meanwhile.

    >>> assert fusedmlp.verify(fusedmlp.MLP(784, [256, 128], 10), torch.randn(128, 784))
    right: 3 layers in 1 chain on PyTorch's operators. The input is on the CPU; ...
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"verify takes a torch.nn.Module, not {type(model).__name__}")
    leaves = [*model.parameters(), *model.buffers(), *tree_leaves(x)]
    tensors = [t for t in leaves if isinstance(t, torch.Tensor) and not torch.nn.parameter.is_lazy(t)]
    if any(tensor.is_meta for tensor in tensors):
        result = Verification((), (), ("On the meta device there are no numbers to compare.",), (), None)
    else:
        # Parameters that were made in inference mode have no gradients and can be used in that mode only.
        inference = any(isinstance(t, torch.nn.Parameter) and t.is_inference() for t in tensors)
        with torch.inference_mode(inference), torch.set_grad_enabled(not inference):
            result = _Verifier(Runs(model, x, loss_fn)).result()
    if verbose:
        print(result)
    return result


class _Verifier:
    """Makes the runs, compares their results and collects the parts of the report."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.notes: list[str] = []
        self.failures: list[str] = []
        self.factor, self.floor = accuracy.FACTOR, accuracy.FLOOR
        self.explanation: Explanation | None = None
        self.compiled = False
        self.written: set[str] = set()

    def result(self) -> Verification:
        rows: list[Row] = []
        checks: list[Check] = []
        plain, self.notes = self.runs.first()
        try:
            fused = self.runs.run(self.runs.fused, "loss", self.runs.leaves)
        except Exception as error:
            problem = f"only the fused model raises {first_line(error)}"
            checks = [Check("run", "WRONG", 1, math.nan, (problem,))]
            self.explain()
        else:
            self.explain()
            rows = list(self.rows("loss", fused, plain))
            if not rows:
                self.failures.append("There is no output of floating-point numbers to compare.")
            if any(value is not None for name, value in plain.results.items() if is_gradient(name)):
                checks = list(self.checks())
            else:
                self.notes.append(
                    "No output depends on anything that requires grad: no gradients to compare."
                )
        unknown = "unknown" in verdicts(rows, checks)
        (self.failures if unknown else self.notes).extend(dict.fromkeys(self.runs.exact_problems.values()))
        return Verification(
            tuple(rows), tuple(checks), tuple(self.failures), tuple(self.notes), self.explanation
        )

    def explain(self) -> None:
        args, kwargs, _ = self.runs.arguments(self.runs.fused.change, self.runs.as_given)
        try:
            self.explanation = explain(self.runs.model, *args, **kwargs)
        except Exception:  # most likely the error of the fused run
            return
        finally:
            self.runs.put_parameters_back()
        self.compiled = self.explanation.compiled
        on_kernels = {row.dtype for row in self.explanation.rows if row.reason is None}
        if "bfloat16" in on_kernels and predicate.kernels().interpreting():
            self.factor, self.floor = 4.0, torch.finfo(torch.bfloat16).eps
            self.notes.append(
                "Triton's interpreter truncates to bfloat16 where a GPU rounds: here 4 times PyTorch's own "
                "error and one unit in the last place of bfloat16 are allowed."
            )

    def rows(self, ask: Ask, fused: Outcome, plain: Outcome) -> Iterator[Row]:
        """A row for each result of either run."""
        self.written |= fused.written - plain.written
        exact = self.runs.exact(ask)
        for name in dict.fromkeys((*plain.results, *fused.results)):
            ours, torchs = fused.results.get(name), plain.results.get(name)
            if ours is not None or torchs is not None:
                try:
                    yield self.row(ask, name, ours, torchs, exact.get(name))
                except Exception as error:  # errors of some kinds of tensors cannot be measured
                    problem = f"it cannot be compared: {first_line(error)}"
                    yield Row(name, math.nan, math.nan, math.nan, "unknown", problem)

    def row(self, ask: Ask, name: str, ours: Value, torchs: Value, exact: Value) -> Row:
        if torchs is None:
            return _wrong(name, "there is one, and PyTorch has none")
        if ours is None:
            return _wrong(name, "it is missing")
        for what in ("dtype", "shape", "device"):
            if getattr(ours, what) != getattr(torchs, what):
                return _wrong(name, f"its {what} is {getattr(ours, what)}, PyTorch's {getattr(torchs, what)}")
        if exact is None or exact.shape != torchs.shape:
            # Measured against the plain result, the error is the difference from it.
            found = accuracy.compare(ours, torchs, torchs, self.factor, self.floor)
            error = found.errors[0] / (found.largest or 1.0)
            if error == 0 and found.problem is None:
                return Row(name, 0.0, math.nan, 1.0, "right", None)
            return Row(name, error, math.nan, math.nan, "unknown", "it differs from PyTorch's")
        found = accuracy.compare(ours, torchs, exact, self.factor, self.floor)
        if found.problem is not None:
            known = self.runs.errors_nearby(ask).get(name, (0.0, 0.0))
            found = accuracy.compare(ours, torchs, exact, self.factor, self.floor, known)
        # If all exact values are 0, errors are relative to PyTorch's own.
        scale = max(found.largest, found.torchs_errors[0]) or 1.0
        return Row(
            name,
            found.errors[0] / scale,
            found.torchs_errors[0] / scale,
            max(map(_ratio, found.errors, found.torchs_errors)),
            "WRONG" if found.problem else "right",
            found.problem,
        )

    def checks(self) -> Iterator[Check]:
        settings = _settings(self.runs.leaves, self.runs.as_given)
        if self.compiled:
            settings = settings[:3]  # the model is compiled again for each
        yield self.check("frozen parameters", "loss", settings)
        for ask in get_args(Ask)[1:]:
            yield self.check(ask, ask, [frozenset(self.runs.leaves)])
        problems = tuple(f"it writes to {name}" for name in sorted(self.written))
        yield Check("nothing written to", "WRONG" if problems else "right", 0, math.nan, problems)

    def check(self, name: str, ask: Ask, settings: list[frozenset[str]]) -> Check:
        """Compare all results with only these leaves requiring grad, in each of the settings."""
        problems: list[str] = []
        skipped: list[str] = []
        found: list[Verdict] = ["skipped"]
        ratios: list[float] = []
        runs = 0
        for needs in settings:
            where = "" if len(settings) == 1 else _setting(needs, self.runs.leaves) + ": "
            try:
                plain = self.runs.run(self.runs.plain, ask, needs)
            except Exception as error:
                skipped.append(f"{where}the plain model raises {first_line(error)}")
                continue
            runs += 1
            try:
                fused = self.runs.run(self.runs.fused, ask, needs)
            except Exception as error:
                if self.compiled and "compile" in str(error):  # a limit of torch.compile
                    skipped.append(f"{where}{first_line(error)}")
                else:
                    found.append("WRONG")
                    problems.append(f"{where}only the fused model raises {first_line(error)}")
                continue
            for row in self.rows(ask, fused, plain):
                found.append(row.verdict)
                ratios += [row.ratio] if not math.isnan(row.ratio) else []
                if row.problem is not None:
                    problems.append(f"{where}{row.name}: {row.problem}")
        verdict = min(found, key=_WORST_FIRST.index)
        return Check(name, verdict, runs, max(ratios, default=math.nan), (*problems, *skipped))


_WORST_FIRST: tuple[Verdict, ...] = ("WRONG", "unknown", "right", "skipped")


def _settings(leaves: list[str], as_given: frozenset[str]) -> list[frozenset[str]]:
    """Sets of the leaves that require grad, one for each run.

    They are all combinations of a few leaves. Of many leaves, each in turn is the only one, the only one
    missing, or the first one; some are left out evenly, if that makes too many runs.
    """
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


def _wrong(name: str, problem: str) -> Row:
    return Row(name, math.nan, math.nan, math.inf, "WRONG", problem)


def _ratio(error: float, torchs_error: float) -> float:
    return error / torchs_error if torchs_error else 1.0 if error == 0 else math.inf
