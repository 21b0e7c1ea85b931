"""``python -m benchmarks.tuned``: fusedmlp.tune over the suite's shapes, and the table as it would ship.

The table in OUT has the name that it has in kernels/: to ship it, copy it there.
"""

import argparse
import pathlib
import shutil
import sys
import time

import torch

import fusedmlp
from benchmarks import cases

# Of the time that is left; float16 is computed and measured as bfloat16 is.
ARITHMETICS = (("bfloat16", 0.6), ("tf32", 0.6), ("float32", 1.0))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuned", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=20.0, metavar="N")
    parser.add_argument("--dry-run", action="store_true", help="two tiny shapes in Triton's interpreter")
    options = parser.parse_args()
    from fusedmlp.kernels import _table  # here: Triton need not be installed to ask for --help

    here = _table.where(torch.cuda.current_device() if torch.cuda.is_available() else None)
    users, ours = _table.users_file(here), options.out / _table.shipped_file(here).name
    if users is None:
        print("tune keeps its table where platformdirs says: pip install platformdirs", file=sys.stderr)
        return 2
    if ours.exists() and not users.exists():  # of an earlier session: go on with it
        users.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ours, users)
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    products = stretches = faster = left_out = 0
    try:
        for dtype, part in ARITHMETICS[2:] if options.dry_run else ARITHMETICS:
            for final_relu, share in ((False, 0.6), (True, 1.0)):
                seconds = max(1.0, (end - time.monotonic()) * part * share)
                with cases.arithmetic(dtype):
                    tuned = fusedmlp.tune(
                        _shapes(final_relu, options.dry_run),
                        cases.DTYPES[dtype],
                        seconds,
                        final_relu=final_relu,
                    )
                print(tuned, "\n", flush=True)
                products, stretches = products + len(tuned.products), stretches + len(tuned.stretches)
                faster += sum(stretch.us < stretch.torch_us for stretch in tuned.stretches)
                left_out += len(tuned.left_out)
    finally:
        if users.exists():
            shutil.copy(users, ours)
    print(
        f"\n{products} products and {stretches} stretches measured, the kernels faster in {faster} of these; "
        f"{left_out} shapes left out; {ours.name} is ready for kernels/"
    )
    return 0


def _shapes(final_relu: bool, dry_run: bool) -> list[tuple[int, ...]]:
    if dry_run:
        return [(8, 16, 16)] if final_relu else [(8, 16, 32, 7)]
    return list(cases.LAYERS) if final_relu else list(dict.fromkeys(cases.STEPS + cases.MLPS))


if __name__ == "__main__":
    raise SystemExit(main())
