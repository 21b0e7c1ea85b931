"""The benchmark suite does not time wrong results, and loses no measurements."""

import copy
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from available import HAS_TRITON
from commands import ROOT, benchmarks, call

pytest.importorskip("tqdm", reason="tqdm is not installed: no benchmark suite")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: no benchmark suite")

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT))  # benchmarks is not an installed package
    from benchmarks import cases, contestants, profiles, report, results, step_kernels, sweep, timing
    from benchmarks.cases import Case
    from benchmarks.numerics import FOUND, memcheck
    from benchmarks.statuses import TIME_OVER

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: no kernels to run")


# --- results are checked before they are timed ---

SMALL = [Case(what, 6, (5, 4) if "layer" in what else (5, 4, 3), "float32") for what in cases.KINDS]


def field(*wrongs: contestants.Contestant) -> Any:
    eager = contestants.Contestant("eager", "torch", False, contestants._plain)
    return lambda *_: [eager, *wrongs]


def one(prepare: Any) -> contestants.Contestant:
    return contestants.Contestant(prepare.__name__, "torch", False, prepare)


def almost(work: contestants.Work) -> contestants.Prepared:
    """One value of one result is wrong by one part in a thousand."""
    runner = contestants.Runner(work, work.own_model())

    def run(i: int) -> contestants.Results:
        *rest, last = runner(i)
        last = last.clone()
        last.view(-1)[-1] *= 1.001
        return (*rest, last)

    return runner, run


def deaf(work: contestants.Work) -> contestants.Prepared:
    """It ignores its input, like a graph that always replays the input of its capture."""
    runner = contestants.Runner(work, work.own_model())
    return runner, lambda i: runner(0)


def fails(work: contestants.Work) -> contestants.Prepared:
    raise RuntimeError("this one cannot run\nfor a long reason")


@pytest.mark.thinned
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("wrong", [almost, deaf])
def test_a_wrong_result_has_no_time(case: Case, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "contestants", field(one(wrong), one(contestants._plain)))
    eager, refused, right = sweep.measure(case, CPU, False, True)["contestants"]
    assert refused["problem"].startswith("wrong: result ")
    assert refused["wall_us"] is refused["tflops"] is None
    for row in (eager, right):
        assert row["problem"] is None
        assert row["wall_us"]["median"] > 0


def test_a_step_is_checked_by_how_it_changes_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_momentum(work: contestants.Work) -> contestants.Prepared:
        runner = contestants.Runner(work, work.own_model())
        runner.optimizer = torch.optim.SGD(runner.parameters, lr=0.0101)
        return runner, runner

    monkeypatch.setattr(contestants, "contestants", field(one(no_momentum)))
    (case,) = [case for case in SMALL if case.what == cases.STEP]
    _, refused = sweep.measure(case, CPU, False, True)["contestants"]
    assert refused["problem"].startswith("wrong: result 1")


def test_a_contestant_that_fails_says_why_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "contestants", field(one(fails), one(contestants._plain)))
    rows = sweep.measure(SMALL[0], CPU, False, True)["contestants"]
    assert [row["problem"] for row in rows] == [None, "RuntimeError: this one cannot run", None]
    assert rows[1]["wall_us"] is None


def test_without_eager_no_contestant_is_checked_or_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = contestants.Contestant("eager", "torch", False, fails)
    monkeypatch.setattr(contestants, "contestants", lambda *_: [broken, one(contestants._plain)])
    rows = sweep.measure(SMALL[0], CPU, False, True)["contestants"]
    assert rows[1]["problem"].startswith("not checked: eager PyTorch")
    assert rows[1]["wall_us"] is None


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_float64_in_parts_is_float64_at_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    work = contestants.Work(case, CPU, 2)
    whole = contestants.exactly(work)
    monkeypatch.setattr(contestants, "MOST_AT_ONCE", 2 * max(case.widths))  # two rows at a time
    for parts, at_once in zip(contestants.exactly(work), whole, strict=True):
        torch.testing.assert_close(parts, at_once)


