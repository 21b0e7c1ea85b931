"""``python -m benchmarks.profiles``: which kernels take the time in the cases farthest from the floor.

The floor is the least time at the measured ceilings, see ``results.floor_us``.
"""

import argparse
import pathlib
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import contestants, results, timing
from benchmarks.cases import arithmetic
from benchmarks.statuses import TIME_OVER

CALLS = 10


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiles", description=__doc__)
    out_help = "the folder of results.json; profiles.txt is written there"
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help=out_help)
    cases_help = "number of cases (default: %(default)s)"
    parser.add_argument("--cases", type=int, default=6, metavar="N", help=cases_help)
    options = parser.parse_args()
    try:
        found = results.read(options.out / "results.json")
    except results.Unreadable as problem:
        print(f"{problem}; python -m benchmarks --quick --out {options.out} writes it")
        return 1
    far = [(_times_the_floor(case, found["ceilings"]), case) for case in found["cases"]]
    worst = sorted([(how, case) for how, case in far if how], key=lambda pair: -pair[0][0])[: options.cases]
    if not worst:
        print("no case has both a time of the kernels and a measured ceiling")
        return 1
    said: list[str] = []
    interrupted = False
    with (options.out / "profiles.txt").open("w", encoding="utf-8") as file:
        try:
            for (times, us, floor, by), case in worst:
                what = f"{results.name_of(case)}: {us:.4g} us, {times:.1f}x the {floor:.4g} us of its {by}"
                for name in ("fusedmlp chain", "eager"):
                    text = f"{'=' * 80}\n{what}\n{name}\n\n{_kernels(case, name)}\n"
                    print(text, file=file, flush=True)
                    print(text, flush=True)
                said.append(what)
        except KeyboardInterrupt:
            interrupted = True
    print("\n".join(["\nfarthest from the floor:", *said, f"{len(said)} of {len(worst)} cases done"]))
    return TIME_OVER if interrupted else 0


def _times_the_floor(
    case: dict[str, Any], ceilings: dict[str, Any]
) -> tuple[float, float, float, str] | None:
    """The kernels' time divided by the floor, the time, the floor, and what sets it (FLOPs or bytes).

    The time is that on the device alone if it was measured.
    """
    row, floor = results.named(case, "fusedmlp chain"), results.floor_us(case, ceilings)
    time = row and (row["device_us"] or row["wall_us"])
    if not time or floor is None:
        return None
    return time["median"] / floor[0], time["median"], floor[0], floor[1]


def _kernels(case: dict[str, Any], name: str) -> str:
    """A table by torch.profiler of a contestant's kernels or, without a GPU, of its operators."""
    this = results.case_of(case)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    field = {one.name: one for one in contestants.contestants(this, device, True, False)}
    with arithmetic(this.dtype):
        _, call = field[name].prepare(contestants.Work(this, device, 2))
        for i in range(3):
            call(i)
        timing.synchronize()
        cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities, acc_events=True) as found:
            for i in range(CALLS if cuda else 1):
                call(i)
            timing.synchronize()
    events = [event for event in found.key_averages() if not cuda or event.device_type.name == "CUDA"]
    return _table(events, "self_device_time_total" if cuda else "self_cpu_time_total", CALLS if cuda else 1)


def _table(events: list[Any], attribute: str, calls: int) -> str:
    rows = sorted(((getattr(event, attribute), event) for event in events), key=lambda pair: -pair[0])
    total = sum(us for us, _ in rows) or 1.0
    lines = [f"{'kernel':<50}{'launches':>9}{'us a call':>11}{'share':>8}"]
    for us, event in rows[:12]:
        lines.append(f"{event.key[:49]:<50}{event.count / calls:>9.4g}{us / calls:>11.2f}{us / total:>8.1%}")
    lines.append(f"{'together':<50}{sum(e.count for e in events) / calls:>9.4g}{total / calls:>11.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
