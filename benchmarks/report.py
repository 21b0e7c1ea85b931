"""``python -m benchmarks report``: write results.md from one results.json, or compare several.

results.md lists losses before wins. A ratio is PyTorch's time divided by ours.
"""

import argparse
import collections
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks import plots
from benchmarks.results import (
    COMPARISONS,
    NOISE,
    Pair,
    Unreadable,
    best,
    case_of,
    floor_us,
    geometric_mean,
    name_of,
    named,
    pair,
    pairs,
    read,
    short,
    verdict,
)

AUTO = COMPARISONS[0]


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report",
        help="write results.md and plots of one file, or compare several",
        description="With one results.json, write results.md and the plots. With several, list the cases "
        "that are faster or slower in a later file than in the first, beyond the spread of the measurements.",
        epilog="example: python -m benchmarks report old/results.json new/results.json",
    )
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE")
    out_help = "where to write the report of one file (default: beside it)"
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help=out_help)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        found = [read(file) for file in options.files]
    except Unreadable as problem:
        print(problem, file=sys.stderr)
        return 2
    if len(found) == 1:
        for path in write(found[0], options.out or options.files[0].parent):
            print(f"wrote {path}")
        print("\n".join(headline(found[0])))
    else:
        for later, file in zip(found[1:], options.files[1:], strict=True):
            print("\n".join(comparison(found[0], later, str(options.files[0]), str(file))))
    return 0


