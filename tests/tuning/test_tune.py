"""fusedmlp.tune measures, saves and refuses the right things. Without a GPU it runs in the interpreter."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from available import HAS_TRITON
from commands import call

import fusedmlp
from fusedmlp import __main__
from fusedmlp.dispatch import backend_choice
from fusedmlp.tuning import measure, result, timing

if not HAS_TRITON:
    pytest.skip("Triton is not installed: no kernels to measure", allow_module_level=True)

from fusedmlp.kernels import chain, launch, tuning_table
from fusedmlp.kernels.layer import forward

INDEX = 0 if torch.cuda.is_available() else None
KIND = "ieee"


@pytest.fixture
def users_file(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning_table.forget()
    yield tuning_table.users_file(tuning_table.where(INDEX))
    tuning_table.forget()


def on_disk(file: pathlib.Path) -> Any:
    table, strange = tuning_table.parse(file.read_text(), tuning_table.where(INDEX), exact=True)
    assert not strange
    return table


@pytest.mark.kernels
def test_everything_of_a_chain_is_measured_once(users_file: pathlib.Path) -> None:
    tuned = fusedmlp.tune([(20, 16, 32, 7)], torch.float32)
    layers = [(32, 16), (7, 32)]
    assert {(p.operation, p.N, p.K) for p in tuned.products} == {
        (operation, N, K) for operation in ("forward", "grad_input", "grad_weight") for N, K in layers
    }
    assert all(p.problem is None and p.us > 0 and p.torch_us > 0 and p.rows == 20 for p in tuned.products)
    parts = [((16, 32, 7), False), ((16, 32), True), ((32, 7), False)]
    expected = [(mode, *part) for part in parts for mode in ("inference", "training")]
    assert [(s.mode, s.widths, s.final_relu) for s in tuned.stretches] == expected
    table = on_disk(users_file)
    assert {key[0:2] + key[2:] for key in table.products} == {
        (p.operation, KIND, 16, p.N, p.K) for p in tuned.products
    }
    assert set(table.stretches) == {(mode, KIND, 16, widths, relu) for mode, widths, relu in expected}
    # The measurements are used from now on, in this process too.
    assert tuning_table.table_of(INDEX).products == table.products
    json.dumps(tuned.to_dict())
    text = str(tuned)
    *lines, saved = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert saved == f"saved in {users_file}"
    again = fusedmlp.tune([(20, 16, 32, 7)], torch.float32)
    assert not again.products
    assert not again.stretches
    assert "in the table already" in str(again)
    more = fusedmlp.tune([(20, 16, 32)], torch.float32, final_relu=True)
    assert not more.products  # this chain was measured already, as a layer of the other one
    assert not more.stretches


@pytest.mark.kernels
def test_a_wrong_tile_is_told_of_and_never_chosen(
    users_file: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = forward.linear_forward

    def wrong(*args: Any) -> torch.Tensor:
        return right(*args) + 1

    monkeypatch.setattr(forward, "linear_forward", wrong)
    tuning = measure.Tuning(torch.device("cpu" if INDEX is None else "cuda"), torch.float32, False)
    shown, kept = tuning._product("forward", 8, 16, 16)
    assert kept is None
    assert shown.us is None
    assert "error" in str(shown.problem)
    assert "64x64x16, 8 warps: maximum error" in str(shown.problem)
    tuned = result.Tuned("here", "float32", (shown,), (), (), "there")
    assert "maximum error" in str(tuned)


@pytest.mark.kernels
@pytest.mark.parametrize("faster", [True, False])
def test_one_launch_for_a_chain_is_tried(
    faster: bool, users_file: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways (one launch, and one per layer) run while they are timed; then the faster one is used."""
    shape = 20, 16, 32, 7
    model = fusedmlp.nn.MLP(16, [32], 7, device="cpu" if INDEX is None else "cuda")
    x = torch.randn(20, 16, device=model[0].weight.device)
    timed = []

    def times(runs: dict[str, Any], device: torch.device) -> dict[str, float]:
        names: list[str] = []
        with launch.dry_run(lambda name, args: names.append(name)):
            runs["ours"]()
        timed.append(names)
        one = any(name.startswith("narrow") for name in names)
        return {"ours": 1.0 if one is faster else 2.0, "torch": 3.0}

    monkeypatch.setattr(timing, "wall_times", times)
    tuned = fusedmlp.tune([shape], torch.float32)
    assert [s.in_one for s in tuned.stretches] == [faster, faster, *[False] * 4]  # the chain, then its layers
    assert [s.us for s in tuned.stretches] == [1.0, 1.0, *[2.0 if faster else 1.0] * 4]
    assert [name for names in timed[:2] for name in names if "narrow" in name] == ["narrow_forward"]
    assert {"narrow_forward", "narrow_backward"} & set(timed[2]) == set()
    assert "narrow_forward" in timed[3]
    if INDEX is None:  # on a GPU the backward runs in its own thread, where dry_run records nothing
        assert "narrow_backward" in timed[3]
    assert ("in one launch" in str(tuned)) is faster
    assert {s.in_one for key, s in on_disk(users_file).stretches.items() if len(key[3]) == 3} == {faster}
    with backend_choice.measuring(), torch.no_grad():
        (row,) = fusedmlp.explain(model, x).rows
    assert (row.forward.launches == ("narrow_forward",)) is faster


