"""The pictures of a file of results: speed-up by size, roofline, the ladder of a training step, memory."""

import math
import pathlib
from typing import Any

from matplotlib.figure import Figure  # without pyplot: nothing here needs a display
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from benchmarks.cases import BOTH, KINDS, STEP
from benchmarks.results import COMPARISONS, NOISE, best, named, pair

COLORS = {"bfloat16": "#1d3557", "float16": "#2a9d8f", "tf32": "#e07a1f", "float32": "#8d5a97"}
FAMILIES = {"torch": "#b0b7c3", "fusedmlp": "#1d3557", "other": "#e3e3e3"}
MARKERS = {"auto": "o", "in a graph": "s", "kernels alone": "^"}


def draw(results: dict[str, Any], folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """Those for which there is data; their paths, and of the others why not."""
    drawn, not_drawn = [], {}
    for name, picture in (
        ("speedup.png", speedups), ("roofline.png", roofline), ("steps.png", steps), ("memory.png", memory)
    ):  # fmt: skip
        found = picture(results)
        path = folder / name
        if isinstance(found, str):
            not_drawn[name] = found
            path.unlink(missing_ok=True)  # of other results
            continue
        found.savefig(path)
        drawn.append(path)
    return drawn, not_drawn


def _figure(width: float, height: float, results: dict[str, Any], title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    dry = "DRY RUN, times mean nothing. " if results["dry_run"] else ""
    versions, device = results["versions"], results["device"]["name"]
    figure.suptitle(title, fontsize=12, fontweight="bold")
    triton = versions["triton"] or "absent"
    below = f"{dry}{device}, torch {versions['torch']}, Triton {triton}, {results['date'][:10]}"
    figure.supxlabel(below, fontsize=8, color="0.4")
    return figure


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _log_ticks(axis: Any, least: float, most: float) -> None:
    """Numbers as one writes them, at the powers of ten; within a decade at both ends."""
    plain = FuncFormatter(lambda value, _: f"{value:.3g}")
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter())
    if most / least < 8:
        axis.set_major_locator(FixedLocator([least, most] if most / least > 1.5 else [least]))


def _short(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"


def _label(case: dict[str, Any]) -> str:
    return f"{case['rows']}x{'x'.join(map(str, case['widths']))} {case['dtype']}"


def speedups(results: dict[str, Any]) -> Figure | str:
    points = [
        (case, comparison[0], found.ratio)
        for case in results["cases"]
        for comparison in COMPARISONS
        if (found := pair(case, comparison)) is not None
    ]
    if not points:
        return "in no case did both PyTorch and fusedmlp give a time"
    kinds = [kind for kind in KINDS if any(case["what"] == kind for case, _, _ in points)]
    columns = min(3, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = _figure(
        4.2 * columns + 1.6, 3.2 * rows + 0.9, results, "Speed-up over the best of PyTorch, by size"
    )
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    least, most = min(ratio for *_, ratio in points), max(ratio for *_, ratio in points)
    least, most = min(least / 1.15, 0.8), max(most * 1.15, 1.25)
    for axes, kind in zip(grid.flat, kinds, strict=False):
        _plain(axes)
        axes.axhspan(least, NOISE, color="#d62828", alpha=0.07, linewidth=0)
        axes.axhline(1, color="0.35", linewidth=1)
        for case, comparison, ratio in points:
            if case["what"] == kind:
                color = COLORS[case["dtype"]]
                axes.plot(
                    case["flops"] / 1e9, ratio, MARKERS[comparison], color=color, markersize=6, alpha=0.85,
                    markerfacecolor=color if comparison == "auto" else "none",
                )  # fmt: skip
        axes.set(xscale="log", yscale="log", ylim=(least, most), title=kind, xlabel="GFLOP of the case")
        ticks = [2**i for i in range(-6, 8) if least <= 2**i <= most] + [
            r for r in (0.7, 0.8, 0.9, 1.1, 1.25, 1.5) if most / least < 4 and least < r < most
        ]
        axes.set_yticks(sorted(ticks))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.title.set_fontsize(10)
        sizes = [case["flops"] / 1e9 for case, *_ in points if case["what"] == kind]
        _log_ticks(axes.xaxis, min(sizes), max(sizes))
    for axes in list(grid.flat)[len(kinds) :]:
        axes.set_visible(False)
    grid[0, 0].text(
        0.02, 0.02, "PyTorch is faster", transform=grid[0, 0].transAxes, fontsize=8, color="#a01c1c"
    )
    for row in grid:
        row[0].set_ylabel("times as fast")
    handles = [
        _handle("o", COLORS[dtype], dtype) for dtype in COLORS if any(c["dtype"] == dtype for c, *_ in points)
    ]
    handles += [
        _handle(MARKERS[how], "0.3", how, filled=how == "auto")
        for how, *_ in COMPARISONS
        if any(h == how for _, h, _ in points)
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _handle(marker: str, color: str, label: str, filled: bool = True) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], marker=marker, color=color, linestyle="none", label=label,
        markerfacecolor=color if filled else "none",
    )  # fmt: skip


def roofline(results: dict[str, Any]) -> Figure | str:
    ceilings = results["ceilings"]
    if ceilings["copy_gbps"] is None:
        return "the ceilings were not measured"
    cases = [case for case in results["cases"] if case["dtype"] in ceilings["tflops"]]
    points = []
    for case in cases:
        for family in ("torch", "fusedmlp"):
            rows = [
                row for clock in ("wall_us", "device_us") if (row := best(case, family, clock)) is not None
            ]
            if rows:
                points.append((case, family, max(row["tflops"] for row in rows)))
    if not points:
        return "no case has a time and a measured ceiling"
    figure = _figure(9, 5.6, results, "Roofline: the best of each, against the ceilings measured here")
    axes = figure.subplots()
    _plain(axes)
    intensities = [case["flops"] / case["least_bytes"] for case, *_ in points]
    low, high = min(intensities) / 2, max(intensities) * 2
    for dtype in dict.fromkeys(case["dtype"] for case, *_ in points):
        top = ceilings["tflops"][dtype]
        knee = 1e3 * top / ceilings["copy_gbps"]
        xs = sorted({low, min(max(knee, low), high), high})
        axes.plot(
            xs, [min(top, 1e-3 * ceilings["copy_gbps"] * x) for x in xs], color=COLORS[dtype], linewidth=1.5,
            label=f"{dtype}: {top:.3g} TFLOP/s, {ceilings['copy_gbps']:,.0f} GB/s",
        )  # fmt: skip
    for case, family, tflops in points:
        color = COLORS[case["dtype"]]
        axes.plot(
            case["flops"] / case["least_bytes"], tflops, "o" if family == "fusedmlp" else "D", color=color,
            markersize=7, markerfacecolor=color if family == "fusedmlp" else "none", alpha=0.85,
        )  # fmt: skip
    lines, _ = axes.get_legend_handles_labels()
    handles = [*lines, _handle("o", "0.3", "fusedmlp"), _handle("D", "0.3", "PyTorch", filled=False)]
    axes.legend(handles=handles, frameon=False, fontsize=9, loc="lower right")
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP for each byte that layer-by-layer kernels must move",
        ylabel="TFLOP/s achieved",
    )  # fmt: skip
    _log_ticks(axes.xaxis, low, high)
    return figure


def steps(results: dict[str, Any]) -> Figure | str:
    """The ladder of a training step: every contestant's time, shortest last."""
    cases = [case for case in results["cases"] if case["what"] == STEP and best(case, "torch") is not None]
    if not cases:
        return "no training step has a time"
    cases = cases[:6]
    columns = min(2, len(cases))
    rows = math.ceil(len(cases) / columns)
    most = max(sum(row["wall_us"] is not None for row in case["contestants"]) for case in cases)
    figure = _figure(
        5.6 * columns, (0.3 * most + 0.75) * rows + 0.9, results, "One training step, launching included"
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, case in zip(grid.flat, cases, strict=False):
        timed = [row for row in case["contestants"] if row["wall_us"] is not None]
        timed.sort(key=lambda row: row["wall_us"]["median"])
        _plain(axes)
        medians = [row["wall_us"]["median"] for row in timed]
        errors = [
            [max(0, row["wall_us"]["median"] - row["wall_us"]["low"]) for row in timed],
            [max(0, row["wall_us"]["high"] - row["wall_us"]["median"]) for row in timed],
        ]
        axes.barh(
            range(len(timed)), medians, xerr=errors, height=0.72, ecolor="0.3",
            error_kw={"linewidth": 1, "capsize": 2}, color=[FAMILIES[row["family"]] for row in timed],
        )  # fmt: skip
        for i, row in enumerate(timed):
            axes.text(
                row["wall_us"]["high"], i, f"  {_short(medians[i])} us", va="center", fontsize=8, color="0.2"
            )
        axes.set_yticks(range(len(timed)), [row["name"] for row in timed], fontsize=8)
        axes.set_xlim(0, 1.25 * max(row["wall_us"]["high"] for row in timed))
        axes.invert_yaxis()
        axes.set_title(_label(case), fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="y", visible=False)
    for axes in list(grid.flat)[len(cases) :]:
        axes.set_visible(False)
    return figure


def memory(results: dict[str, Any]) -> Figure | str:
    """Peak memory of forward and backward, beyond what was there before, by eager PyTorch's."""
    if results["device"]["type"] != "cuda":
        return "peak memory is that of a GPU's allocator, and this was measured on a CPU"
    several = [case for case in results["cases"] if case["what"] == BOTH and _peak(case, "eager")]
    if not several:
        return "no forward and backward gave a peak of memory"
    cases = [case for case in several if case["dtype"] == several[0]["dtype"]]
    cases.sort(key=lambda case: _peak(case, "eager"))
    figure = _figure(
        9, 0.4 * len(cases) + 1.6, results, "Peak memory beyond weights and inputs, by eager PyTorch's"
    )
    axes = figure.subplots()
    _plain(axes)
    axes.axvline(1, color="0.35", linewidth=1)
    for name, marker, color in (
        ("compile", "D", "#e07a1f"), ("fusedmlp torch", "s", "#7fb2d9"), ("fusedmlp chain", "o", "#1d3557")
    ):  # fmt: skip
        points = [
            (_peak(case, name) / _peak(case, "eager"), i) for i, case in enumerate(cases) if _peak(case, name)
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=color, markersize=8, label=name, alpha=0.9)
    labels = [f"{_label(case)}\neager: {_peak(case, 'eager') / 1e6:,.4g} MB" for case in cases]
    axes.set_yticks(range(len(cases)), labels, fontsize=8)
    axes.set(xlabel="times eager's peak", title=BOTH, xlim=(0, max(1.2, axes.get_xlim()[1])))
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def _peak(case: dict[str, Any], name: str) -> int:
    return (named(case, name) or {}).get("peak_bytes") or 0