def write(results: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Write results.md and the plots into the folder; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn, not_drawn = plots.draw(results, folder)
    text = folder / "results.md"
    text.write_text("\n".join(_markdown(results, drawn, not_drawn)) + "\n", encoding="utf-8")
    return [text, *drawn]


def where(results: dict[str, Any]) -> str:
    device, versions = results["device"], results["versions"]
    parts = [device["name"]]
    if device.get("driver"):
        parts.append(f"driver {device['driver']}")
    if device["type"] == "cpu":
        parts.append(f"{device['threads']} thread{'s' if device['threads'] != 1 else ''}")
    parts += [f"torch {versions['torch']}", f"Triton {versions['triton'] or 'absent'}"]
    return ", ".join([*parts, f"Python {versions['python']}"])


DRY = "A dry run with tiny sizes in Triton's interpreter: these times mean nothing."


def headline(results: dict[str, Any]) -> list[str]:
    """The outcome in a few lines for a terminal."""
    lines = [DRY] if results["dry_run"] else []
    lines.append(
        f"{len(results['cases'])} cases on {results['device']['name']}, compared with the best of PyTorch:"
    )
    for way, several in _by_comparison(results["cases"]):
        mean = geometric_mean([found.ratio for found in several])
        counts = ", ".join(f"{key} {count}" for key, count in _counted(several).items())
        lines.append(f"  {way + ':':<15}{mean:.2f}x in the geometric mean; {counts}")
    wrong = list(_wrong(results))
    lines.append(f"wrong results: {len(wrong) or 'none'}")
    return lines + [f"  {case}: {name}: {problem}" for case, name, problem in wrong[:5]]


def _by_comparison(cases: Iterable[dict[str, Any]]) -> Iterator[tuple[str, list[Pair]]]:
    """The heading of each comparison, with its pairs, if there are any."""
    found = list(pairs(cases))
    for comparison in COMPARISONS:
        if several := [one for _, which, one in found if which is comparison]:
            yield comparison[0], several


def _counted(several: Sequence[Pair]) -> dict[str, int]:
    return {key: sum(found.verdict == key for found in several) for key in ("slower", "equal", "faster")}


def _wrong(results: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for case in results["cases"]:
        for row in case["contestants"]:
            if (row["problem"] or "").startswith("wrong"):
                yield name_of(case), row["name"], row["problem"]


def _markdown(
    results: dict[str, Any], drawn: Sequence[pathlib.Path], not_drawn: dict[str, str]
) -> Iterator[str]:
    yield f"# Measured on {results['device']['name']}"
    yield ""
    if results["dry_run"]:
        yield f"**{DRY}**"
        yield ""
    yield from [
        f"- {where(results)}",
        f"- fusedmlp {results['versions']['fusedmlp']}, commit {results['commit'] or 'unknown'}",
        f"- {results['date']}, `{results['command']}`",
        f"- {_ceilings(results)}",
        f"- clock: {results['device']['clock']}",
        "",
        "Times are microseconds per call: the median ± half the range from the 20th to the 80th percentile, "
        "with launching unless said otherwise. A ratio is the time of PyTorch's fastest contestant divided "
        f"by ours: above 1 ours is faster. From {NOISE} to {1 / NOISE:.2f}, and where the ranges overlap, it "
        "is called equal. Each result is first checked against float64: an error more than twice eager "
        "PyTorch's is wrong, and wrong results are not timed. The floor is the least time at the ceilings, "
        "for the FLOPs or for the bytes of kernels that compute one layer each.",
        "",
        "## Overview",
        "",
    ]
    yield from _overview(results)
    yield from ["", "## Where PyTorch is faster", ""]
    yield from _losses(results)
    yield from ["", "## Wrong results, and what did not run", ""]
    yield from _problems(results)
    for what in dict.fromkeys(case["what"] for case in results["cases"]):
        yield from ["", f"## {what[:1].upper()}{what[1:]}", ""]
        yield from _cases([case for case in results["cases"] if case["what"] == what], results["ceilings"])
    yield from ["", "## Plots", ""]
    yield from (f"![{path.stem}]({path.name})\n" for path in drawn)
    yield from (f"{name} is not drawn: {reason}.\n" for name, reason in not_drawn.items())


def _ceilings(results: dict[str, Any]) -> str:
    found = results["ceilings"]
    if found["copy_gbps"] is None:
        return "ceilings not measured"
    products = ", ".join(f"{name} {tflops:.3g} TFLOP/s" for name, tflops in found["tflops"].items())
    return f"ceilings: a large copy {found['copy_gbps']:.4g} GB/s; large products {products}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("---" if i < left else "---:" for i in range(len(head))) + "|"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _overview(results: dict[str, Any]) -> Iterator[str]:
    rows = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for case in results["cases"]:
        groups[case["what"], case["dtype"]].append(case)
    for (what, dtype), cases in groups.items():
        for way, several in _by_comparison(cases):
            ratios = [found.ratio for found in several]
            bounds = [f"{ratio:.2f}x" for ratio in (geometric_mean(ratios), min(ratios), max(ratios))]
            rows.append([f"{what}, {dtype}", way, *bounds, *map(str, _counted(several).values())])
    yield '`auto`: backend("auto") against the best of eager, `torch.compile` and others without CUDA graph.'
    yield "`in a graph`: against the best of PyTorch in CUDA graphs. `kernels alone`: our kernels for the"
    yield "whole chain against the best of PyTorch, both replayed from a CUDA graph, so without launching."
    yield ""
    head = ["cases", "ours", "geometric mean", "least", "most", "slower", "equal", "faster"]
    yield from _table(head, rows, left=2)


def _losses(results: dict[str, Any]) -> Iterator[str]:
    rows = []
    for case, (way, _, clock, _), found in pairs(results["cases"]):
        if found.verdict == "slower":
            ours, torchs = found.ours, found.torchs
            cells = [name_of(case), way, f"{found.ratio:.2f}x", _us(ours[clock])]
            cells += [_us(torchs[clock]), torchs["name"], ours["note"] or ""]
            rows.append((found.ratio, cells))
    if not rows:
        yield "In no case by more than the noise."
        return
    head = ["case", "ours", "ratio", "us", "PyTorch us", "by", "our path"]
    yield from _table(head, [row for _, row in sorted(rows, key=lambda pair: pair[0])], left=2)


def _problems(results: dict[str, Any]) -> Iterator[str]:
    wrong = list(_wrong(results))
    yield f"Wrong results: {len(wrong) or 'none'}."
    yield ""
    yield from (f"- **{case}, {name}: {problem}**" for case, name, problem in wrong)
    others: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for case in results["cases"]:
        for row in case["contestants"]:
            if row["problem"] and not row["problem"].startswith("wrong"):
                others[row["name"], row["problem"]].append(name_of(case))
    for (name, problem), names in others.items():
        what = names[0] if len(names) == 1 else f"{len(names)} cases"
        yield f"- {name}, {what}: {problem}"


def _cases(several: Sequence[dict[str, Any]], ceilings: dict[str, Any]) -> Iterator[str]:
    """A table with one row per case: PyTorch's fastest and ours, in each comparison."""
    used = [c for c in COMPARISONS if any(pair(case, c) is not None for case in several)] or [AUTO]
    head = ["case", "floor us"]
    for comparison in used:
        head += [f"PyTorch us, {comparison[0]}" if comparison != AUTO else "PyTorch us", "by"]
        head += [f"ours us, {comparison[0]}", "ratio"]
    rows = []
    for case in several:
        floor = floor_us(case, ceilings)
        row = [case_of(case).size, "" if floor is None else f"{short(floor[0])} ({floor[1]})"]
        for comparison in used:
            _, name, clock, graph = comparison
            torchs, ours, found = best(case, "torch", clock, graph), named(case, name), pair(case, comparison)
            row += ["-", "-"] if torchs is None else [_us(torchs[clock]), torchs["name"]]
            row += [_cell(ours, clock), "-" if found is None else f"{found.ratio:.2f}x"]
        rows.append(row)
    yield from _table(head, rows)


def _cell(row: dict[str, Any] | None, clock: str) -> str:
    if row is None:
        return "-"
    if (row["problem"] or "").startswith("wrong"):
        return "**wrong**"
    return "did not run" if row[clock] is None else _us(row[clock])


def _us(time: dict[str, float]) -> str:
    """The median ± half the range, with the same number of digits."""
    digits = 0 if time["median"] >= 100 else 1 if time["median"] >= 10 else 2
    return f"{time['median']:.{digits}f} ± {(time['high'] - time['low']) / 2:.{digits}f}"


def comparison(
    first: dict[str, Any], later: dict[str, Any], first_file: str, later_file: str
) -> Iterator[str]:
    """Lines that name the contestants that became faster or slower by more than the spread."""
    yield f"1: {first_file}: {where(first)}, {first['date'][:10]}, {(first['commit'] or 'unknown')[:10]}"
    yield f"2: {later_file}: {where(later)}, {later['date'][:10]}, {(later['commit'] or 'unknown')[:10]}"
    warnings = []
    if first["device"]["name"] != later["device"]["name"]:
        warnings.append("DIFFERENT DEVICES: the ratios compare the devices, not the code.")
    elif first["versions"] != later["versions"]:
        warnings.append("The versions differ: PyTorch's own contestants show how much that matters.")
    if first["dry_run"] or later["dry_run"]:
        warnings.append(DRY)
    yield from warnings
    before = {name_of(case): case for case in first["cases"]}
    after = {name_of(case): case for case in later["cases"]}
    rows: list[tuple[float, str]] = []
    counts: collections.Counter[str] = collections.Counter()
    for name, case in after.items():
        for row in case["contestants"] if name in before else ():
            other = named(before[name], row["name"])
            what = f"{name}, {row['name']}"
            if other is None:
                continue
            if bool(row["problem"]) != bool(other["problem"]):
                now, was = row["problem"] or "runs", other["problem"] or "ran"
                rows.append((0.0 if row["problem"] else float("inf"), f"{what}: {now}, was: {was}"))
                counts["broken" if row["problem"] else "mended"] += 1
                continue
            for clock in ("wall_us", "device_us"):
                old, new = other[clock], row[clock]
                if old is None or new is None:
                    continue
                told = verdict(old, new)
                counts[told] += 1
                if told != "equal":
                    ratio = old["median"] / new["median"]
                    alone = ", device alone" if clock == "device_us" else ""
                    rows.append((ratio, f"{what}{alone}: {told}, {_us(old)} -> {_us(new)} us, {ratio:.2f}x"))
    yield ""
    yield from (line for _, line in sorted(rows))
    yield ""
    keys = ("slower", "equal", "faster", "broken", "mended")
    said = [f"{counts[key]} {key}" for key in keys if counts[key]]
    common = before.keys() & after.keys()
    yield f"{len(common)} cases in both: {', '.join(said) or 'nothing measured in both'}."
    for mine, which in ((before.keys() - common, 1), (after.keys() - common, 2)):
        if mine:
            yield f"only in {which}: {', '.join(sorted(mine))}"
    yield from warnings
