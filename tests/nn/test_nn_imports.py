"""Every import from torch.nn works from fusedmlp.nn too, and gives the same modules."""

import importlib
import importlib.util
import inspect
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nn_stubs
import pytest
import torch

import fusedmlp.nn

ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


# --- The same objects ---

# "it" is the imported object.
STATEMENTS = [
    "import {nn}.functional as it",
    "import {nn}.init; it = {nn}.init",
    "import {nn}.utils.rnn; it = {nn}.utils.rnn.pad_sequence",
    "import {nn}.utils.weight_norm as it",
    "import {nn}.attention.flex_attention as it",
    "import importlib; it = importlib.import_module('{nn}.modules.module')",
    "from {nn} import attention as it",
    "from {nn} import functional as it",
    "from {nn}.utils import clip_grad_norm_ as it",
    "from {nn}.utils import prune as it",
    "from {nn}.modules.linear import Linear as it",
    "from {nn}.modules.module import _IncompatibleKeys as it",
    "from {nn}.quantized.dynamic.modules.linear import Linear as it",
    "from {nn}.modules.linear import *; it = Bilinear",
]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_an_import_gives_what_torchs_gives(statement: str) -> None:
    ours: dict[str, Any] = {}
    exec(statement.format(nn="fusedmlp.nn"), ours)
    torchs: dict[str, Any] = {}
    exec(statement.format(nn="torch.nn"), torchs)
    assert ours["it"] is torchs["it"]


# This runs in its own process, because it loads every module of torch.nn.
IMPORT_ALL = """
import importlib, sys
import torch
before = set(sys.modules)
in_package = {}  # a package may hold a function named as a module in it
for name in sys.argv[1:]:
    parent, _, child = name.rpartition(".")
    if name in before:
        in_package[name] = getattr(sys.modules[parent], child)
assert not isinstance(in_package["torch.nn.utils.weight_norm"], type(sys))

import fusedmlp
assert not [name for name in set(sys.modules) - before if name.startswith("torch.nn.")]
assert all(name.replace("torch", "fusedmlp") in sys.modules for name in in_package)

for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name.replace("torch", "fusedmlp"))
    except Exception as error:
        print(name, error)
        continue
    assert module is sys.modules[name], name
    assert module is importlib.import_module(name), name
    spec = module.__spec__
    assert name == spec.name == module.__name__ and spec.parent == module.__package__
    assert spec.origin == module.__file__ and spec.cached == module.__cached__
    assert spec.loader is module.__loader__ and spec.loader.name == name
    assert spec.submodule_search_locations is getattr(module, "__path__", None), name
    parent, _, child = name.rpartition(".")
    assert getattr(sys.modules[parent], child) is in_package.get(name, module), name
"""


def test_every_module_is_torchs_and_nothing_in_it_has_changed() -> None:
    names = list(nn_stubs.modules())
    assert len(names) > 100
    assert python(IMPORT_ALL, *names) == ""


# --- Other uses of modules ---


def test_source_and_pickles_know_torchs_name_only() -> None:
    functional = importlib.import_module("fusedmlp.nn.functional")
    linear = importlib.import_module("fusedmlp.nn.quantized.modules.linear")
    for module in (functional, linear):
        assert inspect.getmodule(module) is module
        assert inspect.getsource(module) == Path(str(module.__file__)).read_text()
    assert inspect.getmodule(functional.relu) is torch.nn.functional
    assert "def relu" in inspect.getsource(functional.relu)
    for thing in (functional.relu, functional.conv1d, torch.nn.modules.linear.Linear, linear.Linear):
        assert b"fusedmlp" not in pickle.dumps(thing)
        assert pickle.loads(pickle.dumps(thing)) is thing


