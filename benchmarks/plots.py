"""The plots of a file of results: speed-up by size, roofline, times of a training step, peak memory."""

import math
import pathlib
from typing import Any

from matplotlib.figure import Figure  # pyplot is not needed, because nothing is shown on a display
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from benchmarks.cases import BOTH, KINDS, STEP
from benchmarks.results import NOISE, best, case_of, named, pairs, short

COLORS = {"bfloat16": "#1d3557", "float16": "#2a9d8f", "tf32": "#e07a1f", "float32": "#8d5a97"}
FAMILIES = {"torch": "#b0b7c3", "fusedmlp": "#1d3557", "other": "#e3e3e3"}
MARKERS = {"auto": "o", "in a graph": "s", "kernels alone": "^"}


def draw(results: dict[str, Any], folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """Draw the plots for which there is data: their paths, and for each of the others the reason."""
    drawn, not_drawn = [], {}
    for name, plot in {"speedup": speedups, "roofline": roofline, "steps": steps, "memory": memory}.items():
        found = plot(results)
        path = folder / f"{name}.png"
        if isinstance(found, str):
            not_drawn[path.name] = found
            path.unlink(missing_ok=True)  # it may show other results
            continue
        found.savefig(path)
        drawn.append(path)
    return drawn, not_drawn


def _figure(
    size: tuple[float, float], results: dict[str, Any], title: str, count: int = 1, columns: int = 1
) -> tuple[Figure, list[Any]]:
    """A figure of ``count`` plots in several columns, with the device and the versions below."""
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    dry = "DRY RUN, times mean nothing. " if results["dry_run"] else ""
    versions, device = results["versions"], results["device"]["name"]
    figure.suptitle(title, fontsize=12, fontweight="bold")
    triton = versions["triton"] or "absent"
    below = f"{dry}{device}, torch {versions['torch']}, Triton {triton}, {results['date'][:10]}"
    figure.supxlabel(below, fontsize=8, color="0.4")
    grid = list(figure.subplots(math.ceil(count / columns), columns, squeeze=False).flat)
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _marker(color: str, filled: bool) -> dict[str, Any]:
    return {"color": color, "markerfacecolor": color if filled else "none"}


def _handle(marker: str, color: str, label: str, filled: bool = True) -> Line2D:
    return Line2D([], [], marker=marker, linestyle="none", label=label, **_marker(color, filled))


def _log_ticks(axis: Any, least: float, most: float) -> None:
    """Label powers of ten with plain numbers; within one decade, label both ends."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())
    if most / least < 8:
        axis.set_major_locator(FixedLocator([least, most] if most / least > 1.5 else [least]))


def speedups(results: dict[str, Any]) -> Figure | str:
    """The ratio of every comparison, by the size of the case. Below 1 PyTorch is faster."""
    points = [(case, way, found.ratio) for case, (way, *_), found in pairs(results["cases"])]
    if not points:
        return "in no case did both PyTorch and fusedmlp give a time"
    kinds = [kind for kind in KINDS if any(case["what"] == kind for case, _, _ in points)]
    columns = min(3, len(kinds))
    size = 4.2 * columns + 1.6, 3.2 * math.ceil(len(kinds) / columns) + 0.9
    title = "Speed-up over the best of PyTorch, by size"
    figure, grid = _figure(size, results, title, len(kinds), columns)
    ratios = [ratio for *_, ratio in points]
    least, most = min(min(ratios) / 1.15, 0.8), max(max(ratios) * 1.15, 1.25)
    ticks = {2**i for i in range(-6, 8)} | ({0.7, 0.8, 0.9, 1.1, 1.25, 1.5} if most / least < 4 else set())
    for axes, kind in zip(grid, kinds, strict=True):
        axes.axhspan(least, NOISE, color="#d62828", alpha=0.07, linewidth=0)
        axes.axhline(1, color="0.35", linewidth=1)
        for case, how, ratio in points:
            if case["what"] == kind:
                style = _marker(COLORS[case["dtype"]], how == "auto")
                axes.plot(case["flops"] / 1e9, ratio, MARKERS[how], markersize=6, alpha=0.85, **style)
        axes.set(xscale="log", yscale="log", ylim=(least, most), xlabel="GFLOP of the case")
        axes.set_title(kind, fontsize=10)
        axes.set_yticks(sorted(tick for tick in ticks if least <= tick <= most))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        sizes = [case["flops"] / 1e9 for case, *_ in points if case["what"] == kind]
        _log_ticks(axes.xaxis, min(sizes), max(sizes))
    below = {"transform": grid[0].transAxes, "fontsize": 8, "color": "#a01c1c"}
    grid[0].text(0.02, 0.02, "PyTorch is faster", **below)
    for axes in grid[::columns]:
        axes.set_ylabel("times as fast")
    dtypes, ways = {case["dtype"] for case, *_ in points}, {how for _, how, _ in points}
    handles = [_handle("o", color, dtype) for dtype, color in COLORS.items() if dtype in dtypes]
    handles += [_handle(mark, "0.3", how, how == "auto") for how, mark in MARKERS.items() if how in ways]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def roofline(results: dict[str, Any]) -> Figure | str:
    """TFLOP/s of the fastest contestant of each family, below the lines that the ceilings allow."""
    ceilings = results["ceilings"]
    if ceilings["copy_gbps"] is None:
        return "the ceilings were not measured"
    points = []
    for case in results["cases"]:
        for family in ("torch", "fusedmlp"):
            rows = [row for clock in ("wall_us", "device_us") if (row := best(case, family, clock))]
            if rows and case["dtype"] in ceilings["tflops"]:
                points.append((case, family == "fusedmlp", max(row["tflops"] for row in rows)))
    if not points:
        return "no case has a time and a measured ceiling"
    title = "Roofline: the best of each, against the ceilings measured here"
    figure, (axes,) = _figure((9, 5.6), results, title)
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
    for (case, ours, tflops), intensity in zip(points, intensities, strict=True):
        style = _marker(COLORS[case["dtype"]], ours)
        axes.plot(intensity, tflops, "o" if ours else "D", markersize=7, alpha=0.85, **style)
    lines, _ = axes.get_legend_handles_labels()
    handles = [*lines, _handle("o", "0.3", "fusedmlp"), _handle("D", "0.3", "PyTorch", filled=False)]
    axes.legend(handles=handles, frameon=False, fontsize=9, loc="lower right")
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s achieved")
    axes.set_xlabel("FLOP for each byte that layer-by-layer kernels must move")
    _log_ticks(axes.xaxis, low, high)
    return figure


def steps(results: dict[str, Any]) -> Figure | str:
    """The time of every contestant in a training step, the shortest on top."""
    cases = [case for case in results["cases"] if case["what"] == STEP and best(case, "torch") is not None]
    if not cases:
        return "no training step has a time"
    cases = cases[:6]
    columns = min(2, len(cases))
    most = max(sum(row["wall_us"] is not None for row in case["contestants"]) for case in cases)
    size = 5.6 * columns, (0.3 * most + 0.75) * math.ceil(len(cases) / columns) + 0.9
    figure, grid = _figure(size, results, "One training step, with launching", len(cases), columns)
    for axes, case in zip(grid, cases, strict=True):
        timed = [row for row in case["contestants"] if row["wall_us"] is not None]
        timed.sort(key=lambda row: row["wall_us"]["median"])
        lows, medians, highs = ([row["wall_us"][key] for row in timed] for key in ("low", "median", "high"))
        errors = [
            [max(0, median - low) for median, low in zip(medians, lows, strict=True)],
            [max(0, high - median) for median, high in zip(medians, highs, strict=True)],
        ]
        axes.barh(
            range(len(timed)), medians, xerr=errors, height=0.72, ecolor="0.3",
            error_kw={"linewidth": 1, "capsize": 2}, color=[FAMILIES[row["family"]] for row in timed],
        )  # fmt: skip
        for i, (median, high) in enumerate(zip(medians, highs, strict=True)):
            axes.text(high, i, f"  {short(median)} us", va="center", fontsize=8, color="0.2")
        axes.set_yticks(range(len(timed)), [row["name"] for row in timed], fontsize=8)
        axes.set_xlim(0, 1.25 * max(highs))
        axes.invert_yaxis()
        axes.set_title(case_of(case).size, fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="y", visible=False)
    return figure


def memory(results: dict[str, Any]) -> Figure | str:
    """The peak memory of forward and backward beyond weights and inputs, relative to eager PyTorch's."""
    if results["device"]["type"] != "cuda":
        return "peak memory is that of a GPU's allocator, and this was measured on a CPU"
    several = [case for case in results["cases"] if case["what"] == BOTH and _peak(case, "eager")]
    if not several:
        return "no forward and backward gave a peak of memory"
    cases = [case for case in several if case["dtype"] == several[0]["dtype"]]
    cases.sort(key=lambda case: _peak(case, "eager"))
    size = 9, 0.4 * len(cases) + 1.6
    figure, (axes,) = _figure(size, results, "Peak memory beyond weights and inputs, relative to eager")
    axes.axvline(1, color="0.35", linewidth=1)
    for name, marker, color in (
        ("compile", "D", "#e07a1f"), ("fusedmlp torch", "s", "#7fb2d9"), ("fusedmlp chain", "o", "#1d3557")
    ):  # fmt: skip
        points = [
            (_peak(case, name) / _peak(case, "eager"), i) for i, case in enumerate(cases) if _peak(case, name)
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=color, markersize=8, label=name, alpha=0.9)
    labels = [f"{case_of(case).size}\neager: {_peak(case, 'eager') / 1e6:,.4g} MB" for case in cases]
    axes.set_yticks(range(len(cases)), labels, fontsize=8)
    axes.set(xlabel="times eager's peak", title=BOTH, xlim=(0, max(1.2, axes.get_xlim()[1])))
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def _peak(case: dict[str, Any], name: str) -> int:
    return (named(case, name) or {}).get("peak_bytes") or 0
