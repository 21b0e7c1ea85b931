"""Gather what works with PyTorch's tools from the tests that show it, and write docs/compatibility.md.

A test with ``@pytest.mark.capability(section, name)`` and the fixture ``route`` runs on PyTorch's own path
and, as far as can be, on the kernels; ``pytest --compatibility FILE`` writes the table of what became of it.
"""

import collections
import contextlib
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from fusedmlp.dispatch import backend_choice, predicate

_PROPERTY = "capability"
_SAMPLES = "samples"


class Route:
    """One run of a test, on PyTorch's operators or with the kernels wherever they can run.

    kernels: whether kernels run wherever they can. reasons: for each chain of layers that ran, None if it ran
    on the kernels, else why not.
    """

    def __init__(self, kernels: bool) -> None:
        self.kernels = kernels
        self.reasons: list[str | None] = []

    def note(self, run: backend_choice.Run) -> None:
        if run.reason != "The caller chose backend('torch').":  # a run that a test compares with
            self.reasons.append(run.reason)


@contextlib.contextmanager
def taken(route: Route) -> Iterator[None]:
    """Take this route in this thread. Other threads and processes of a test have to enter it themselves."""
    with pytest.MonkeyPatch.context() as patch, backend_choice.recorded(route.note):
        if route.kernels:  # the layers in tests are too small for "auto", and may be on a CPU
            patch.setattr(predicate, "_why_not_worth_it", lambda *arguments: None)
            patch.setattr(predicate, "_interpreted", _interpreted)
        yield


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Stop recording inside ``taken`` of the plain route: calls on a CPU then take a shorter path."""
    with backend_choice.recorded(None):  # type: ignore[arg-type]
        yield


def _interpreted(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and predicate._interpreting()


@pytest.fixture(params=["plain", pytest.param("kernels", marks=pytest.mark.kernels)])
def route(request: pytest.FixtureRequest) -> Iterator[Route]:
    """Run the test twice: on PyTorch's operators, and with the kernels wherever they can run."""
    route = Route(request.param == "kernels")
    marker = request.node.get_closest_marker("capability")
    if marker is not None:  # the report of the call contains the list that the test fills
        request.node.user_properties.append((_PROPERTY, [*marker.args, route.kernels, route.reasons]))
    with taken(route):
        yield route


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("capability")
        if marker is not None and item.get_closest_marker("gpu") and not torch.cuda.is_available():
            # The test is skipped before its fixture route runs, but must be a row too.
            kernels = getattr(item, "callspec").params.get("route") == "kernels"  # noqa: B009  of a Function
            item.user_properties.append((_PROPERTY, [*marker.args, kernels, []]))


@pytest.fixture
def sampled(request: pytest.FixtureRequest, route: Route) -> Callable[..., None]:
    """Count one of PyTorch's own samples that came out right; the run prints the counts at its end."""
    counts: dict[str, list[int]] = {}
    request.node.user_properties.append((_SAMPLES, [route.kernels, counts]))

    def one_more(of: str, fused: bool = False) -> None:
        count = counts.setdefault(of, [0, 0])
        count[0] += 1
        count[1] += fused

    return one_more


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", metavar="FILE", help="write the table of capabilities to this file")


# For each kind of reason: its label, a pattern of the reasons, and the note that explains it below the table.
_NOTES = (
    (
        "no GPU",
        "needs a CUDA device",
        "The test needs a CUDA device, and no run of the tests has had one yet.",
    ),
    ("dtype", "There are kernels for", "The kernels compute in float32, float16 and bfloat16 only."),
    ("mixed dtypes", "is torch.*, and the input torch", "The input and a parameter differ in dtype."),
    (
        "shapes",
        "The shapes do not fit",
        "The shapes do not fit. PyTorch's operators raise their usual error.",
    ),
    (
        "device",
        "on the .* device|on the CPU|is on .*, and the input on",
        "Not all tensors are on one CUDA GPU.",
    ),
    (
        "kind of tensor",
        "not a plain torch.Tensor|A weight is None",
        "An argument is not a plain `torch.Tensor`: a subclass, a wrapped or fake tensor, or something else.",
    ),
    ("layout", "sparse or nested", "A tensor is sparse or nested, or a lazy conjugate or negative."),
    (
        "mode",
        "TorchFunctionMode|TorchDispatchMode",
        "A `TorchFunctionMode` or `TorchDispatchMode` is active, and sees only PyTorch's own functions.",
    ),
    (
        "torch.func",
        "torch.func transform",
        "A `torch.func` transform (`vmap`, `grad`, `jvp`, ...) is active.",
    ),
    ("forward mode", "Forward-mode differentiation", "Forward-mode differentiation is active."),
    (
        "tracing",
        "is tracing this call|the graph is of",
        "The graph that is traced or exported has only PyTorch's (or ONNX's) own operators, so that it runs "
        "without fusedmlp.",
    ),
    (
        "hooks",
        "hooks|hook on every",
        "A hook must see the output of the Linear, so its ReLU runs separately.",
    ),
    (
        "inference mode",
        "In inference mode",
        "The model's own `forward` calls the ReLU. In inference mode it cannot be fused with the Linear.",
    ),
    (
        "replaced",
        "was replaced",
        "A tool has replaced one of PyTorch's own functions, and the layers call that.",
    ),
    (
        "exact type",
        "exact type",
        "The tool compares the exact type of a module: call `fusedmlp.unfuse(model, built=True)` first.",
    ),
)


