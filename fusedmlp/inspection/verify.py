"""``verify(model, x)``: is what is fused as right as PyTorch, on this model and these data?"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fusedmlp.dispatch import predicate
from fusedmlp.inspection.explain import Explanation, explain
from fusedmlp.inspection.verify_report import Check, Row, Verdict, Verification, is_gradient, verdicts
from fusedmlp.inspection.verify_runs import Ask, Run, Runs, in_words
from fusedmlp.torch_tools import accuracy

_MOST_SETTINGS = 32  # of requires_grad


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
    result = _verification(model, x, loss_fn)
    if verbose:
        print(result)
    return result


def _verification(
    model: torch.nn.Module, x: Any, loss_fn: Callable[[Any], torch.Tensor] | None
) -> Verification:
    leaves = [*model.parameters(), *model.buffers(), *tree_leaves(x)]
    tensors = [t for t in leaves if isinstance(t, torch.Tensor) and not torch.nn.parameter.is_lazy(t)]
    if any(tensor.is_meta for tensor in tensors):
        return Verification((), (), ("On the meta device there are no numbers to compare.",), (), None)
    # What was made in inference mode has no gradients, and runs in that mode only.
    inference = any(isinstance(t, torch.nn.Parameter) and t.is_inference() for t in tensors)
    with (
        torch.inference_mode(inference),
        torch.set_grad_enabled(not inference),
        Runs(model, x, loss_fn).put_back() as runs,
    ):
        return _Verifier(runs).result()


class _Verifier:
    """Runs, compares and gathers what is to be said."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.notes: list[str] = []
        self.failures: list[str] = []
        self.factor, self.floor = accuracy.FACTOR, accuracy.FLOOR
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
            self.explain()  # as far as can be
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
        args, kwargs = self.runs.arguments()
        try:
            self.explanation = explain(self.runs.model, *args, **kwargs)
        except Exception:  # most likely as the fused run did
            return
        on_kernels = {row.dtype for row in self.explanation.rows if row.reason is None}
        if "bfloat16" in on_kernels and predicate.kernels().interpreting():
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
                try:
                    yield self.row(ask, name, ours, torchs, exact.get(name))
                except Exception as error:  # on tensors of kinds that have no errors to measure
                    problem = f"it cannot be compared: {in_words(error)}"
                    yield Row(name, math.nan, math.nan, math.nan, "unknown", problem)
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
            found = accuracy.compare(ours, torchs, torchs, self.factor, self.floor)
            error = found.errors[0] / (found.largest or 1.0)
            if error == 0 and found.problem is None:
                return Row(name, 0.0, math.nan, 1.0, "right", None)
            return Row(name, error, math.nan, math.nan, "unknown", "it differs from PyTorch's")
        found = accuracy.compare(ours, torchs, exact, self.factor, self.floor)
        if found.problem is not None:
            known = self.errors_nearby(ask).get(name, (0.0, 0.0))
            found = accuracy.compare(ours, torchs, exact, self.factor, self.floor, known)
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
                        errors = accuracy.errors_of(value, right)
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
        found: set[Verdict] = set()
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
                found.add("WRONG")
                problems.append(f"{where}only the fused model raises {in_words(error)}")
                continue
            for row in self.rows(ask, fused, plain):
                found.add(row.verdict)
                ratios += [row.ratio] if not math.isnan(row.ratio) else []
                if row.problem is not None:
                    problems.append(f"{where}{row.name}: {row.problem}")
        verdict: Verdict = next((v for v in _WORST_FIRST if v in found), "skipped")
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


def _wrong(name: str, problem: str) -> Row:
    return Row(name, math.nan, math.nan, math.inf, "WRONG", problem)


def _ratio(error: float, torchs_error: float) -> float:
    return error / torchs_error if torchs_error else 1.0 if error == 0 else math.inf
