"""Triton kernels for Linear and Linear+ReLU, and their launchers. Installed as ``fusedmlp.kernels``.

Shapes: ``x (M, K)``, ``weight (N, K)``, ``bias (N,)``, ``y (M, N)``, for a batch of M rows, K input features
and N output features. Launchers do not check their arguments: ``fusedmlp.dispatch.predicate`` has done that.

The formulas are in four docstrings: layer/ (one layer), chain.py (a chain of layers), narrow/ (a
chain of narrow layers in one launch) and train_step/ (a training step in two launches).
"""

if __name__ == "kernels":
    # Python runs in the checkout, and another package, such as transformers, looks for the distribution
    # "kernels". It finds this empty module instead, whose version is too old to be used.
    __version__ = "0.0.0"
    del __path__  # otherwise "import kernels.chain" would load a second copy

    def __getattr__(name: str) -> str:
        raise AttributeError(
            f"module 'kernels' has no attribute {name!r}: it is the source folder of fusedmlp's Triton "
            "kernels, not a package of its own: use 'from fusedmlp import kernels'. If you meant another "
            "distribution named 'kernels', run Python from outside the fusedmlp checkout."
        )

else:
    from .chain import mlp_backward, mlp_forward
    from .launch import KernelFailed, arithmetic, dry_run, interpreting
    from .train_step import optimizers, step
    from .tuning_table import table_of

    __all__ = [
        "KernelFailed",
        "arithmetic",
        "dry_run",
        "interpreting",
        "mlp_backward",
        "mlp_forward",
        "optimizers",
        "step",
        "table_of",
    ]
