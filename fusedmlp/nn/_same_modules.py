"""Every module below ``torch.nn`` is importable below ``fusedmlp.nn`` too, and is the same object there.

So ``import fusedmlp.nn.functional as F`` and ``from fusedmlp.nn.utils import prune`` work.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_OURS, _TORCHS = "fusedmlp.nn.", "torch.nn."


def install() -> None:
    """Have Python's import find them. Another call changes nothing."""
    if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        # Before Python's own finder, which would load copies: a shared package lists torch's files.
        sys.meta_path.insert(0, _Finder())
    _share_loaded()


def _share_loaded() -> None:
    """Give our name to all that torch has loaded.

    For these Python's import has nothing left to do. If it loaded them by our name, it would also set them in
    the package they lie in, and ``torch.nn.utils.weight_norm`` there is a function of that name.
    """
    for name, module in list(sys.modules.items()):
        loading = getattr(getattr(module, "__spec__", None), "_initializing", False)  # in another thread
        if name.startswith(_TORCHS) and module is not None and not loading:
            sys.modules.setdefault(_OURS + name.removeprefix(_TORCHS), module)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads what torch has not loaded yet, by torch's name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
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
        """Undo the one thing that Python's import has changed in the module: it has set our spec."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state
        _share_loaded()