def _labels(reasons: Iterable[str]) -> str:
    """The labels of these reasons, in parentheses. A reason without a label stands for itself."""
    found = {
        next((label for label, pattern, _ in _NOTES if re.search(pattern, reason)), reason)
        for reason in reasons
    }
    return f" ({', '.join(sorted(found))})" if found else ""


class _Result:
    """The outcomes of all tests of one capability on one route."""

    def __init__(self) -> None:
        self.outcomes: set[str] = set()
        self.reasons: list[str | None] = []
        self.unsupported: list[str] = []
        self.skipped: list[str] = []

    def __str__(self) -> str:
        if not self.outcomes:
            return f"not run{_labels(self.skipped)}"
        if "failed" in self.outcomes:
            return "**fails**"
        if self.unsupported:
            return f"not supported{_labels(self.unsupported)}"
        labels = _labels(reason for reason in self.reasons if reason is not None)
        if None in self.reasons:
            return f"fused, in part PyTorch{labels}" if labels else "fused"
        return f"PyTorch{labels}" if labels else "works"


def table(reports: list[pytest.TestReport]) -> str:
    """A Markdown table of the capabilities, sorted by section and name."""
    results: dict[tuple[str, str], dict[bool, _Result]] = collections.defaultdict(
        lambda: collections.defaultdict(_Result)
    )
    for report in reports:
        for key, value in report.user_properties:
            if key == _PROPERTY:
                section, name, kernels, reasons = value
                result = results[section, name][kernels]
                if report.skipped and not hasattr(report, "wasxfail"):
                    assert isinstance(report.longrepr, tuple)
                    result.skipped.append(report.longrepr[2].removeprefix("Skipped: "))
                    continue
                result.outcomes.add("failed" if report.failed else "passed")
                result.reasons += reasons
                if hasattr(report, "wasxfail"):
                    result.unsupported.append(str(report.wasxfail))
    lines: list[str] = []
    before = None
    for (section, name), routes in sorted(results.items()):
        if section != before:
            lines += [
                "",
                f"## {section}",
                "",
                "| Feature | With the kernels | On a CPU |",
                "|---|---|---|",
            ]
            before = section
        plain = str(routes[False])
        cpu = "works" if plain.startswith(("PyTorch", "fused")) else plain
        lines.append(f"| {name} | {routes[True]} | {cpu} |")
    lines += ["", "## Notes", "", "| Note | Meaning |", "|---|---|"]
    lines += [f"| {label} | {note} |" for label, _, note in _NOTES]
    return "\n".join(lines).lstrip("\n") + "\n"


def how_many(reports: list[pytest.TestReport]) -> list[str]:
    """A line for each of PyTorch's descriptions: how many samples passed, and on which route."""
    totals: dict[str, list[int]] = {}
    for report in reports:
        for key, value in report.user_properties:
            if key == _SAMPLES:
                kernels, counts = value
                for of, (all_, fused) in counts.items():
                    total = totals.setdefault(of, [0, 0, 0])
                    total[kernels] += all_
                    total[2] += fused
    return [
        f"{of}: {plain} plain, {kernels} with the kernels allowed ({fused} ran on them)"
        for of, (plain, kernels, fused) in sorted(totals.items())
    ]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = how_many(terminalreporter.stats.get("passed", []))
    if lines:
        terminalreporter.section("samples of PyTorch's own that passed")
        for line in lines:
            terminalreporter.write_line(line)
    file = config.getoption("--compatibility")
    if file:
        kinds = ("passed", "failed", "skipped", "xfailed", "xpassed")
        reports = [report for kind in kinds for report in terminalreporter.stats.get(kind, [])]
        reports = [report for report in reports if isinstance(report, pytest.TestReport)]  # no skipped files
        pathlib.Path(file).write_text(_HEAD + table(reports), encoding="utf-8")
        terminalreporter.write_line(f"wrote {file}")


_HEAD = """# What works with PyTorch's tools

`pytest --compatibility docs/compatibility.md` writes this page from the tests that show each row.

- **fused**: the layers run on the kernels (in Triton's interpreter where there is no GPU).
- **PyTorch**: the layers run on PyTorch's own operators, as they would without this package.
- **works**: the results are those of `torch.nn`; on a CPU all layers run on PyTorch's operators.
- The words in parentheses say why. The [notes](#notes) at the end explain them.

"""
