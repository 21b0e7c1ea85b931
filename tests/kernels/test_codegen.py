"""Every kernel is cross-compiled with every tile that ships, for three chips; its machine code is checked.

By default each kernel is built once for one chip; ``pytest -m slow`` compiles the rest.

Triton does not check for these problems, each of which makes a kernel fail or much slower: a product that
does not use the tensor cores, registers spilled to memory, wgmma instructions that ptxas serialised (its
notes C7510 to C7516), a body replaced by a trap.
"""

import itertools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from available import HAS_TRITON
from machine_code import SMALLEST_SHARED_MEMORY, too_much

ROOT = pathlib.Path(__file__).parents[2]
TENSOR_CORE = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "UTCQMMA")}
KERNELS = [
    "linear_forward",
    "grad_input",
    "grad_weights",
    "relu_backward",
    "narrow_forward",
    "narrow_backward",
]
STEPS = ["step_rows", "step_weights", "steps"]  # too small for wgmma and tcgen05: mma on every chip

EVERY = [
    *itertools.product(KERNELS + STEPS, (80, 90, 100)),
    *itertools.product(["overlapping_step"], (90, 100)),
]

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: no kernels to compile")


def problems(build: dict[str, Any], arch: int) -> list[str]:
    """What is wrong with one build, in words."""
    found = []
    multiply = build["multiply"]
    # The instructions of sm_90 and sm_100 need at least 64 rows. Some blocks of narrow chains have fewer, and
    # so have the tiles of the training step.
    few = build["name"].startswith("narrow") and build["rows"] < 64
    few = few or build["name"].startswith("step")
    wanted = ("FFMA", "FFMA2") if build["kind"] == "ieee" else TENSOR_CORE[80 if few else arch]
    if build["kind"] and not any(multiply.get(name) for name in wanted):
        found.append(f"none of {wanted} in {sorted(multiply)}")
    # Tiles are not chosen by chip, so each must fit on every chip.
    found += too_much(build, SMALLEST_SHARED_MEMORY)
    # The launcher takes from the table how many programs fit. The table leaves out the bytes of barriers.
    if build["table_says"] is not None and build["shared_memory"] > build["table_says"] + 1024:
        found.append(f"{build['shared_memory']} bytes of shared memory, {build['table_says']} in the table")
    # One FFMA2 does two multiplications of PTX.
    if build["instructions"] < max(50, sum(multiply.get(name, 0) for name in wanted) // 2):
        found.append(f"a body of {build['instructions']} instructions")
    return found


@pytest.mark.parametrize(
    ("kernel", "arch"),
    [
        ("one of each", 90),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in EVERY),
    ],
)
def test_machine_code(kernel: str, arch: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)  # the kernels of this checkout
    script = ROOT / "tests" / "support" / "cross_compile.py"
    run = subprocess.run(
        [sys.executable, script, kernel, str(arch)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    builds = [json.loads(line) for line in run.stdout.splitlines()]
    assert builds
    wrong = {build["name"]: problems(build, arch) for build in builds}
    assert not any(wrong.values()), "\n".join(f"{k}: {v}" for k, v in wrong.items() if v)
