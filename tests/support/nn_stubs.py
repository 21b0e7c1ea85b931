"""Writes the stubs by which type checkers know the modules below ``fusedmlp.nn``.

    python tests/support/nn_stubs.py

At run time these modules are ``torch.nn``'s own. Run it with the oldest torch, then with the newest: a stub
of a module that the newest no longer has stays.
"""

import ast
import importlib.util
import pkgutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch.nn

FOLDER = Path(__file__).parents[2] / "fusedmlp" / "nn"


def modules() -> dict[str, Path]:
    """The name of each module below ``torch.nn``, and its stub's path below ``fusedmlp/nn``."""
    found = {}
    for module in pkgutil.walk_packages(torch.nn.__path__, "torch.nn."):
        path = Path(*module.name.split(".")[2:])
        found[module.name] = path / "__init__.pyi" if module.ispkg else path.with_suffix(".pyi")
    return found


def defined(statements: Iterable[ast.stmt]) -> Iterator[str]:
    """The names that a module defines itself, rather than imports."""
    for statement in statements:
        match statement:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.If() | ast.Try():
                yield from defined(statement.body + statement.orelse)


def text(module: str) -> str:
    """The names that ``*`` brings, and those that it leaves out: private, or not in ``__all__``."""
    lines = [f"from {module} import *"]
    if not any(part.startswith("_") for part in module.split(".")):
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin)
        stub = source.with_suffix(".pyi")  # torch has some, of modules that it generates
        names = set(defined(ast.parse((stub if stub.exists() else source).read_text()).body))
        everything = getattr(importlib.import_module(module), "__all__", None)
        if everything is None or stub.exists():
            everything = [name for name in names if not name.startswith("_")]
        hidden = {name for name in names.difference(everything) if name.strip("_") and name[:2] != "__"}
        lines += [f"from {module} import {name} as {name}" for name in sorted(hidden)]
    return "\n".join(lines) + "\n"


def stubs() -> dict[Path, str]:
    return {path: text(module) for module, path in modules().items()}


if __name__ == "__main__":
    for path, stub in stubs().items():
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / path).write_text(stub)
