"""``python -m benchmarks.tuned``: run fusedmlp.tune on the suite's shapes, and write a table that can ship.

The table in OUT has the name of a table in kernels/. To ship it, copy it there.
"""

import argparse
import pathlib
import time

import torch

import fusedmlp
from benchmarks import cases, results
from benchmarks.statuses import TIME_OVER

# Each with its share of the time that is left. float16 uses bfloat16's results.
ARITHMETICS = (("bfloat16", 0.6), ("tf32", 0.6), ("float32", 1.0))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuned", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=20.0, metavar="N")
    parser.add_argument("--dry-run", action="store_true", help="two tiny shapes in Triton's interpreter")
    options = parser.parse_args()
    from fusedmlp.kernels import tuning_table  # imported here, because --help does not need Triton

    here = tuning_table.where(torch.cuda.current_device() if torch.cuda.is_available() else None)
    users, ours = tuning_table.users_file(here), options.out / tuning_table.shipped_file(here).name
    if ours.exists() and not users.exists():  # continue from the table of an earlier session
        users.parent.mkdir(parents=True, exist_ok=True)
        results.replace_file(users, ours.read_text(encoding="utf-8"))
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    chosen = ARITHMETICS[2:] if options.dry_run else ARITHMETICS
    groups = [
        (dtype, part * share, final_relu, _shapes(final_relu, options.dry_run))
        for dtype, part in chosen
        for final_relu, share in ((False, 0.6), (True, 1.0))
    ]
    products = chains = faster = done = 0
    try:
        for dtype, part, final_relu, shapes in groups:
            group_ends = time.monotonic() + part * (end - time.monotonic())
            for shape in shapes:
                left = group_ends - time.monotonic()
                if left <= 0:
                    break
                with cases.arithmetic(dtype):
                    tuned = fusedmlp.tune([shape], cases.DTYPES[dtype], left, final_relu=final_relu)
                print(tuned, "\n", flush=True)
                # After each shape, so that a process that is killed later leaves a table.
                results.replace_file(ours, users.read_text(encoding="utf-8"))
                products, chains = products + len(tuned.products), chains + len(tuned.stretches)
                faster += sum(chain.us < chain.torch_us for chain in tuned.stretches)
                done += not any(" seconds were over" in why for why in tuned.left_out)
    except KeyboardInterrupt:
        print("interrupted; finished shapes are kept, repeat the command to continue")
    print(f"\n{products} products and {chains} chains measured; the kernels are faster in {faster} chains")
    if ours.exists():
        print(f"{ours.name} is ready for kernels/")
    count = sum(len(shapes) for *_, shapes in groups)
    print(f"{done} of {count} shapes done")
    return 0 if done == count else TIME_OVER


def _shapes(final_relu: bool, dry_run: bool) -> list[tuple[int, ...]]:
    if dry_run:
        return [(8, 16, 16)] if final_relu else [(8, 16, 32, 7)]
    return list(cases.LAYERS) if final_relu else list(dict.fromkeys(cases.STEPS + cases.MLPS))


if __name__ == "__main__":
    raise SystemExit(main())