def test_contestants_do_not_disturb_each_other() -> None:
    """In a step each contestant has its own weights; elsewhere they share them, and none changes them."""
    for case in SMALL:
        work = contestants.Work(case, CPU, 2)
        before = copy.deepcopy(work.model.state_dict())
        names = ("eager", "eager, fused optimizer", "fusedmlp auto", "fusedmlp torch")
        prepared = [
            kind.prepare(work)
            for kind in contestants.contestants(case, CPU, False, False)
            if kind.name in names
        ]
        first = prepared[0][0].results(prepared[0][1])
        for _ in range(2):  # they take turns, as in timing
            for runner, run in prepared:
                run(0)
                assert all(torch.equal(t, before[name]) for name, t in work.model.state_dict().items())
                for one, same in zip(runner.results(run), first, strict=True):
                    torch.testing.assert_close(one, same)
        assert all(p.grad is None for p in work.model.parameters())


def test_flops_and_bytes_by_hand() -> None:
    layer = Case(cases.LAYER_BOTH, 10, (3, 5), "bfloat16")
    assert layer.flops == 3 * 2 * 10 * 3 * 5
    # Forward: x, weight, bias, y. Backward: grad_y, y's mask, x, grad_weight, grad_bias, weight, grad_x.
    forward = 30 + 15 + 5 + 50
    assert layer.least_bytes == 2 * (forward + 50 + 50 + 30 + 15 + 5 + 15 + 30)
    assert layer._replace(what=cases.LAYER_FORWARD).least_bytes == 2 * forward
    network = Case(cases.BOTH, 10, (3, 5, 7), "float32")
    assert network.flops == 2 * 10 * (3 * 15 + 3 * 35 - 15)  # no gradient of the data


# --- files of results, and reports on them ---


def timed(name: str, us: float, family: str = "torch", graph: bool = False, **changes: Any) -> dict[str, Any]:
    time = {"median": us, "low": 0.95 * us, "high": 1.05 * us, "rounds": 7}
    return {
        "name": name, "family": family, "graph": graph, "problem": None, "error_ratio": 1.0, "wall_us": time,
        "device_us": None, "tflops": 1.0, "gbps": 1.0, "peak_bytes": None, "note": None,
    } | changes  # fmt: skip


