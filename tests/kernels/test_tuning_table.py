"""Tables of measurements are read, written and looked up; tables that cannot be used give a warning."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import warnings
from typing import Any

import pytest
from available import HAS_TRITON
from hypothesis import given, settings
from hypothesis import strategies as st

if not HAS_TRITON:
    pytest.skip("Triton is not installed: no kernels to choose", allow_module_level=True)

from fusedmlp.kernels import tuning_table
from fusedmlp.kernels.tiles import TILES, UNALIGNED, candidates

TILE = TILES["half"][0]
HERE = tuning_table.where(None)
MINOR = ".".join(importlib.metadata.version("triton").split(".")[:2])


def content(**changes: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "device": "interpreter",
        "family": "interpreter",
        "triton": MINOR,
        "date": "2026-01-02",
        "products": [["forward", "half", 1024, 256, 128, list(TILE), 10.0, 20.0]],
        "stretches": [["training", "half", 1024, [128, 256], True, False, 30.0, 40.0]],
    } | changes


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in content().items() if key != name}


@pytest.fixture
def users_file(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Any:
    """The path of the user's table, in a new folder. Tables are read again before and after the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tuning_table.users_file(HERE)
    assert file is not None
    assert file.is_relative_to(tmp_path)
    file.parent.mkdir(parents=True)
    tuning_table.forget()
    yield file
    tuning_table.forget()


def test_a_table_is_used(users_file: pathlib.Path) -> None:
    users_file.write_text(json.dumps(content()))
    table = tuning_table.table_of(None)
    assert table.product("forward", "half", 1024, 256, 128) == tuning_table.Product(TILE, 10.0, 20.0)
    for rows in (725, 1448):  # a power of two covers all rows within a factor of 1.4
        assert table.product("forward", "half", rows, 256, 128) is not None
    for other in (
        ("forward", "half", 723, 256, 128),
        ("forward", "half", 1449, 256, 128),
        ("forward", "half", 0, 256, 128),
        ("forward", "half", 1024, 128, 256),
        ("forward", "ieee", 1024, 256, 128),
        ("grad_input", "half", 1024, 256, 128),
    ):
        assert table.product(*other) is None
    found = table.stretch("training", "half", 1000, (128, 256), True)
    source = f"interpreter, Triton {MINOR}, 2026-01-02"
    assert found == (tuning_table.Stretch(30.0, 40.0, False, source), "as a whole")
    assert table.stretch("inference", "half", 1000, (128, 256), True) is None
    assert table.stretch("training", "half", 1000, (128, 256), False) is None


