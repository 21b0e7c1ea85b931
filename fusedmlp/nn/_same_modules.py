"""Make every module below ``torch.nn`` importable below ``fusedmlp.nn`` too, as the same object.

So ``import fusedmlp.nn.functional as F`` and ``from fusedmlp.nn.utils import prune`` work.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_OURS, _TORCHS = "fusedmlp.nn.", "torch.nn."


def install() -> None:
    """Let Python's import find these modules. Further calls change nothing."""
    if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        # Before Python's own finder, which would load copies of torch's files: it finds their folders in the
        # __path__ of a shared package.
        sys.meta_path.insert(0, _Finder())
    _share_loaded()


def _share_loaded() -> None:
    """Enter every module that torch has loaded in ``sys.modules`` under our name too.

    If Python's import loaded it by our name, it would also set it as an attribute of its package, and so
    replace the function ``torch.nn.utils.weight_norm`` by the module of that name.
    """
    for name, module in list(sys.modules.items()):
        loading = getattr(getattr(module, "__spec__", None), "_initializing", False)  # in another thread
        if name.startswith(_TORCHS) and module is not None and not loading:
            sys.modules.setdefault(_OURS + name.removeprefix(_TORCHS), module)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the modules that torch has not loaded yet, by torch's names."""

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        if not fullname.startswith(_OURS):
            return None
        torchs = importlib.util.find_spec(_TORCHS + fullname.removeprefix(_OURS))
        if torchs is None:
            return None
        spec = ModuleSpec(fullname, self, origin=torchs.origin)
        spec.submodule_search_locations = torchs.submodule_search_locations
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_TORCHS + spec.name.removeprefix(_OURS))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, which Python's import has replaced by ours."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state
        _share_loaded()
