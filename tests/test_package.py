"""The package as one installs and imports it."""

import ast
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import HAS_TRITON

import fusedmlp

ROOT = pathlib.Path(__file__).parents[1]


def python(code: str, cwd: pathlib.Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env or None, capture_output=True, text=True
    )


def test_import_touches_no_driver_and_brings_no_triton() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fusedmlp\n"
        "new = set(sys.modules) - before\n"
        "assert not any(name.split('.')[0] == 'triton' for name in new), new\n"
        "assert not any(name.startswith('fusedmlp.kernels') for name in new), new\n"
        "assert not torch.cuda.is_initialized()\n"
        "fusedmlp.MLP(4, [3], 2)(torch.randn(5, 4)).sum().backward()\n"
        "assert not any(name.startswith('fusedmlp.kernels') for name in sys.modules)"
    )
    run = python(code)
    assert run.returncode == 0, run.stderr


def test_works_where_triton_cannot_be_imported() -> None:
    code = (
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name.startswith('triton') else find(name, *a)\n"
        "import torch, fusedmlp\n"
        "from fusedmlp import _dispatch\n"
        "assert not _dispatch.has_triton()\n"
        "print(fusedmlp.MLP(4, [3], 2)(torch.randn(5, 4)).shape)"
    )
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert "torch.Size([5, 2])" in run.stdout