def file_of(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    case = Case(cases.BOTH, 64, (8, 16, 4), "float32")
    return results.about(CPU, False) | {
        "ceilings": {"copy_gbps": 10.0, "tflops": {"float32": 0.05}},
        "cases": [
            {
                "what": case.what, "rows": case.rows, "widths": list(case.widths), "dtype": case.dtype,
                "flops": case.flops, "least_bytes": case.least_bytes, "contestants": list(rows),
            }
        ],
    } | changes  # fmt: skip


def written(folder: pathlib.Path, found: dict[str, Any]) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    results.write(found, folder / "results.json")
    return folder / "results.json"


def test_the_report_shows_losses_as_clearly_as_wins(tmp_path: pathlib.Path) -> None:
    rows = [timed("eager", 100), timed("compile", 80), timed("eager in a graph", 10, graph=True)]
    found = file_of(*rows, timed("fusedmlp auto", 100, "fusedmlp"))
    report.write(found, tmp_path)
    text = (tmp_path / "results.md").read_text()
    # It is compared with PyTorch's best without a graph (80), not with eager or the graph.
    loss = text.split("## Where PyTorch is faster")[1].split("##")[0]
    assert (
        "| MLP forward+backward 64x8x16x4 float32 | auto | 0.80x | 100 ± 5 | 80.0 ± 4.0 | compile |" in loss
    )
    assert "| MLP forward+backward, float32 | auto | 0.80x | 0.80x | 0.80x | 1 | 0 | 0 |" in text
    assert "0.80x in the geometric mean; slower 1, equal 0, faster 0" in "\n".join(report.headline(found))
    found["cases"][0]["contestants"][-1] = timed("fusedmlp auto", 40, "fusedmlp")
    report.write(found, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "In no case by more than the noise." in text
    assert "| MLP forward+backward, float32 | auto | 2.00x | 2.00x | 2.00x | 0 | 0 | 1 |" in text


def test_a_wrong_result_is_shown_as_wrong(tmp_path: pathlib.Path) -> None:
    problem = "wrong: result 0: maximum error 1"
    bad = timed("fusedmlp auto", 1, "fusedmlp", problem=problem, wall_us=None)
    absent = timed("fusedmlp chain", 1, "fusedmlp", problem="RuntimeError: no GPU", wall_us=None)
    found = file_of(timed("eager", 100), bad, absent)
    report.write(found, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert f"- **MLP forward+backward 64x8x16x4 float32, fusedmlp auto: {problem}**" in text
    assert "| **wrong** | - |" in text
    assert "- fusedmlp chain, MLP forward+backward 64x8x16x4 float32: RuntimeError: no GPU" in text
    assert "wrong results: 1" in report.headline(found)


def test_plots_that_have_data_are_drawn_and_the_others_say_why(tmp_path: pathlib.Path) -> None:
    (tmp_path / "memory.png").write_text("of other results")
    drawn = report.write(file_of(timed("eager", 2), timed("fusedmlp auto", 1, "fusedmlp")), tmp_path)
    assert [path.name for path in drawn] == ["results.md", "speedup.png", "roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn[1:])
    assert not (tmp_path / "memory.png").exists()
    text = (tmp_path / "results.md").read_text()
    assert "memory.png is not drawn: peak memory is that of a GPU's allocator" in text
    assert "steps.png is not drawn: no training step has a time" in text
    gpu = file_of(timed("eager", 2, peak_bytes=100), timed("fusedmlp chain", 1, "fusedmlp", peak_bytes=60))
    gpu["device"]["type"] = "cuda"
    assert "memory.png" in [path.name for path in report.write(gpu, tmp_path)]


def test_comparison(tmp_path: pathlib.Path) -> None:
    names = ("eager", "addmm_activation", "compile", "fusedmlp auto")
    first = file_of(*[timed(name, 100) for name in names])
    later = file_of(*[timed(name, us) for name, us in zip(names, (104, 96, 150, 50), strict=True)])
    later["cases"].append(later["cases"][0] | {"rows": 128})
    files = [written(tmp_path / name, found) for name, found in (("a", first), ("b", later))]
    run = benchmarks("report", *files)
    assert run.returncode == 0, run.stderr
    assert "fusedmlp auto: faster, 100 ± 5 -> 50.0 ± 2.5 us, 2.00x" in run.stdout
    assert "compile: slower, 100 ± 5 -> 150 ± 8 us, 0.67x" in run.stdout
    assert "eager:" not in run.stdout  # within the spread
    assert "addmm_activation:" not in run.stdout
    assert "1 cases in both: 1 slower, 2 equal, 1 faster." in run.stdout
    assert "only in 2: MLP forward+backward 128x8x16x4 float32" in run.stdout
    assert "DIFFERENT" not in run.stdout


def test_comparison_of_different_devices_says_so_first_and_last(tmp_path: pathlib.Path) -> None:
    first, later = file_of(timed("eager", 100)), file_of(timed("eager", 10))
    later["device"]["name"] = "another"
    lines = list(report.comparison(first, later, "a", "b"))
    assert lines[2].startswith("DIFFERENT DEVICES")
    assert lines[-1] == lines[2]


def test_comparison_tells_what_broke() -> None:
    broken = timed("eager", 1, problem="wrong: result 0", wall_us=None)
    lines = list(report.comparison(file_of(timed("eager", 100)), file_of(broken), "a", "b"))
    assert "MLP forward+backward 64x8x16x4 float32, eager: wrong: result 0, was: ran" in lines
    assert any("1 broken" in line for line in lines)


DAMAGED = {
    "absent": (None, "there is no such file"),
    "truncated": (json.dumps(file_of(timed("eager", 1)))[:-100], "is not JSON"),
    "no results": ('{"format": "none"}', "is not a results.json"),
    "a list": ("[]", "is not a results.json"),
    "future": ('{"format": 99}', "has format 99, and this version reads 1"),
    "no cases": ('{"format": 1}', "has an invalid entry (KeyError: 'cases')"),
    "negative": (json.dumps(file_of(timed("eager", -1))), "has an invalid entry (AssertionError)"),
    "binary": (b"\x89PNG\xff", "cannot be read"),
}


@pytest.mark.parametrize(("content", "problem"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named(content: Any, problem: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "results.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(results.Unreadable) as refusal:
        results.read(file)
    assert str(refusal.value).startswith(str(file))
    assert problem in str(refusal.value)


# --- the command ---


def test_mistakes_on_the_command_line(tmp_path: pathlib.Path) -> None:
    run = benchmarks("--only", "no such case", "--out", tmp_path / "new")
    assert run.returncode == 2
    assert run.stderr.endswith("no case matches no such case; --list shows them all\n")
    assert not (tmp_path / "new").exists()
    run = benchmarks("report", tmp_path / "nothing.json")
    assert (run.returncode, run.stderr) == (2, f"{tmp_path / 'nothing.json'}: there is no such file\n")
    run = benchmarks("--list", "--only", "mlp*784*")
    assert run.returncode == 0
    assert "MLP inference 64x784x256x128x10 float32\n" in run.stdout
    assert "layer" not in run.stdout


def test_an_interrupted_sweep_goes_on(tmp_path: pathlib.Path) -> None:
    command = ("--dry-run", "--no-report", "--out", tmp_path, "--only")
    assert benchmarks(*command, "layer forward 8x*").returncode == 0
    before = results.read(tmp_path / "results.json")["cases"]
    assert len(before) == 2
    run = benchmarks(*command, "layer forward *")
    assert run.returncode == 0, run.stderr
    assert "has 2 cases already" in run.stdout
    after = results.read(tmp_path / "results.json")["cases"]
    assert after[:2] == before
    assert len(after) == 4
    # A sweep does not continue results of another device.
    found = json.loads((tmp_path / "results.json").read_text())
    found["device"]["name"] = "another"
    written(tmp_path, found)
    run = benchmarks(*command, "layer*")
    assert run.returncode == 2
    assert "has results of another device" in run.stderr
    assert json.loads((tmp_path / "results.json").read_text()) == found


@pytest.mark.slow
@needs_triton
@pytest.mark.kernels
def test_numerics_of_the_kernels() -> None:
    run = benchmarks("--small", "--only", "fusedmlp chain", module="benchmarks.numerics")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "14 checks: 0 wrong, 0 did not run" in run.stdout
    assert run.stdout.endswith("14 of 14 cases done\n")


@pytest.mark.slow
@needs_triton
@pytest.mark.kernels
def test_a_tuned_table_can_ship_and_be_continued(tmp_path: pathlib.Path) -> None:
    from fusedmlp.kernels import tuning_table

    command = [sys.executable, "-m", "benchmarks.tuned", "--dry-run", "--out", str(tmp_path)]
    said = []
    for cache in ("one", "two"):  # the second run has only the folder, like another machine
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / cache)}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        said.append(run.stdout.splitlines()[-3])
        here = tuning_table.where(torch.cuda.current_device() if torch.cuda.is_available() else None)
        table, strange = tuning_table.parse(
            (tmp_path / tuning_table.shipped_file(here).name).read_text(), here, exact=False
        )
        assert not strange
        assert len(table.products) == 9  # three operations of three layers
    assert said[0].startswith("9 products and 8 chains measured")
    assert said[1].startswith("0 products and 0 chains measured")


def test_profile_of_a_step_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytest_benchmark")
    from benchmarks import cpu_profile

    monkeypatch.setattr(cpu_profile, "PROFILES", 1)  # each takes seconds
    monkeypatch.setattr(cpu_profile, "STEPS", 4)
    ran = call(cpu_profile.main, "--batch", "3", "--seconds", "0.1")
    title, head, *rows = ran.stdout.splitlines()
    assert "batch 3" in title
    assert head.split() == ["step", "products", "GFLOP/s", "update", "rest", "operators"]
    figures = {
        name: [float(n) for n in row.split()] for name, row in ((row[:20].strip(), row[20:]) for row in rows)
    }
    assert set(figures) == {f"{o}, {who}" for o in ("SGD", "Adam") for who in ("plain loop", "TrainStep")}
    for step, products, _, update, rest, operators in figures.values():
        assert abs(step - products - update - rest) <= 2  # each is rounded
        assert min(products, update, operators) > 0
    for optimizer in ("SGD", "Adam"):
        assert figures[f"{optimizer}, TrainStep"][-1] < figures[f"{optimizer}, plain loop"][-1]


# --- a time limit loses at most one row, and is told apart from a normal end ---


def module(name: str, *arguments: str | pathlib.Path) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not there() and time.monotonic() < deadline:
        time.sleep(0.02)


def interruptible(command: list[str], **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        # A shell makes background processes ignore SIGINT, and the tests would pass that on to this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def test_numerics_say_when_their_time_was_over() -> None:
    command = ("--small", "--only", "fusedmlp torch", "--minutes", "1e-9")
    run = benchmarks(*command, module="benchmarks.numerics")
    assert run.returncode == TIME_OVER, run.stdout + run.stderr
    assert run.stdout.endswith("0 of 14 cases done\n")


def test_a_sweep_says_when_its_time_was_over(tmp_path: pathlib.Path) -> None:
    command = ("--dry-run", "--no-report", "--out", tmp_path, "--only", "layer forward *")
    assert benchmarks(*command[:-1], "layer forward 8x*").returncode == 0
    run = benchmarks(*command, "--minutes", "1e-9")
    assert run.returncode == TIME_OVER, run.stderr
    assert run.stdout.endswith("2 of 4 cases done\n")


@needs_triton
@pytest.mark.kernels
def test_tuning_says_when_its_time_was_over(tmp_path: pathlib.Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = module("tuned", "--dry-run", "--minutes", "1e-9", "--out", tmp_path)
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == TIME_OVER, run.stdout + run.stderr
    assert run.stdout.endswith("\n0 of 2 shapes done\n")


@pytest.mark.slow
@needs_triton
@pytest.mark.kernels
def test_tuning_that_is_killed_leaves_a_table_of_the_shapes_before(tmp_path: pathlib.Path) -> None:
    from fusedmlp.kernels import tuning_table

    here = tuning_table.where(torch.cuda.current_device() if torch.cuda.is_available() else None)
    file = tmp_path / tuning_table.shipped_file(here).name
    process = interruptible(
        module("tuned", "--dry-run", "--out", tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache")
    )
    wait_for(file.exists)
    process.kill()
    process.communicate()
    table, strange = tuning_table.parse(file.read_text(), here, exact=False)
    assert not strange
    assert len(table.products) == 6  # three operations of the two layers of the first shape


@needs_triton
@pytest.mark.kernels
def test_profiles_are_written_one_by_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--dry-run", "--no-report", "--out", tmp_path, "--only", "layer forward *float32")
    assert benchmarks(*command).returncode == 0
    profile_of = profiles._kernels
    written: list[str] = []

    def interrupted_at_the_third(case: dict[str, Any], name: str) -> str:
        file = tmp_path / "profiles.txt"
        written.append(file.read_text())
        if len(written) == 3:
            raise KeyboardInterrupt
        return profile_of(case, name)

    monkeypatch.setattr(profiles, "_kernels", interrupted_at_the_third)
    monkeypatch.setattr(sys, "argv", ["profiles", "--out", str(tmp_path)])
    assert profiles.main() == TIME_OVER
    assert [text.count("\ntogether ") for text in written] == [0, 1, 2]
    assert capsys.readouterr().out.endswith("\n1 of 2 cases done\n")


@pytest.mark.slow
@needs_triton
@pytest.mark.kernels
def test_the_forms_of_a_step_go_on_after_an_interrupt(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "steps.json"
    command = module("step_kernels", "epoch", "--dry-run", "--output", file)
    process = interruptible(command)
    wait_for(file.exists)
    first = json.loads(file.read_text())["results"]  # each result is written as soon as it is measured
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    rows = json.loads(file.read_text())["results"]
    assert rows[: len(first)] == first
    assert process.returncode == TIME_OVER, said
    assert f"{len({row['arithmetic'] for row in rows})} of 4 settings done" in said.splitlines()[-1]
    marked = json.loads(file.read_text())
    marked["results"][0]["loss_error"] = -1.0  # to tell whether it is measured again
    file.write_text(json.dumps(marked))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith(f"{file} has {len(rows)} rows already, measured from ")
    assert "4 of 4 settings done" in run.stdout
    again = json.loads(file.read_text())["results"]
    assert [row["arithmetic"] for row in again] == list(step_kernels.KINDS)
    assert again[0]["loss_error"] == -1.0


def test_what_was_measured_on_another_device_or_failed_is_measured_again(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "steps.json"
    here = step_kernels.about(dry=True)
    row = {"what": "epoch", "arithmetic": "ieee", "batch": 24, "form": "two launches"}
    results.write(here | {"results": [row]}, file)
    assert step_kernels.kept(file, here) == [row]
    other = here | {"device": here["device"] | {"name": "another"}}
    assert step_kernels.kept(file, other) == []
    (setting, *_) = step_kernels.settings(["epoch"], dry=True)
    assert step_kernels.done(setting, [row])
    assert not step_kernels.done(setting, [row | {"problem": "off"}])
    assert not step_kernels.done(setting._replace(kind="tf32"), [row])
    file.write_text("{")
    assert step_kernels.kept(file, here) == []


def tool(folder: pathlib.Path, code: str) -> str:
    """A stand-in for compute-sanitizer, which needs a GPU. It ignores its command and runs ``code``."""
    path = folder / "tool"
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("status", "verdict"), [(0, "nothing found"), (FOUND, "FOUND something"), (3, "exit status 3")]
)
def test_memcheck_tells_what_was_found(
    status: int, verdict: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says = "a case", "3 of 7 cases done", "== ERROR SUMMARY: x"
    code = "\n".join([*(f"print({line!r})" for line in says), f"raise SystemExit({status})"])
    assert memcheck(tool(tmp_path, code), ["some", "command"]) == status
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "a case"
    assert said[-3:] == [f"memcheck: {verdict}", "3 of 7 cases done", "== ERROR SUMMARY: x"]


@pytest.mark.slow
def test_memcheck_prints_each_line_at_once(tmp_path: pathlib.Path) -> None:
    slow = tool(
        tmp_path,
        # The line is printed inside of try, because the interrupt comes as soon as the line has been read.
        "import time\ntry:\n    print('a case', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('1 of 7 cases done')\n",
    )
    code = f"import sys; from benchmarks.numerics import memcheck; sys.exit(memcheck({slow!r}, []))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "a case\n"  # long before the end
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert rest.endswith("\nmemcheck: nothing found\n1 of 7 cases done\n")
    assert process.returncode == TIME_OVER


def test_quick_has_nothing_that_takes_minutes_to_compile() -> None:
    for case in cases.quick():
        quick, all_of_them = (
            {one.name for one in contestants.contestants(case, torch.device("cuda"), few, True)}
            for few in (True, False)
        )
        assert all_of_them - quick == {"compile reduce-overhead", "compile max-autotune"}
        assert {"eager", "compile", "eager in a graph", "fusedmlp auto", "fusedmlp in a graph"} <= quick


# --- a failed capture does no harm ---


def with_a_question(i: int) -> float:
    """The CPU reads a value of the GPU, which cannot be captured in a graph."""
    return torch.randn(3, device="cuda").sum().item()


@pytest.mark.gpu
def test_a_failed_capture_is_reported_and_the_next_run_is_timed() -> None:
    x = torch.randn(64, 64, device="cuda")
    found = timing.on_the_device({"asks": with_a_question, "is right": lambda i: x @ x}, 3, 2)
    assert isinstance(found["asks"], str)
    assert found["is right"]["median"] > 0
    assert torch.isfinite(torch.randn(8, device="cuda")).all()


@pytest.mark.gpu
def test_failed_captures_of_a_contestant_and_a_form_leave_the_process_healthy() -> None:
    def asks(work: contestants.Work) -> contestants.Prepared:
        runner = contestants.Runner(work, work.own_model())
        runner.forward = lambda x: x * x.sum().item()
        return runner, runner

    work = contestants.Work(SMALL[0], torch.device("cuda"), 2)
    with pytest.raises(RuntimeError):
        contestants._in_a_graph(asks)(work)
    with pytest.raises(RuntimeError):
        step_kernels.graph_of(lambda: print(with_a_question(0)))
    assert torch.isfinite(torch.randn(8, device="cuda")).all()
    runner, run = contestants._in_a_graph(contestants._plain)(work)
    torch.testing.assert_close(run(1), runner(1))