@pytest.mark.kernels
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_a_wrong_launch_for_all_layers_is_told_of_and_never_chosen(
    step: str, users_file: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, name = chain, f"narrow_{step}"
    right = getattr(room, name)

    def wrong(*args: Any) -> Any:
        found = right(*args)
        if found is not None:
            (found[-1] if step == "forward" else found[0]).add_(1)
        return found

    monkeypatch.setattr(room, name, wrong)
    timings = iter([2.0, 1.0])  # the wrong launch would be the faster one if it were timed
    monkeypatch.setattr(timing, "wall_times", lambda *_: {"ours": next(timings), "torch": 3.0})
    tuning = measure.Tuning(torch.device("cpu" if INDEX is None else "cuda"), torch.float32, False)
    try:
        stretch, _ = tuning._chain("training", 20, (16, 32, 7), False)
    finally:
        tuning_table.disagree(INDEX)
    assert not stretch.in_one
    assert str(stretch.problem).startswith(f"{step}: maximum error")
    tuned = result.Tuned("here", "float32", (), (stretch,), (), "there")
    assert f"in one launch: {step}: maximum error" in str(tuned)


MISTAKES: dict[str, Any] = {
    "no shapes": (([],), ValueError, "shapes is empty"),
    "one shape": (((8, 16, 16),), TypeError, r"shapes is a list of shapes"),
    "short": (([(8, 16)],), ValueError, r"\(rows, in, hidden ..., out\), each at least 1, got \(8, 16\)"),
    "zero": (([(8, 16, 16), (0, 16, 16)],), ValueError, r"got \(0, 16, 16\)"),
    "float": (([(8, 16.0, 16)],), TypeError, r"whole numbers, got \(8, 16.0, 16\)"),
    "dtype": (([(8, 16, 16)], torch.float64), ValueError, "dtype must be one of .*, got torch.float64"),
    "seconds": (([(8, 16, 16)], torch.float32, 0), ValueError, "seconds must be positive, got 0"),
    "NaN seconds": (([(8, 16, 16)], torch.float32, float("nan")), ValueError, "seconds must be positive"),
}


@pytest.mark.parametrize(("args", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_change_nothing(args: Any, error: Any, message: str, users_file: pathlib.Path) -> None:
    with pytest.raises(error, match=message):
        fusedmlp.tune(*args)
    assert not users_file.parent.exists()
    assert not tuning_table.table_of(INDEX).products


def test_refused_where_the_kernels_cannot_run(users_file: pathlib.Path) -> None:
    with pytest.raises(RuntimeError, match=r"tune cannot run here\. The input is on the meta device"):
        fusedmlp.tune([(8, 16, 16)], device="meta")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = "import fusedmlp; fusedmlp.tune([(8, 16, 16)])"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "RuntimeError: tune cannot run here. The input is on the CPU" in run.stderr


@pytest.mark.gpu
@pytest.mark.kernels
def test_refused_during_graph_capture(users_file: pathlib.Path) -> None:
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="tune cannot run during CUDA graph capture"),
        torch.cuda.graph(graph),
    ):
        fusedmlp.tune([(8, 16, 16)])
    assert not users_file.exists()


def test_nothing_begins_after_the_time_is_over(users_file: pathlib.Path) -> None:
    tuned = fusedmlp.tune([(8, 16, 16), (8, 16, 32)], torch.float32, 1e-9)
    assert not tuned.products
    assert [what.split(":")[0] for what in tuned.left_out] == ["8 x 16-16", "8 x 16-32"]
    assert "left out: 8 x 16-32: the 1e-09 seconds were over" in str(tuned)


def test_a_table_of_a_later_version_is_left_alone(users_file: pathlib.Path) -> None:
    users_file.parent.mkdir(parents=True)
    users_file.write_text('{"format": 2}')
    with pytest.raises(
        RuntimeError, match="has format 2, and this version of fusedmlp reads 1: update fusedmlp"
    ):
        fusedmlp.tune([(8, 16, 16)], torch.float32)
    assert users_file.read_text() == '{"format": 2}'


@pytest.mark.kernels
def test_a_corrupt_table_is_set_aside(users_file: pathlib.Path) -> None:
    users_file.parent.mkdir(parents=True)
    users_file.write_text("{")
    with pytest.warns(UserWarning, match="is not JSON"):
        fusedmlp.tune([(8, 16, 16)], torch.float32)
    assert users_file.with_suffix(".bad").read_text() == "{"
    assert len(on_disk(users_file).products) == 3


def python(code: str, cache: pathlib.Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)} | environment,
        # A shell makes background processes ignore SIGINT, and the tests would pass that on to this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


