"""``python -m fusedmlp`` prints the versions in use and verifies a chain."""

import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

import fusedmlp
from fusedmlp import nn
from fusedmlp.dispatch import predicate

ROOT = pathlib.Path(__file__).parents[2]


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, str]:
    """Run ``python -m fusedmlp`` in this process, and return its exit status and output."""
    from fusedmlp import __main__

    monkeypatch.setattr(sys, "argv", ["fusedmlp", *arguments])
    status: Any
    try:
        status = __main__.main()
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_the_command_prints_versions_and_verifies() -> None:
    arguments = ["--mlp", "20,10,3", "--batch", "5", "--dtype", "fp16"]
    run = subprocess.run(
        [sys.executable, "-m", "fusedmlp", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"fusedmlp {fusedmlp.__version__}, torch {torch.__version__}")
    assert "5 rows, 20 -> 10 -> 3, ReLU between, float16 on" in run.stdout
    assert "\n  why " in run.stdout
    where = "PyTorch's operators, as the kernels cannot run here"
    where = "the Triton kernels" if predicate.has_triton() else where
    assert f"Are its results accurate on {where}?\n\nright: 2 layers in 1 chain on" in run.stdout
    assert "double backward" in run.stdout
    assert max(map(len, run.stdout.splitlines()[2:])) <= 80


def test_forms_of_the_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    forms = (["--mlp", "5", "3", "--dtype", "float32"], ["--mlp", "5,", "3"], ["--mlp", "5 ,3"])
    for arguments in forms:
        status, printed = command(monkeypatch, capsys, *arguments, "--batch", "2")
        assert status == 0
        assert "2 rows, 5 -> 3, no ReLU, float32 on" in printed
    for arguments, message in (
        (["--mlp", "7"], "--mlp takes two widths or more"),
        (["--mlp", "7,0"], "every width and the batch are at least 1"),
        (["--mlp", "7,a"], "--mlp takes whole numbers, got 7,a"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "toaster"], "--device toaster cannot be used"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["--help"], "python -m fusedmlp --mlp 784,256,128,10 --batch 512 --dtype bf16"),
    ):
        status, printed = command(monkeypatch, capsys, *arguments)
        assert status == (0 if arguments == ["--help"] else 2)
        assert message in " ".join(printed.split())


def test_the_command_fails_where_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, x: x[:, :3] * float("nan"))
    status, printed = command(monkeypatch, capsys, "--mlp", "5,4,3", "--batch", "2")
    assert status == 1
    assert "NaN in other places than PyTorch's" in printed
