"""gpu-session: a part that fails does not harm the others, and results are never lost."""

import json
import os
import pathlib
import signal
import site
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from available import HAS_TRITON
from commands import ROOT, benchmarks

pytest.importorskip("tqdm", reason="tqdm is not installed: no benchmark suite")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: no benchmark suite")

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT))  # benchmarks is not installed
    from benchmarks import parts, results, session
    from benchmarks.bounded_log import BoundedLog
    from benchmarks.parts import Part
    from benchmarks.statuses import AGAIN, LEFT_OUT, TIME_OVER

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: no kernels to run")
MOST_BYTES = 16 * 2**20


def part(name: str, code: str, seconds: float = 10, lines: int = 1) -> Part:
    return Part(name, f"what {name} does", seconds, lambda setting: [sys.executable, "-c", code], lines)


@pytest.fixture
def go(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run parts for at most this many seconds, with the results in tmp_path / "out"."""
    monkeypatch.setattr(session, "GRACE", 2)
    monkeypatch.setattr(session, "FINISH", 3)
    (tmp_path / "out").mkdir()

    def run(*chosen: Part, seconds: float = 300) -> int:
        return session.go(chosen, tmp_path / "out", tmp_path / "cache", time.monotonic() + seconds, True)

    return run


# --- parts that go wrong, and time ---


@pytest.mark.slow
def test_a_part_that_crashes_or_hangs_loses_nothing(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], go: Callable[..., int]
) -> None:
    grandchild = tmp_path / "grandchild"
    late = f"import time, pathlib; time.sleep(5); pathlib.Path({str(grandchild)!r}).touch()"
    hang = (  # ignores the interrupt, and has a child process that would outlive it
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {late!r}])\n"
        "print('before the end', flush=True)\n"
        "time.sleep(60)"
    )
    again = (
        f"import pathlib, sys\nfile = pathlib.Path({str(tmp_path / 'count')!r})\n"
        "count = int(file.read_text()) + 1 if file.exists() else 1\n"
        "file.write_text(str(count))\nprint('time', count)\n"
        f"sys.exit({AGAIN} if count < 3 else 0)"
    )
    status = go(
        part("good", "print('noise\\n\\nthe result\\nof two lines')", lines=2),
        part("crash", "import os; print('so far', flush=True); os.abort()"),
        part("hang", hang, seconds=0.5),
        part("fails", "raise SystemExit('a reason')"),
        part("not here", f"print('no such tool'); raise SystemExit({LEFT_OUT})"),
        part("again", again),
        part("cut short", f"print('2 of 7 done'); raise SystemExit({TIME_OVER})"),
        part("last", "print('the last')"),
    )
    assert status == 1
    page = (tmp_path / "out" / "summary.md").read_text()
    assert page in capsys.readouterr().out
    told = {}
    for section in page.split("\n## ")[1:]:
        heading, what, *said = [line for line in section.splitlines() if line]
        name, verdict = heading.split(": ", 1)
        assert what == f"what {name} does"
        told[name] = (verdict.rpartition(",")[0], said)
    crash, said = told.pop("crash")
    assert crash == "CRASHED by signal 6 (SIGABRT)"
    assert said[0] == "    so far"
    assert any("Fatal Python error: Aborted" in line for line in said[1:])  # from standard error
    assert told == {
        "good": ("done", ["    the result", "    of two lines"]),
        "hang": ("time was over", ["    before the end"]),
        "fails": ("FAILED with exit status 1", ["    a reason"]),
        "not here": ("left out", ["    no such tool"]),
        "again": ("done", ["    time 3"]),
        "cut short": ("time was over: 2 of 7 done", ["    2 of 7 done"]),
        "last": ("done", ["    the last"]),
    }
    log = (tmp_path / "out" / "log.txt").read_text()
    for line in ("noise", "so far", "a reason", "the last"):
        assert f"\n{line}\n" in log
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "summary.md"]
    time.sleep(max(0.0, 5 - (time.time() - (tmp_path / "count").stat().st_mtime)))
    assert not grandchild.exists()


@pytest.mark.parametrize("status", [TIME_OVER, 1])
def test_a_part_that_did_not_do_everything_is_not_good(status: int, go: Callable[..., int]) -> None:
    assert go(part("one", "print(1)"), part("two", f"raise SystemExit({status})")) == 1


def test_all_good_is_0(go: Callable[..., int]) -> None:
    assert go(part("one", "print(1)"), part("two", f"raise SystemExit({LEFT_OUT})")) == 0


@pytest.mark.slow
def test_it_ends_in_time_though_a_part_is_deaf(tmp_path: pathlib.Path, go: Callable[..., int]) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    assert go(part("deaf", deaf, seconds=1), part("more", "print(1)", seconds=0.01), seconds=10) == 1
    assert time.monotonic() - began < 10
    page = (tmp_path / "out" / "summary.md").read_text()
    assert "## deaf: time was over, " in page
    assert "## more: no time was left, 0 s" in page


def test_what_a_part_leaves_the_others_have(
    go: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_head", lambda dry_run: [])  # reading the machine's properties takes time
    parts = [part("short", "", seconds=90), part("long", "", seconds=10)]
    assert go(*parts, seconds=105) == 0
    said = capsys.readouterr().out
    assert "1 of 2: short, 90 s at most" in said
    assert int(said.split("2 of 2: long, ")[1].split(" s at most")[0]) > 90


def test_an_interrupt_keeps_what_was_done(tmp_path: pathlib.Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from benchmarks import session\n"
        "from benchmarks.parts import Part\n"
        "slow = 'import time; print(1, flush=True); time.sleep(60)'\n"
        "python = lambda code: lambda setting: [sys.executable, '-c', code]\n"
        "parts = [Part(str(i), '', 1, python(c)) for i, c in enumerate(('print(0)', slow, slow))]\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "sys.exit(session.go(parts, here, here / 'cache', time.monotonic() + 300, True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        # A shell that runs the tests in the background makes them and their children ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("2 of 3"):
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    page = (tmp_path / "summary.md").read_text()
    for told in ("## 0: done", "## 1: interrupted", "## 2: not begun"):
        assert told in page


# --- the log ---


def test_a_log_keeps_the_beginning_and_the_end_of_each_section(tmp_path: pathlib.Path) -> None:
    lines = [f"line {i} of many" for i in range(200_000)]
    with BoundedLog(tmp_path / "log.txt", 2**20) as log:
        log.begin_section(2)
        for line in lines:
            log.write(line + "\n")
            assert log._file.tell() < 2**20
        log.begin_section(1)
        log.write("another section\n")
    text = (tmp_path / "log.txt").read_text()
    assert len(text) < 2**20
    assert text.startswith(f"{lines[0]}\n{lines[1]}\n")
    assert text.endswith(f"{lines[-2]}\n{lines[-1]}\nanother section\n")
    assert text.count("bytes were cut out here") == 1
    cut = int(text.split("\n[... ")[1].split(" bytes")[0].replace(",", ""))
    said = len("\n".join(lines)) + 1 + len("another section\n")
    note = text[text.index("\n[... ") : text.index(" ...]\n") + len(" ...]\n")]
    assert len(text) - len(note) + cut == said


@pytest.mark.slow
def test_a_part_that_says_too_much_does_not_fill_the_disk(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, go: Callable[..., int]
) -> None:
    monkeypatch.setattr(session, "LOG_BYTES", 2**20)
    much = "for i in range(200000): print('line', i)\nimport sys; print('an error', file=sys.stderr)"
    assert go(part("much", much), part("much more", much), part("last", "print('the last')")) == 0
    log = (tmp_path / "out" / "log.txt").read_text()
    assert len(log) < 2**20
    assert log.count("bytes were cut out here") == 2
    assert log.count("\nline 199999\n") == log.count("\nline 0\n") == log.count("an error\n") == 2
    assert "\nthe last\n" in log


# --- what the parts' processes find ---


@pytest.mark.slow
def test_the_parts_find_the_package_without_an_install(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    # -S hides an editable install of the checkout; all other packages are on PYTHONPATH.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(site.getsitepackages()))
    environment = session._environment(tmp_path, dry_run=False)
    (smoke,) = [one for one in parts.PARTS if one.name == "smoke"]
    python, *rest = smoke.command(parts.Setting(tmp_path, 1, False))
    run = subprocess.run(
        [python, "-S", *rest, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    code = "import fusedmlp, fusedmlp.functional; print(fusedmlp.__file__)"
    run = subprocess.run(
        [python, "-S", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert pathlib.Path(run.stdout.strip()) == ROOT / "fusedmlp" / "__init__.py"


def test_what_is_compiled_outlives_the_command(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, go: Callable[..., int]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    cache = session._cache(dry_run=False)
    assert cache == tmp_path / "caches" / "fusedmlp" / "gpu-session"
    assert cache.stat().st_mode & 0o077 == 0
    assert session._cache(dry_run=True).parent == cache
    environment = session._environment(cache, dry_run=False)
    assert "TRITON_INTERPRET" not in environment.keys() - os.environ.keys()
    folders = [
        environment[name] for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    ]
    assert all(pathlib.Path(folder).is_relative_to(cache) for folder in folders)
    assert len(set(folders)) == 3
    compiled = "import os, pathlib; p = pathlib.Path(os.environ['TRITON_CACHE_DIR']); "
    assert go(part("one", compiled + "p.mkdir(parents=True); (p / 'kernel').touch()")) == 0
    assert go(part("two", compiled + "assert (p / 'kernel').exists()")) == 0


def test_tests_run_on_all_cores() -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    for name in ("gpu", "kernels"):
        (one,) = [one for one in parts.PARTS if one.name == name]
        said = one.command(parts.Setting(pathlib.Path("out"), 1, False))
        assert said[said.index("-n") + 1] == str(len(os.sched_getaffinity(0)))


# --- going on from an earlier command ---


def found(**changes: Any) -> dict[str, Any]:
    return results.about(torch.device("cpu"), True) | changes


@needs_triton
def test_resume_takes_what_there_is_to_go_on_from(tmp_path: pathlib.Path) -> None:
    from fusedmlp.kernels import tuning_table

    here = tuning_table.where(None)
    earlier, out, cache = (tmp_path / name for name in ("earlier", "out", "cache"))
    for folder in (earlier, out, cache):
        folder.mkdir()
    shipped = tuning_table.shipped_file(here).name
    (earlier / shipped).write_text(tuning_table.to_text(here, {"date": "2026-01-01"}, tuning_table.Table()))
    (earlier / "steps.json").write_text("[1]")
    (earlier / "mnist-race.json").write_text("[2]")
    (earlier / "log.txt").write_text("not this")
    (out / "mnist-race.json").write_text("[3]")
    results.write(found(), earlier / "results.json")
    for file in earlier.iterdir():
        file.chmod(0o444)
    earlier.chmod(0o555)
    said = session._take_up(earlier, out, cache, dry_run=True)
    assert said == [f"taken from {earlier}: {name}" for name in ("results.json", "steps.json", shipped)]
    assert sorted(p.name for p in out.iterdir()) == ["mnist-race.json", "results.json", "steps.json", shipped]
    assert (out / "mnist-race.json").read_text() == "[3]"  # existing files are not replaced
    table = cache / "fusedmlp" / tuning_table.users_file(here).name
    assert tuning_table.read(table, here, exact=True) is not None
    assert os.access(out / "steps.json", os.W_OK)
    # Again, into the same folder and from it: nothing is left to do. Without --resume the table is removed.
    assert session._take_up(out, out, cache, dry_run=True) == []
    assert session._take_up(None, out, cache, dry_run=True) == []
    assert not table.exists()


@needs_triton
def test_results_of_another_commit_are_not_taken(tmp_path: pathlib.Path) -> None:
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    earlier.mkdir()
    results.write(found(commit="another"), earlier / "results.json")
    (said,) = session._take_up(earlier, out, tmp_path, dry_run=True)
    assert said.startswith("not taken: ")
    assert said.endswith("results.json has results of another commit: another")
    run = benchmarks("gpu-session", "--dry-run", "--parts", "quick", "--out", earlier)
    assert run.returncode == 2
    assert run.stderr.endswith("of another commit: another. Choose another --out, or move the file away\n")
    assert [path.name for path in earlier.iterdir()] == ["results.json"]


# --- the command ---


def test_refusals_of_a_session(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "new"
    run = benchmarks("gpu-session", "--out", out)
    assert run.returncode == 2
    if not HAS_TRITON:
        assert "Triton is not installed" in run.stderr
        return
    assert run.stderr == "there is no CUDA device; --dry-run runs the parts on the CPU\n"
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        (
            ["--parts", "smoke,nothing"],
            "there is no part nothing; there are smoke, gpu, steps, mnist, kernels,",
        ),
        (["--parts", ""], "no part is named; there are smoke, gpu,"),
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--resume", str(tmp_path / "missing")], f"there is no folder {tmp_path / 'missing'}"),
        (["--resume", str(empty)], f"{empty} has none of results.json, steps.json, mnist-ladder.json,"),
    ):
        run = benchmarks("gpu-session", "--dry-run", "--out", out, *arguments)
        assert run.returncode == 2
        assert message in run.stderr
    assert not out.exists()


def test_list_names_every_part() -> None:
    run = benchmarks("gpu-session", "--list")
    assert run.returncode == 0
    rows = [line.split(maxsplit=2) for line in run.stdout.split("\n\n")[0].splitlines()[1:]]
    assert [row[0] for row in rows] == [one.name for one in parts.PARTS]
    assert all(float(row[1]) > 0 for row in rows)
    assert "estimates" in run.stdout
    assert {*parts.FIRST, *parts.SECOND, *parts.THIRD} == set(parts.NAMES)
    for names in (parts.FIRST, parts.SECOND, parts.THIRD):  # in 9 minutes, less the time for stopping
        expected = sum(one.seconds for one in parts.PARTS if one.name in names)
        assert expected <= 9 * 60 - session.GRACE - session.FINISH


def session_of(tmp_path: pathlib.Path, *arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    """The command on the CPU, with a cache in tmp_path."""
    environment = {"CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "benchmarks", "gpu-session", "--dry-run", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ | environment)


@needs_triton
def test_a_session_of_one_part(tmp_path: pathlib.Path) -> None:
    run = session_of(tmp_path, "--out", tmp_path / "out", "--parts", "kernels")
    page = (tmp_path / "out" / "summary.md").read_text()
    assert run.returncode == 0, page + (tmp_path / "out" / "log.txt").read_text()
    assert run.stdout.endswith(page)
    assert "\n## kernels: done" in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "summary.md"]


@pytest.mark.slow
@needs_triton
def test_three_commands_one_after_the_other(tmp_path: pathlib.Path) -> None:
    """As on a machine whose folder is emptied before each command and only returns its files."""
    files: list[str] = []
    resume: list[str | pathlib.Path] = []
    fresh = {
        parts.FIRST: ["steps.json", "mnist-ladder.json", "mnist-race.json"],
        parts.SECOND: [],
        parts.THIRD: ["results.json", "profiles.txt"],
    }
    for number, (names, more) in enumerate(fresh.items(), 1):
        out = tmp_path / f"out {number}"
        options = ["--parts", ",".join(names)] if number > 1 else []
        run = session_of(tmp_path, "--minutes", "20", "--out", out, *options, *resume)
        page = (out / "summary.md").read_text()
        assert run.returncode == 0, page + (out / "log.txt").read_text()
        assert run.stdout.endswith(page)
        chosen = [one.name for one in parts.PARTS if one.name in names]
        headings = [line.removeprefix("## ").split(",")[0] for line in page.splitlines() if line[:3] == "## "]
        assert headings == [f"{name}: {'left out' if name == 'sanitize' else 'done'}" for name in chosen]
        files += more
        found = sorted(path.name for path in out.iterdir())
        tables = [name for name in found if name.startswith("tuned_") and name.endswith(".json")]
        assert len(tables) == (number == 3)
        assert found == sorted([*files, "summary.md", "log.txt", *tables])
        assert all(path.is_file() and path.stat().st_size < MOST_BYTES for path in out.iterdir())
        resume = ["--resume", out]
    assert len(found) <= 8
    assert f"`python -m benchmarks report {out / 'results.json'} --out report`" in page.splitlines()[-1]
    # Once more with the same files: nothing is measured twice.
    before = {name: json.loads((out / name).read_text()) for name in ("steps.json", "results.json")}
    run = session_of(tmp_path, "--minutes", "20", "--out", out, "--parts", "steps,quick", *resume)
    assert run.returncode == 0
    assert {name: json.loads((out / name).read_text()) for name in before} == before
    assert len(list(out.iterdir())) <= 8
