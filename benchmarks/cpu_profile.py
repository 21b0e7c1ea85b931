"""``python -m benchmarks.cpu_profile``: where the time of a training step on a CPU goes.

It compares the plain loop with TrainStep, in microseconds per step. "products" and "update" are
torch.profiler's times of the matmuls and of the optimizer's operators. "rest" is the time of a step without
the profiler, minus these: other operators, Python and autograd.
"""

import argparse
import itertools
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.interleaved import interleaved
from benchmarks.test_cpu_training import OPTIMIZERS, WIDTHS, ours, plain

PRODUCTS = ("addmm", "mm", "addmm_", "_linear_pointwise")
UPDATE = ("add_", "mul_", "lerp_", "addcmul_", "addcdiv_", "sqrt", "div", "_fused_adam_", "_fused_sgd_")
STEPS, PROFILES = 40, 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_profile", description=__doc__)
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="rows (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="time for each optimizer")
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints messages
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    x, y = torch.randn(options.batch, WIDTHS[0]), torch.randint(WIDTHS[-1], (options.batch,))
    # Forward, weight gradients, and the input gradients of all layers except the first.
    layers = [N * K for K, N in itertools.pairwise(WIDTHS)]
    flops = 2 * options.batch * (3 * sum(layers) - layers[0])
    print(f"{'-'.join(map(str, WIDTHS))}, batch {options.batch}, {options.threads} threads")
    print(f"{'':<20}{'step':>7}{'products':>10}{'GFLOP/s':>9}{'update':>8}{'rest':>7}{'operators':>11}")
    for name, optimizer_of in OPTIMIZERS.items():
        steps = {
            "plain loop": partial(plain(optimizer_of), x, y),
            "TrainStep": partial(ours(optimizer_of), x, y),
        }
        for step in steps.values():
            step()  # creates the optimizer's state
        times = interleaved(steps, options.seconds)
        for who, step in steps.items():
            us = 1e6 * times[who].seconds
            products, update, count = _of_operators(step)
            columns = f"{us:>7.0f}{products:>10.0f}{flops / products / 1e3:>9.0f}{update:>8.0f}"
            print(f"{name + ', ' + who:<20}{columns}{us - products - update:>7.0f}{count:>11.0f}", flush=True)
    return 0


def _of_operators(step: Callable[[], Any]) -> tuple[float, float, float]:
    """Microseconds per step in products and in the update, and the number of PyTorch operators.

    These are medians of several profiles, because other work on the machine disturbs some.
    """
    found = []
    for _ in range(PROFILES):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(STEPS):
                step()
        events = [e for e in seen.key_averages() if e.key.startswith(("aten::", "mkldnn::"))]
        named = [(event.key.partition("::")[2], event.self_cpu_time_total / STEPS) for event in events]
        products = sum(us for name, us in named if name in PRODUCTS)
        update = sum(us for name, us in named if name in UPDATE or name.startswith("_foreach_"))
        found.append((products, update, sum(event.count for event in events) / STEPS))
    products, update, count = map(statistics.median, zip(*found, strict=True))
    return products, update, count


if __name__ == "__main__":
    raise SystemExit(main())