def test_the_folder_kernels_found_by_that_name_is_empty_and_says_what_it_is() -> None:
    code = (
        "import kernels\n"
        "assert kernels.__version__ == '0.0.0'\n"
        "assert not hasattr(kernels, 'get_kernel') and getattr(kernels, 'step', None) is None\n"
        "for statement in 'from kernels import get_kernel', 'import kernels.step', 'kernels.get_kernel':\n"
        "    try:\n"
        "        exec(statement)\n"
        "    except (ImportError, AttributeError) as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    run = python(code)
    assert run.returncode == 0, run.stderr
    name, submodule, attribute = run.stdout.splitlines()
    assert name.startswith("ImportError cannot import name 'get_kernel' from 'kernels'")
    assert submodule == "ModuleNotFoundError No module named 'kernels.step'; 'kernels' is not a package"
    assert attribute.startswith(
        "AttributeError module 'kernels' has no attribute 'get_kernel': it is the source"
    )
    assert "use 'from fusedmlp import kernels'" in attribute


def test_transformers_works_in_the_checkout() -> None:
    """It looks for a distribution named kernels, and imports what it finds for its version."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    code = (
        "import sys, torch\n"
        "from transformers import BertConfig, BertModel\n"
        "from transformers.utils import is_kernels_available\n"
        "assert not is_kernels_available()\n"
        "config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)\n"
        "print(BertModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape)\n"
        "print(sys.modules['kernels'].__file__)"
    )
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["torch.Size([1, 3, 8])", str(ROOT / "kernels" / "__init__.py")]


def test_a_checkout_that_is_not_installed_finds_its_kernels() -> None:
    """Without the finder that an editable install puts in the way."""
    code = (
        "import sys, importlib.util\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        "import fusedmlp\n"
        "print(fusedmlp.__file__, importlib.util.find_spec('fusedmlp.kernels').origin)"
    )
    run = python(code, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    package, kernels = map(pathlib.Path, run.stdout.split())
    assert package == ROOT / "fusedmlp" / "__init__.py"
    assert kernels == ROOT / "kernels" / "__init__.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: building leaves a folder build/ behind, and other tests may be building too.
    source = folder / "source"
    for name in ("fusedmlp", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, source], cwd=folder, check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_kernels_and_nothing_else(wheel: pathlib.Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fusedmlp", f"fusedmlp-{fusedmlp.__version__}.dist-info"}
    for source in (ROOT / "kernels").glob("*.py"):
        assert f"fusedmlp/kernels/{source.name}" in names
    assert "fusedmlp/py.typed" in names
    for stub in (ROOT / "fusedmlp").rglob("*.pyi"):
        assert stub.relative_to(ROOT).as_posix() in names
    assert "fusedmlp/nn/utils/rnn.pyi" in names
    assert not any("mnist" in name or name.endswith(".xz") for name in names)


def test_installed_wheel_works_from_another_folder(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(command, check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import importlib.util, torch, fusedmlp\n"
        "print(fusedmlp.__file__, importlib.util.find_spec('fusedmlp.kernels').origin)\n"
        "assert importlib.util.find_spec('kernels') is None\n"
        "import fusedmlp.nn.functional\n"
        "assert fusedmlp.nn.functional is torch.nn.functional\n"
        "fusedmlp.MLP(4, [3], 2)(torch.randn(5, 4))"
    )
    run = python(code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert all(pathlib.Path(name).is_relative_to(site) for name in run.stdout.split())


def test_public_names_and_version() -> None:
    for name in fusedmlp.__all__:
        assert hasattr(fusedmlp, name), name
    assert fusedmlp.nn.Linear is fusedmlp.Linear
    assert fusedmlp.__version__ == importlib.metadata.version("fusedmlp")


# Each room imports only rooms below it, as in
# convert -> nn -> functional -> _autograd -> _dispatch -> {_reference, kernels}
BELOW: dict[str, set[str]] = {
    "__init__": {
        *("_backend", "_explain", "_tune", "_verify", "_version", "convert", "functional", "nn", "train"),
    },
    "__main__": {"_dispatch", "_measure", "_report", "_tune", "functional", "fusedmlp", "nn"},
    "_report": set(),
    "train": {"_arguments", "_backend", "_capture", "_direct", "_recipe", "_two_launches", "_warn"},
    "_arguments": set(),
    "_patched": set(),
    "_labels": {"_dispatch"},
    "_two_launches": {"_backend", "_cuda_graph", "_dispatch", "_labels", "_recipe", "_warn"},
    "_capture": {"_backend", "_cuda_graph", "_patched", "_recipe", "_warn"},
    "_cuda_graph": {"_warn"},
    "_direct": {"_onednn", "_recipe"},
    "_recipe": {"_backend", "_patched", "nn"},
    "_tuned": set(),
    "_tune": {"_backend", "_dispatch", "_tuned", "_tuning", "functional"},
    "_tuning": {
        "_backend",
        "_cuda_graph",
        "_dispatch",
        "_measure",
        "_reference",
        "_tuned",
        "_version",
        "functional",
        "_warn",
    },
    "_verify": {"_dispatch", "_explain", "_measure", "_runs", "_verification"},
    "_verification": {"_dispatch", "_explain"},
    "_runs": {"_backend", "_deferred", "_measure", "_restore", "_twin", "nn"},
    "_explain": {"_backend", "_deferred", "_dispatch", "_restore", "_traffic", "nn"},
    "_traffic": {"_backend", "_dispatch", "_onednn"},
    "convert": {"_deferred", "_pairs", "nn"},
    "_pairs": {"_deferred", "_twin"},
    "_deferred": {"_backend", "_dispatch", "_patched", "functional", "nn"},
    "nn": {"_dispatch", "_patched", "functional", "_same_modules"},
    "functional": {"_autograd", "_backend", "_dispatch", "_onednn", "_patched", "_reference"},
    "_onednn": {"_backend", "_patched", "_reference"},
    "_autograd": {"_backend", "_dispatch", "_ops", "_reference"},
    "_ops": {"_dispatch", "_reference"},
    "_dispatch": {"_backend", "_patched", "_reference", "_warn"},
    "_warn": set(),
    "_backend": set(),
    "_reference": {"_patched"},
    "_restore": set(),
    "_same_modules": set(),
    "_twin": set(),
    "_measure": set(),
    "_version": set(),
}


def imported(path: pathlib.Path) -> set[str]:
    """The rooms of this package that a module imports, anywhere in it, by its absolute name."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fusedmlp":
            inner = (node.module or "").split(".")[1:]
            rooms |= set(inner) if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {alias.name for alias in node.names if alias.name.split(".")[0] == "fusedmlp"}
    return rooms


def test_imports_point_one_way() -> None:
    for path in (ROOT / "fusedmlp").glob("**/*.py"):
        room = path.relative_to(ROOT / "fusedmlp").parent / path.stem
        name = room.parent.name if room.stem == "__init__" and room.parent.name else room.stem
        assert imported(path) <= BELOW[name], path.name
    for path in (ROOT / "kernels").glob("*.py"):
        assert not imported(path), path.name


# --- The tests themselves, on a machine that lacks something ---


def suite(tmp_path: pathlib.Path, plugin: str, *arguments: str) -> str:
    """What pytest prints of these tests, with a plugin that makes this machine another one."""
    (tmp_path / "this_machine.py").write_text(plugin)
    others = ("TRITON_INTERPRET", "PYTEST_ADDOPTS")  # this run's own
    environment = {name: value for name, value in os.environ.items() if name not in others}
    environment["PYTHONPATH"] = str(tmp_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "this_machine",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_without_expecttest_pytorchs_own_tests_are_skipped(tmp_path: pathlib.Path) -> None:
    said = suite(
        tmp_path,
        "import sys; sys.modules['expecttest'] = None",
        "tests/test_torchs_own_modules.py",
        "-k",
        "LinearReLU",
    )
    assert "expecttest is not installed" in said
    assert " passed" not in said


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: there is no interpreter to set")
def test_nothing_sets_the_interpreter_beside_a_gpu(tmp_path: pathlib.Path) -> None:
    """Triton 3.6's does not work with every NumPy, and what runs in it there is not what a user runs."""
    plugin = (
        "import os, torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "def pytest_sessionfinish():\n"
        "    assert 'TRITON_INTERPRET' not in os.environ\n"
    )
    said = suite(tmp_path, plugin, "tests/test_distributed.py", "-k", "kernels and ddp")
    assert "two processes on the CPU would need Triton's interpreter, and here is a GPU" in said
    assert " passed" not in said
