"""Fused Linear+ReLU for PyTorch, forward and backward, behind a drop-in ``torch.nn``.

from fusedmlp import nn  # instead of: from torch import nn
"""

import pathlib as _pathlib

# In a source checkout, and in an editable install of one, kernels/ lies beside this folder, not inside it.
if not (_pathlib.Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_pathlib.Path(__file__).parent.parent))

from fusedmlp import convert, functional, nn
from fusedmlp._backend import backend
from fusedmlp._explain import explain
from fusedmlp._tune import tune
from fusedmlp._verify import verify
from fusedmlp._version import __version__
from fusedmlp.convert import fuse, unfuse
from fusedmlp.nn import MLP, Linear, LinearReLU, Sequential
from fusedmlp.train import TrainStep

__all__ = [
    "MLP",
    "Linear",
    "LinearReLU",
    "Sequential",
    "TrainStep",
    "__version__",
    "backend",
    "convert",
    "explain",
    "functional",
    "fuse",
    "nn",
    "tune",
    "unfuse",
    "verify",
]
