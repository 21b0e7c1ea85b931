"""Fused Linear+ReLU for PyTorch, forward and backward, behind a drop-in ``torch.nn``.

from fusedmlp import nn  # instead of: from torch import nn
"""

from fusedmlp import _checkout, convert, functional, nn
from fusedmlp._version import __version__
from fusedmlp.convert import fuse, unfuse
from fusedmlp.dispatch.backend_choice import backend
from fusedmlp.inspection.explain import explain
from fusedmlp.inspection.verify import verify
from fusedmlp.nn import MLP, Linear, LinearReLU, Sequential
from fusedmlp.train import TrainStep
from fusedmlp.tuning.tune import tune

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

_checkout.install()