def test_without_files_nothing_is_known(users_file: pathlib.Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = tuning_table.table_of(None)
    assert not table.products
    assert not table.stretches


def test_layers_measured_alone_add_up() -> None:
    measured = {
        ("training", "half", 1024, (8, 16), True): tuning_table.Stretch(1.0, 10.0, False, "here"),
        ("training", "half", 1024, (16, 4), True): tuning_table.Stretch(2.0, 20.0, False, "here"),
        ("training", "half", 1024, (16, 4), False): tuning_table.Stretch(4.0, 40.0, False, "here"),
        ("training", "half", 1024, (8, 16, 16, 4), False): tuning_table.Stretch(7.0, 70.0, False, "here"),
    }
    table = tuning_table.Table({}, measured)
    how = "as the sum of its layers"
    assert table.stretch("training", "half", 1024, (8, 16, 4), False) == (
        tuning_table.Stretch(5, 50, False, "here"),
        how,
    )
    assert table.stretch("training", "half", 1024, (8, 16, 4), True) == (
        tuning_table.Stretch(3, 30, False, "here"),
        how,
    )
    whole = table.stretch("training", "half", 1024, (8, 16, 16, 4), False)
    assert whole == (tuning_table.Stretch(7, 70, False, "here"), "as a whole")
    assert table.stretch("training", "half", 1024, (8, 16, 16, 4), True) is None  # 16 -> 16 was not measured


WRONG = {
    "empty": ("", "is not JSON"),
    "no JSON": ("tile = 128", "is not JSON"),
    "truncated": (json.dumps(content())[:-40], "is not JSON"),
    "a list": ("[]", "is not a table written by fusedmlp"),
    "no format": (json.dumps({"products": []}), "is not a table written by fusedmlp"),
    "future": (json.dumps(content(format=2)), "has format 2, and this version of fusedmlp reads 1"),
    "device": (
        json.dumps(content(device="NVIDIA H200")),
        "is for device 'NVIDIA H200', but this is 'interpreter'",
    ),
    "family": (json.dumps(content(family="sm_90")), "is for family 'sm_90'"),
    "triton": (json.dumps(content(triton="2.1")), f"is for triton '2.1', but this is '{MINOR}'"),
    "no products": (
        json.dumps({k: v for k, v in content().items() if k != "products"}),
        "KeyError: 'products'",
    ),
    "no date": (json.dumps({k: v for k, v in content().items() if k != "date"}), "KeyError: 'date'"),
    "a number": (json.dumps(content(products=[3])), "has an invalid entry"),
    "short": (json.dumps(content(products=[["forward", "half", 1024]])), "has an invalid entry"),
    "NaN": (
        json.dumps(content(products=[["forward", "half", 1024, 256, 128, list(TILE), float("nan"), 1.0]])),
        "has an invalid entry",
    ),
    "negative": (
        json.dumps(content(stretches=[["training", "half", 1024, [128, 256], True, True, -1.0, 1.0]])),
        "has an invalid entry",
    ),
    "text for a time": (
        json.dumps(content(stretches=[["training", "half", 1024, [128, 256], True, True, "1", 1.0]])),
        "has an invalid entry",
    ),
    "no bucket": (
        json.dumps(content(stretches=[["training", "half", 1000, [128, 256], True, False, 1.0, 1.0]])),
        "has an invalid entry",
    ),
    "operation": (
        json.dumps(content(products=[["backward", "half", 1024, 256, 128, list(TILE), 1.0, 1.0]])),
        "has an invalid entry",
    ),
}


@pytest.mark.parametrize(("text", "problem"), WRONG.values(), ids=WRONG)
def test_an_unusable_table_is_ignored_with_one_warning(
    text: str, problem: str, users_file: pathlib.Path
) -> None:
    users_file.write_text(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            table = tuning_table.table_of(None)
    assert not table.products
    assert not table.stretches
    (warning,) = caught
    said = str(warning.message)
    assert str(users_file) in said
    assert problem in said
    assert "it is not used. Delete it, or measure again with fusedmlp.tune" in said
    assert users_file.read_text() == text


def test_a_binary_file_or_a_folder_in_its_place(users_file: pathlib.Path) -> None:
    users_file.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match=r"cannot be read \(UnicodeDecodeError"):
        tuning_table.table_of(None)
    users_file.unlink()
    users_file.mkdir()
    tuning_table.forget()
    with pytest.warns(UserWarning, match="cannot be read"):
        tuning_table.table_of(None)


def test_entries_with_a_tile_that_does_not_ship_are_left_out(users_file: pathlib.Path) -> None:
    entries = [
        ["forward", "half", 1024, 256, 128, [1024, 1024, 64, 8, 3, False], 1.0, 2.0],  # does not ship
        ["forward", "half", 1024, 10, 128, list(TILE), 1.0, 2.0],  # unaligned, with an aligned tile
        ["forward", "half", 1024, 10, 64, list(UNALIGNED["half"]), 1.0, 2.0],
        ["forward", "half", 1024, 64, 64, list(TILE), 1.0, 2.0],
        ["forward", "half", 1024, 64, 80, [*TILE, False], 1.0, 2.0],  # the form of older files
    ]
    users_file.write_text(json.dumps(content(products=entries)))
    with pytest.warns(
        UserWarning, match="has 2 entries with tiles that this version of fusedmlp lacks"
    ) as caught:
        table = tuning_table.table_of(None)
    assert len(caught) == 1
    assert sorted(key[3:] for key in table.products) == [(10, 64), (64, 64), (64, 80)]
    assert table.product("forward", "half", 1024, 64, 80) == tuning_table.Product(TILE, 1.0, 2.0)
    assert len(table.stretches) == 1


def test_the_users_table_overrides_ours(users_file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = users_file.with_name("shipped.json")
    other = ["forward", "half", 2048, 64, 64, list(TILE), 1.0, 2.0]
    both = ["forward", "half", 1024, 256, 128, list(TILE), 99.0, 2.0]
    # The table that ships is valid for a whole family; any card of it may have been measured.
    ours.write_text(json.dumps(content(device="another of the family", products=[both, other], stretches=[])))
    monkeypatch.setattr(tuning_table, "shipped_file", lambda here: ours)
    users_file.write_text(json.dumps(content()))
    table = tuning_table.table_of(None)
    assert {(k[2], p.us) for k, p in table.products.items()} == {(1024, 10.0), (2048, 1.0)}


def test_never_read_from_the_current_folder(
    users_file: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "fusedmlp").mkdir(parents=True)
    for folder in (here, here / "fusedmlp"):
        for name in (users_file.name, tuning_table.shipped_file(HERE).name):
            (folder / name).write_text(json.dumps(content()))
    monkeypatch.chdir(here)
    assert not tuning_table.table_of(None).products


def test_in_a_distributed_job_the_users_file_is_not_read(
    users_file: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users_file.write_text(json.dumps(content()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not tuning_table.table_of(None).products
    monkeypatch.setenv("WORLD_SIZE", "1")
    tuning_table.forget()
    assert tuning_table.table_of(None).products


def test_a_written_table_is_read_back(users_file: pathlib.Path) -> None:
    tables = [tuning_table.parse(json.dumps(content()), HERE, exact=True)[0]]
    tables.append(tuning_table.Table())
    for table in tables:
        text = tuning_table.to_text(HERE, {"date": "2026-01-02", "torch": "2.11.0"}, table)
        again, strange = tuning_table.parse(text, HERE, exact=True)
        assert (again.products, again.stretches, strange) == (table.products, table.stretches, 0)
        assert sum("forward" in line for line in text.splitlines()) == len(table.products)  # one per line


@settings(deadline=None)
@given(st.integers(1, 2**31))
def test_bucket_is_the_nearest_power_of_two(rows: int) -> None:
    found = tuning_table.bucket(rows)
    assert found & (found - 1) == 0
    assert found**2 <= 2 * rows**2
    assert rows**2 <= 2 * found**2


def test_the_tables_that_ship_are_right() -> None:
    """No table ships yet. One that is added must be readable and name only tiles that ship."""
    for file in pathlib.Path(tuning_table.__file__).parent.glob("tuned_*.json"):
        told = json.loads(file.read_text())
        here = tuning_table.Where(told["device"], told["family"], told["triton"])
        assert file == tuning_table.shipped_file(here)
        _, strange = tuning_table.parse(file.read_text(), here, exact=False)
        assert not strange


@pytest.mark.parametrize("kind", TILES)
def test_tuning_tries_the_tiles_that_ship(kind: str) -> None:
    assert candidates(kind, aligned=True) == TILES[kind]
    assert candidates(kind, aligned=False) == (UNALIGNED[kind],)


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
@pytest.mark.parametrize("installed", [True, False])
def test_the_users_table_needs_no_platformdirs(
    installed: bool, variable: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of the table is the same with and without platformdirs."""
    if installed:
        pytest.importorskip("platformdirs", reason="platformdirs is not installed")
    else:
        monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    folder = tmp_path / "fusedmlp" if variable == "XDG_CACHE_HOME" else tmp_path / ".cache" / "fusedmlp"
    assert tuning_table.users_file(HERE).parent == folder


@pytest.mark.slow
@pytest.mark.kernels
def test_a_later_process_finds_the_table_without_platformdirs(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['platformdirs'] = None\n"
        "import torch, fusedmlp\n"
        "tuned = fusedmlp.tune([(8, 16, 16)], torch.float32)\n"
        "print(tuned.path, len(tuned.products))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    environment["HOME"] = str(tmp_path)
    for products in (3, 0):
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
        )
        path, count = run.stdout.rsplit(maxsplit=1)
        assert pathlib.Path(path).parent == tmp_path / ".cache" / "fusedmlp"
        assert int(count) == products