TUNE = (
    "import sys, torch, fusedmlp\n"
    "fusedmlp.tune([(8, 16, int(width)) for width in sys.argv[1:]], torch.float32)\n"
)


@pytest.mark.kernels
def test_two_processes_at_once_lose_nothing(users_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    both = [python(TUNE, tmp_path, *widths) for widths in (("16", "32"), ("48", "64"))]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    table = on_disk(users_file)
    assert {key[3] for key in table.products} == {16, 32, 48, 64}
    assert {key[3][1] for key in table.stretches} == {16, 32, 48, 64}
    assert sorted(p.suffix for p in users_file.parent.iterdir()) in ([".json"], [".json", ".lock"])


@pytest.mark.slow
@pytest.mark.kernels
def test_many_writers_at_once_lose_nothing(users_file: pathlib.Path) -> None:
    """Three processes only write, twenty times each."""
    code = (
        "import os, sys, time, torch\n"
        "from fusedmlp.tuning import measure\n"
        # Writing is slowed down: a process that did not wait would overwrite the entries of another.
        "replace = os.replace\n"
        "os.replace = lambda *args: (time.sleep(0.02), replace(*args))\n"
        "for i in range(20):\n"
        "    one = measure.Tuning(torch.device(sys.argv[2]), torch.float32, False)\n"
        "    tile = one.kernels.tiles.TILES['ieee'][0]\n"
        "    key = 'forward', 'ieee', 16, 16 * (int(sys.argv[1]) * 20 + i + 1), 16\n"
        "    one.found.products[key] = one.tuning_table.Product(tile, 1.0, 1.0)\n"
        "    one._save()\n"
    )
    device = "cpu" if INDEX is None else "cuda:0"
    writers = [python(code, users_file.parents[1], str(i), device) for i in range(3)]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
    assert len(on_disk(users_file).products) == 60


@pytest.mark.slow
@pytest.mark.kernels
def test_a_killed_writer_leaves_the_old_table(users_file: pathlib.Path) -> None:
    fusedmlp.tune([(8, 16, 16)], torch.float32)
    before = users_file.read_text()
    code = (
        "import os, signal\n"
        "replace = os.replace\n"
        "os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "import sys\n" + TUNE
    )
    process = python(code, users_file.parents[1], "32", "48")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert users_file.read_text() == before
    fusedmlp.tune([(8, 16, 32)], torch.float32)  # the lock of the killed process is free again
    assert {key[3] for key in on_disk(users_file).products} == {16, 32}


@pytest.mark.kernels
def test_an_interrupt_keeps_the_shapes_before(users_file: pathlib.Path) -> None:
    code = (
        "import sys, torch, fusedmlp\n"
        "print('begin', flush=True)\n"
        "fusedmlp.tune([(8, 16, 16)] + [(256, 16 * i, 256) for i in range(1, 40)], torch.float32, 1000.0)\n"
    )
    process = python(code, users_file.parents[1])
    deadline = time.monotonic() + 120
    while not users_file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert 16 in {key[3] for key in on_disk(users_file).products}


RANK = """
import os, sys, torch, torch.distributed as dist, fusedmlp
from fusedmlp.dispatch import predicate
table = predicate.kernels().tuning_table
index = 0 if torch.cuda.is_available() else None
try:
    fusedmlp.tune([(8, 16, 16)], torch.float32)
except RuntimeError as error:
    assert "after init_process_group" in str(error), error
else:
    raise AssertionError("measured by itself")
rank, meeting_point = int(os.environ["RANK"]), os.environ["MEETING_POINT"]
dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=2)
assert not table.table_of(index).products, "a file was read, which the other rank may not have"
tuned = fusedmlp.tune([(8, 16, 16)], torch.float32)
print(sorted((key, tuple(value)) for key, value in table.table_of(index).products.items()))
print(tuned.path)
dist.destroy_process_group()
"""


@pytest.mark.kernels
def test_all_ranks_choose_by_the_table_of_rank_0(tmp_path: pathlib.Path) -> None:
    """Each rank has its own cache folder, as on separate machines, and the tables in them differ."""
    caches = [tmp_path / "a", tmp_path / "b"]
    for cache, width in zip(caches, ("32", "48"), strict=True):
        process = python(TUNE, cache, width, width)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    # The two ranks get their job from the environment. They meet in a file, because any port may be in use.
    job = {"WORLD_SIZE": "2", "MEETING_POINT": (tmp_path / "meeting").as_uri()}
    ranks = [python(RANK, cache, RANK=str(rank), **job) for rank, cache in enumerate(caches)]
    said = []
    for process in ranks:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        said.append(output)
    assert said[0] == said[1]
    assert "('forward', 'ieee', 8, 16, 16)" in said[0]
    assert "('forward', 'ieee', 8, 32, 16)" in said[0]  # from rank 0's own table
    assert "('forward', 'ieee', 8, 48, 16)" not in said[0]
    assert str(caches[0]) in said[0]


@pytest.mark.kernels
def test_command_line(users_file: pathlib.Path) -> None:
    command = [sys.executable, "-m", "fusedmlp", "tune"]
    run = subprocess.run(
        [*command, "8,16,16", "8,16,7", "--dtype", "fp32", "--seconds", "60"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "forward 8 x 16 -> 7" in run.stdout
    assert f"saved in {users_file}" in run.stdout
    for wrong, said in ((["8,x,16"], "invalid literal"), (["8,16"], "got (8, 16)"), ([], "required")):
        run = call(__main__.main, "tune", *wrong)
        assert run.returncode == 2
        assert said in run.stderr
    run = call(__main__.main, "tune", "--help")
    assert "example: python -m fusedmlp tune 4096,784,256,128,10" in run.stdout
    assert "tune" in call(__main__.main, "--help").stdout


@pytest.mark.kernels
def test_what_was_measured_is_what_auto_would_run(users_file: pathlib.Path) -> None:
    """In the interpreter PyTorch's operators are faster, so auto runs only those."""
    fusedmlp.tune([(8, 16, 32, 16)], torch.float32)
    model = fusedmlp.MLP(16, [32], 16, device=None if INDEX is None else "cuda")
    x = torch.randn(8, 16, device=None if INDEX is None else "cuda")
    with backend_choice.measuring(), torch.no_grad():
        (row,) = fusedmlp.explain(model, x).rows
    chosen = {f.us > f.torch_us for f in row.measured}
    assert row.forward.launches is not None
    if chosen == {True}:
        assert row.forward.launches == ("linear", "relu_", "linear")
    assert len(row.measured) == 2
