"""The launch path without a GPU: Triton's own JIT, compiler and C launcher, down to the call of the driver.

The driver is tests/support/libcuda_stub.c, compiled as libcuda. Every launcher of kernels/ is called as the
package calls it (tests/support/launch_cases.py), so the same kernels are compiled as for users. Each build is
checked against the limits of the chip. Each launch that reaches the driver is checked against what the
launcher asked for: grid, block, shared memory, attributes and the value of every parameter.

Every kernel is launched on every chip that can run it. Other specialisations (TF32, sizes of 1, a transposed
x, inference, more layers) are built for some chips only, mostly sm_80 or sm_90. By default one chip is
tested; ``pytest -m slow`` tests the other five.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from available import HAS_TRITON
from machine_code import SHARED_MEMORY, too_much

SUPPORT = pathlib.Path(__file__).parents[1] / "support"
# Triton looks for gcc and clang; some machines have only cc.
COMPILER = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: no kernels to launch"),
    pytest.mark.skipif(COMPILER is None, reason="there is no C compiler for the stub and Triton's launcher"),
]

COOPERATIVE = {"_steps_kernel"}  # the programs of these kernels wait for each other

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs tests/support/launch_path.py on the stub and returns the lines it writes."""
    import triton

    assert COMPILER is not None
    folder = tmp_path_factory.mktemp("libcuda")
    # Triton keeps compiled C launchers in its cache, which the processes of pytest-xdist share.
    together = "PYTEST_XDIST_WORKER" in os.environ
    cache = (tmp_path_factory.getbasetemp().parent if together else folder) / "triton"
    headers = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    options = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
    library = folder / "libcuda.so.1"
    subprocess.run([COMPILER, *options, "-o", library, SUPPORT / "libcuda_stub.c"], check=True)

    def run_script(*arguments: str) -> list[dict[str, Any]]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        environment |= {
            "CC": COMPILER or "",
            "LD_LIBRARY_PATH": os.pathsep.join(
                filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH")))
            ),
            "TRITON_LIBCUDA_PATH": str(folder),  # where Triton links against it
            "TRITON_CACHE_DIR": str(cache),
            "PYTHONPATH": str(SUPPORT.parents[1]),  # the kernels of this checkout
        }
        command = [sys.executable, SUPPORT / "launch_path.py", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run_script


# The known spills of the oldest and the newest Triton, in bytes, by Triton's version and chip. A kernel that
# spills is right but slower. The test fails when one of these spills disappears or another one appears.
# _step_rows_kernel: with unaligned widths it needs two registers more than a thread has.
ODD_STEP = "step, bfloat16, SGD, squared error, odd, _step_rows_kernel"
SPILLED: dict[tuple[str, int], dict[str, int]] = {("3.8", 120): {ODD_STEP: 8}}
TRITONS = ("3.6", "3.8")  # for which SPILLED is complete
MAY_SPILL = {name for spilled in SPILLED.values() for name in spilled}


# On the default chip the fewest builds cover every kernel, tensor descriptors and dependent launches.
@pytest.mark.parametrize(
    "arch", [arch if arch == 100 else pytest.param(arch, marks=pytest.mark.slow) for arch in SHARED_MEMORY]
)
def test_every_launcher(arch: int, run: Run, record_property: Callable[[str, object], None]) -> None:
    lines = run("record", str(arch))
    builds = [line for line in lines if "build" in line]
    launches = [line for line in lines if "launch" in line]
    version = ".".join(lines[-1]["triton"].split(".")[:2])
    record_property("builds and launches", (arch, len(builds), len(launches)))
    wrong = [
        f"{build['case']}, {build['build']}: {found}"
        for build in builds
        for found in too_much(build, SHARED_MEMORY[arch])
    ]
    if version in TRITONS:
        known = [f"{name}: {count} bytes spilled" for name, count in SPILLED.get((version, arch), {}).items()]
    else:  # Other releases may spill other numbers of bytes in these builds.
        known = [one for one in wrong if "spilled" in one and one.rpartition(":")[0] in MAY_SPILL]
    wrong += [f"{one['case']}, {one['launch']}: {found}" for one in launches for found in one["wrong"]]
    new, mended = set(wrong) - set(known), set(known) - set(wrong)
    assert (new, mended) == (set(), set()), "\n".join(["new:", *new, "mended:", *mended])

    assert {one["launch"] for one in launches} == set(lines[-1]["kernels"])

    assert {one["launch"] for one in launches if one["cooperative"]} == COOPERATIVE
    # The two phases of a step use programmatic dependent launch.
    dependent = {one["launch"] for one in launches if one["dependent"]}
    assert dependent == ({"_step_rows_kernel", "_step_weights_kernel"} if arch >= 90 else set())

    # build_step compiles every kernel that train_step launches, and launches none itself: the driver sees
    # only what the launchers asked for.
    ahead = {build["build"]: build["ahead"] for build in builds if "built ahead" in build["case"]}
    assert ahead == {"_step_rows_kernel": True, "_step_weights_kernel": True}
    assert [one["launch"] for one in launches if "built ahead" in one["case"]] == list(ahead)
    assert lines[-1]["reached the driver"] == len(launches)


# What is refused -> Triton's exception with its base classes, and a part of its message.
REFUSALS = {
    "launch fails": (["RuntimeError", "Exception"], "Triton Error [CUDA]: unspecified launch failure"),
    "no memory": (["RuntimeError", "Exception"], "Triton Error [CUDA]: out of memory"),
    "no memory for the kernel": (["RuntimeError", "Exception"], "Triton Error [CUDA]: out of memory"),
    "shared memory": (["OutOfResources", "TritonError", "Exception"], "out of resource: shared memory"),
    "built only": (["OutOfResources", "TritonError", "Exception"], "out of resource: shared memory"),
    "built once more": (["OutOfResources", "TritonError", "Exception"], "out of resource: shared memory"),
    "source does not compile": (["CompilationError", "TritonError", "Exception"], "tile_range"),
    "ptxas fails": (["PTXASError", "TritonError", "Exception"], "no-such-option"),
}
NOT_REFUSED = {"the same kernel again"}
# What the stub refuses, like the driver -> the error's text.
STUB_REFUSES = {
    "grid": "invalid argument",
    "shared memory of a launch": "invalid argument",
    "cooperative grid": "too many blocks in cooperative launch",
    "dependent launch": "operation not supported",
    "module": "device kernel image is invalid",
}


def test_refusals(run: Run) -> None:
    """A refused launch raises the right exception with the right cause, and the next launch works."""
    lines = {line["refused"]: line for line in run("refusals", "80")}
    assert lines.keys() == REFUSALS.keys() | STUB_REFUSES.keys() | NOT_REFUSED
    for what, (classes, says) in REFUSALS.items():
        line = lines[what]
        raised = "OutOfMemoryError" if what.startswith("no memory") else "KernelFailed"
        assert (line["raised"], line["cause"]) == (raised, classes), line
        assert says in line["says"], line
    for what, says in STUB_REFUSES.items():
        assert lines[what]["says"] == f"Triton Error [CUDA]: {says}", lines[what]
    assert all(line["launches after"] == 1 for line in lines.values())
    # Once the driver has memory for a kernel, the same kernel is loaded and launched.
    again = lines["the same kernel again"]
    assert (again["says"], again["launches"]) == ("nothing was raised", 1)
