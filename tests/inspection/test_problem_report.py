"""``python -m fusedmlp`` checks a training step, and ``--report`` writes a file for reporting a problem."""

import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

import fusedmlp
from fusedmlp import __main__
from fusedmlp.dispatch import predicate
from fusedmlp.inspection import problem_report

SMALL = ("--mlp", "20,10,3", "--batch", "5")


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Run ``python -m fusedmlp`` in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["fusedmlp", *SMALL, *arguments])
    try:
        return __main__.main()
    except SystemExit as end:
        return end.code


def test_a_report_has_what_a_maintainer_asks_for(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "problem.txt"
    run = subprocess.run(
        [sys.executable, "-m", "fusedmlp", *SMALL, "--report", str(file)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    text = file.read_text()
    said = run.stdout[: run.stdout.index("\nAll of this")]
    assert set(said.splitlines()) <= set(text.splitlines())
    assert f"python -m fusedmlp {' '.join(SMALL)} --report {file}" in text
    for wanted in (f"torch {torch.__version__.split('+')[0]}", "Python 3", "CUDA", "Linux", "exit status 0"):
        assert wanted in text
    assert ("nvidia-smi does not run" in text) or ("driver_version" in text)
    assert "Does TrainStep train it accurately?\n\nright: the losses of 6 steps" in said
    if predicate.has_triton() and not torch.cuda.is_available():
        assert "TRITON_INTERPRET=1" in text  # conftest has set it
    assert run.stdout.endswith(f"is in {file}.\nRead it before you send it: it names folders of yours.\n")


BROKEN = """
import sys, warnings
import fusedmlp
from fusedmlp import __main__

def broken(*arguments):
    warnings.warn("a kernel is slow today", stacklevel=1)
    raise RuntimeError("the kernel is broken")

fusedmlp.verify = broken
sys.exit(__main__.main())
"""


def test_a_failure_is_in_the_report(tmp_path: pathlib.Path) -> None:
    """The report has the traceback, the warnings and everything printed before the failure."""
    file = tmp_path / "problem.txt"
    command = [sys.executable, "-c", BROKEN, *SMALL]
    run = subprocess.run([*command, "--report", str(file)], capture_output=True, text=True)
    assert run.returncode == 1
    for text in (file.read_text(), run.stdout + run.stderr):
        assert "RuntimeError: the kernel is broken" in text
        assert "in broken" in text
        assert "a kernel is slow today" in text
        assert "2 layers in 1 chain" in text
    assert file.read_text().endswith("exit status 1\n")
    run = subprocess.run(command, capture_output=True, text=True)  # without --report, the error is raised
    assert run.stderr.endswith("RuntimeError: the kernel is broken\n")


def test_a_wrong_training_step_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = fusedmlp.TrainStep.__call__
    monkeypatch.setattr(fusedmlp.TrainStep, "__call__", lambda step, x, y: call(step, x, y) * 1.001)
    assert command(monkeypatch) == 1
    assert "WRONG, maximum error" in capsys.readouterr().out


def test_a_file_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--report", str(tmp_path / "no folder" / "problem.txt")) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
    assert command(monkeypatch, "--report", str(tmp_path)) == 2
    assert "cannot be written: Is a directory" in capsys.readouterr().err


def test_only_variables_that_matter_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("TRITON_CACHE_DIR", "somewhere")
    text = problem_report.machine()
    assert "secret" not in text
    assert "CUDA_VISIBLE_DEVICES=3\n" in text
    assert "TRITON_CACHE_DIR=somewhere" in text
