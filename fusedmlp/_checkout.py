"""Find ``fusedmlp.kernels`` in a source checkout, where ``kernels/`` lies beside this folder."""

import importlib.abc
import importlib.util
import pathlib
import sys
from importlib.machinery import ModuleSpec
from typing import Any

_PACKAGE = pathlib.Path(__file__).parent
_KERNELS = _PACKAGE.parent / "kernels"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        if fullname != "fusedmlp.kernels":
            return None
        return importlib.util.spec_from_file_location(fullname, _KERNELS / "__init__.py")


def install() -> None:
    """Let ``import fusedmlp.kernels`` work in a checkout; change nothing in an ordinary install."""
    if (_PACKAGE / "kernels").is_dir() or any(type(f).__module__ == __name__ for f in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())  # before an editable install's, which may be of another checkout
