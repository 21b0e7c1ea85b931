"""Triton kernels for Linear and Linear+ReLU, and their launchers. Installed as ``fusedmlp.kernels``.

Convention: ``x (M, K)``, ``weight (N, K)``, ``bias (N,)``, ``y (M, N)``; M rows (batch), K in features,
N out features. A launcher checks nothing: ``fusedmlp.dispatch.predicate`` decides what may come here.
"""

if __name__ == "kernels":
    # Python runs in the checkout, and somebody looks for the distribution of this name, as transformers does.
    # What is found is empty, and too old for any use.
    __version__ = "0.0.0"
    del __path__  # "import kernels.step" would load a second copy

    def __getattr__(name: str) -> str:
        raise AttributeError(
            f"module 'kernels' has no attribute {name!r}: it is the source folder of fusedmlp's Triton "
            "kernels, not a package of its own: use 'from fusedmlp import kernels'. If you meant another "
            "distribution named 'kernels', run Python from outside the fusedmlp checkout."
        )

else:
    from .chain import mlp_backward, mlp_forward
    from .launch import KernelFailed, arithmetic, dry_run, interpreting
    from .train_step import step
    from .tuning_table import table_of

    __all__ = [
        "KernelFailed",
        "arithmetic",
        "dry_run",
        "interpreting",
        "mlp_backward",
        "mlp_forward",
        "step",
        "table_of",
    ]