def test_reload() -> None:
    python(
        "import importlib, sys, torch, fusedmlp\n"
        "import fusedmlp.nn.init as init, fusedmlp.nn.utils.prune as prune\n"
        "finders = len(sys.meta_path)\n"
        "importlib.reload(fusedmlp.nn)\n"
        "assert len(sys.meta_path) == finders\n"
        "for module, name in (init, 'normal_'), (prune, 'identity'):\n"
        "    before = getattr(module, name)\n"
        "    assert importlib.reload(module) is module\n"
        "    assert getattr(module, name) is not before\n"
        "assert importlib.import_module('fusedmlp.nn.init') is torch.nn.init is init\n"
        "assert importlib.import_module('fusedmlp.nn.utils.prune') is torch.nn.utils.prune is prune\n"
    )


def test_a_compiled_function_may_import() -> None:
    def user(x: torch.Tensor) -> torch.Tensor:
        import fusedmlp.nn.functional as F
        from fusedmlp.nn.utils.parametrizations import weight_norm

        return F.relu(x) if weight_norm else x

    compiled = torch.compile(user, backend="eager", fullgraph=True)
    assert compiled(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]


# --- Modules that are missing or not loaded yet ---


@pytest.mark.parametrize(
    "name", ["nonsense", "utils.nonsense", "functional.relu", "Linear", "nonsense.deeper"]
)
def test_a_missing_module_is_reported_by_our_name(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=re.escape("fusedmlp.nn.")) as raised:
        importlib.import_module(f"fusedmlp.nn.{name}")
    with pytest.raises(ModuleNotFoundError) as torchs:
        importlib.import_module(f"torch.nn.{name}")
    assert str(raised.value) == str(torchs.value).replace("torch.nn", "fusedmlp.nn")


def test_a_folder_of_stubs_alone_is_no_package() -> None:
    """fusedmlp.nn has an empty __path__, so stubs without a module of torch cannot be imported."""
    assert importlib.util.find_spec("fusedmlp.nn.nonsense") is None
    assert list(fusedmlp.nn.__path__) == []


def test_find_spec() -> None:
    for name in ("functional", "utils", "cpp", "quantized.modules"):
        spec = importlib.util.find_spec(f"fusedmlp.nn.{name}")
        torchs = importlib.util.find_spec(f"torch.nn.{name}")
        assert spec is not None
        assert torchs is not None
        assert spec.origin == torchs.origin
        assert spec.submodule_search_locations == torchs.submodule_search_locations


@pytest.fixture
def torchs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules belong to torch.nn during the test."""
    monkeypatch.setattr(torch.nn, "__path__", [*torch.nn.__path__, str(tmp_path)])
    before = {module: set(vars(module)) for module in (torch.nn, fusedmlp.nn)}
    loaded = set(sys.modules)
    yield tmp_path
    for module, names in before.items():
        for name in set(vars(module)) - names:
            delattr(module, name)
    for name in set(sys.modules) - loaded:
        if ".nn." in name:
            del sys.modules[name]


def test_an_import_that_fails_inside_torchs_module_says_so(torchs_folder: Path) -> None:
    (torchs_folder / "broken.py").write_text("import a_library_that_is_missing\n")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="a_library_that_is_missing"):
            importlib.import_module("fusedmlp.nn.broken")
    assert not [name for name in sys.modules if name.endswith("nn.broken")]


def test_a_module_is_loaded_once_when_threads_import_it(torchs_folder: Path) -> None:
    """Threads import it by both names at once: it is loaded once, and no thread gets it half loaded."""
    (torchs_folder / "other.py").write_text("")
    (torchs_folder / "slow.py").write_text(
        "import time, torch\nloads = getattr(torch.nn, 'loads', 0) + 1\n"
        "torch.nn.loads = loads\nimport fusedmlp.nn.other\ntime.sleep(0.3)\nlast = True\n"
    )
    got: list[ModuleType] = []

    def user(prefix: str) -> None:
        names: dict[str, Any] = {}
        exec(f"from {prefix}.slow import last\nimport {prefix}.slow as it", names)
        got.append(names["it"])

    threads = [threading.Thread(target=user, args=(p,)) for p in ("torch.nn", "fusedmlp.nn") * 4]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert len(got) == len(threads)
    assert {id(module) for module in got} == {id(got[0])}
    assert got[0].loads == 1
    assert got[0].__spec__ is not None
    assert got[0].__spec__.name == "torch.nn.slow"


def test_a_function_named_as_its_module_stays(torchs_folder: Path) -> None:
    """This holds in packages that torch has loaded already, and in others."""
    for package in ("early", "late"):
        (torchs_folder / package).mkdir()
        (torchs_folder / package / "__init__.py").write_text("from .work import work\n")
        (torchs_folder / package / "work.py").write_text("def work(): pass\n")
    importlib.import_module("torch.nn.early")
    for package in ("early", "late"):
        module = importlib.import_module(f"fusedmlp.nn.{package}.work")
        assert isinstance(module, ModuleType)
        assert inspect.isfunction(sys.modules[f"torch.nn.{package}"].work)


# --- Type checkers ---


def test_every_module_of_this_torch_has_its_stub() -> None:
    here = {path.relative_to(nn_stubs.FOLDER) for path in nn_stubs.FOLDER.rglob("*.pyi")}
    assert set(nn_stubs.modules().values()) <= here, "run python tests/support/nn_stubs.py"
    assert Path("__init__.pyi") not in here  # fusedmlp/nn/__init__.py has its own types


TYPED = """
import torch
import {nn}.attention.flex_attention
import {nn}.functional as F
import {nn}.init
import {nn}.utils.weight_norm
from {nn} import functional, utils
from {nn}.common_types import _size_2_t
from {nn}.modules.batchnorm import _BatchNorm
from {nn}.modules.linear import Linear, NonDynamicallyQuantizableLinear
from {nn}.modules.module import _IncompatibleKeys
from {nn}.modules.utils import _pair
from {nn}.parallel import DistributedDataParallel
from {nn}.parameter import Parameter, UninitializedParameter
from {nn}.utils import clip_grad_norm_, prune
from {nn}.utils.parametrize import register_parametrization
from {nn}.utils.rnn import PackedSequence, pad_sequence

