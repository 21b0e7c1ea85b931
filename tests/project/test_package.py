"""Installing and importing the package, its wheel, and which rooms may import which."""

import ast
import graphlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from available import HAS_TRITON

import fusedmlp

ROOT = pathlib.Path(__file__).parents[2]


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
        "from fusedmlp.dispatch import predicate\n"
        "assert not predicate.has_triton()\n"
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


@pytest.mark.slow
def test_transformers_works_in_the_checkout() -> None:
    """transformers looks for a package named kernels, and imports the one it finds to read its version."""
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
    """Tested without the import finder of an editable install."""
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


def test_only_the_package_itself_is_below_fusedmlp() -> None:
    """A checkout has neither ``fusedmlp.tests`` nor ``fusedmlp.fusedmlp``; tools can walk its modules."""
    code = (
        "import importlib.util, pkgutil, fusedmlp\n"
        "for name in ('tests', 'fusedmlp', 'benchmarks', 'examples'):\n"
        "    assert importlib.util.find_spec(f'fusedmlp.{name}') is None, name\n"
        "print(*(module.name for module in pkgutil.walk_packages(fusedmlp.__path__, 'fusedmlp.')))"
    )
    run = python(code, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    modules = [path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in modules} - {"fusedmlp"}
    assert set(run.stdout.split()) == names - {"fusedmlp.nn._same_modules"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy, because building leaves a folder build/ behind and other tests may build too.
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
    for source in [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "fusedmlp").rglob("*.py")]:
        name = source.relative_to(ROOT).as_posix()
        assert (name if name.startswith("fusedmlp/") else f"fusedmlp/{name}") in names
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


PACKAGE = ROOT / "fusedmlp"


def may_import() -> dict[str, set[str]]:
    """For each room the rooms that it may import from, as the table in docs/architecture.md says."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", page, re.MULTILINE)
    rooms = {room: set(re.findall(r"`(\w+)`", allowed)) for room, allowed in rows}
    everything = {*rooms, "fusedmlp", "_checkout"}
    return rooms | {"__main__": everything, "__init__": everything, "_checkout": set(), "_version": set()}


def imported(path: pathlib.Path) -> set[str]:
    """The modules of this package that a file imports anywhere: ``nn``, ``dispatch.predicate``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fusedmlp":
            package = (node.module or "").split(".")[1:]
            for alias in node.names:
                name = [*package, alias.name]
                path = PACKAGE.joinpath(*name)
                is_module = path.is_dir() or path.with_suffix(".py").exists()
                found.add(".".join(name if is_module else package))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == "fusedmlp":
                    found.add(rest or first)
    return found


def test_imports_point_one_way() -> None:
    """Imports between rooms are those of the table, a room has no circles, and kernels import no room."""
    graph: dict[str, set[str]] = {}
    allowed = may_import()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        rooms = {name.split(".")[0] for name in imported(path)}
        assert rooms <= allowed[parts[0]] | {parts[0], "_version"}, path
        if len(parts) == 2 and parts[1] != "__init__":
            inside = {name for name in imported(path) if name.startswith(f"{parts[0]}.")}
            graph[".".join(parts)] = inside
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not imported(path), path


def test_the_map_names_what_exists() -> None:
    """Every file in docs/architecture.md exists, and holds the functions that the page says are in it."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

    def found(name: str) -> pathlib.Path | None:
        return next((f / name for f in (ROOT, PACKAGE) if (f / name).exists()), None)

    for name in re.findall(r"`((?:[\w.]+/)+(?:\w+\.\w+)?)`", page):
        assert found(name), name
    holds = re.findall(r"((?:`[\w.]+`(?:,| and|)\s+)+)in\s+`((?:\w+/)+\w+\.py)`", page)
    assert len(holds) > 5
    for names, file in holds:
        source = found(file)
        assert source is not None, file
        for name in re.findall(r"`([\w.]+)`", names):
            own = name.split(".")[-1]
            assert re.search(rf"\b(def|class) {own}\b|^{own}\b", source.read_text(), re.MULTILINE), (
                name,
                file,
            )


def test_rooms_say_what_they_are_for() -> None:
    for path in [*PACKAGE.rglob("__init__.py"), *(ROOT / "kernels").rglob("__init__.py")]:
        assert ast.get_docstring(ast.parse(path.read_text())), path


# --- The tests themselves, on a machine that lacks something ---


def suite(tmp_path: pathlib.Path, plugin: str, *arguments: str) -> str:
    """The output of pytest on these tests with a plugin that changes what the machine has."""
    (tmp_path / "this_machine.py").write_text(plugin)
    others = ("TRITON_INTERPRET", "PYTEST_ADDOPTS")  # settings of this run
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


@pytest.mark.slow
def test_without_expecttest_pytorchs_own_tests_are_skipped(tmp_path: pathlib.Path) -> None:
    said = suite(
        tmp_path,
        "import sys; sys.modules['expecttest'] = None",
        "tests/pytorch/test_torchs_own_modules.py",
        "-k",
        "LinearReLU",
    )
    assert "expecttest is not installed" in said
    assert " passed" not in said


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: there is no interpreter to set")
def test_nothing_sets_the_interpreter_beside_a_gpu(tmp_path: pathlib.Path) -> None:
    """Triton 3.6's interpreter does not work with every NumPy, and users of a GPU do not run it."""
    plugin = (
        "import os, torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "def pytest_sessionfinish():\n"
        "    assert 'TRITON_INTERPRET' not in os.environ\n"
    )
    said = suite(tmp_path, plugin, "tests/pytorch/test_distributed.py", "-k", "kernels and ddp")
    assert "two processes on the CPU would need Triton's interpreter, and here is a GPU" in said
    assert " passed" not in said