x = torch.ones(2, 2)
reveal_type(F.relu(x))
reveal_type(F.scaled_dot_product_attention)
reveal_type(functional.linear(x, x))
reveal_type({nn}.init.xavier_uniform_(x))
reveal_type(utils.rnn.pad_sequence([x]))
reveal_type(Linear(2, 2))
reveal_type(NonDynamicallyQuantizableLinear)
reveal_type(_BatchNorm)
reveal_type(_IncompatibleKeys)
reveal_type(DistributedDataParallel)
reveal_type(Parameter(x))
reveal_type(UninitializedParameter)
reveal_type(clip_grad_norm_([x], 1.0))
reveal_type(prune.L1Unstructured)
reveal_type(register_parametrization(Linear(2, 2), "weight", Linear(2, 2)))
reveal_type(pad_sequence([x]))
reveal_type({nn}.attention.flex_attention.create_block_mask)
def user(size: _size_2_t, packed: PackedSequence) -> None:
    reveal_type(size)
    reveal_type(packed)
"""


@pytest.mark.slow
def test_a_type_checker_sees_torchs_types(tmp_path: Path) -> None:
    """mypy uses the cache of the checkout: with an empty one it needs most of a minute to read torch."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    for nn in ("torch.nn", "fusedmlp.nn"):
        (tmp_path / f"{nn.replace('.', '_')}.py").write_text(TYPED.format(nn=nn))
    command = [sys.executable, "-m", "mypy", "--no-error-summary", *map(str, tmp_path.glob("*.py"))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not run.stderr
    # mypy also reports names in our stubs that an older torch lacks; in an installed package it does not.
    said: dict[str, list[str]] = {}
    for line in run.stdout.splitlines():
        name, number, note = line.split(":", 2)
        said.setdefault(Path(name).stem, []).append(f"{number}:{note}")
    assert said["fusedmlp_nn"] == said["torch_nn"]
    assert len(said["torch_nn"]) == TYPED.count("reveal_type")
    assert said["torch_nn"][0].endswith('Revealed type is "torch._tensor.Tensor"')
    assert not any(": error:" in line or '"Any"' in line for line in said["torch_nn"])
